"""ResNet 10 to 200, version 1 with the stride on the 3x3 convolution, named as released.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from official_selftrain.applications import classifier
from official_selftrain.applications.blocks import residual_block, stem
from official_selftrain.applications.layers import NormActivation, Scope
from official_selftrain.config.networks import RESNETS as VARIANTS


def ResNet(
    depth,
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name=None,
    *,
    stochastic_depth=None,
    drop_block=None,
    norm=None,
):
    """Builds a ResNet as a classifier or as a pyramid of levels 2 to 5.

    Args:
        depth: a key of `VARIANTS`.
        include_top: end in the classifier.
        weights: None or a `.weights.h5` file.
        input_tensor: existing input to build on, normalized images.
        input_shape: `(height, width, 3)`; sides may be None.
        pooling: without the top, "avg" or "max" for pooled features, None for the pyramid.
        classes: of the classifier.
        classifier_activation: of the classifier, None for logits.
        name: name of the model.
        stochastic_depth: probability of dropping a block of level 5 in training; level `l` has
            `l / 5` of it. None never drops.
        drop_block: `(keep_prob, block_size)` of `layers.DropBlock`; needs a fixed input size.
        norm: `NormActivation`, batch-norm settings and activation; None is decay 0.997,
            epsilon 1e-4, ReLU.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to probabilities `[B, classes]`,
        pooled features, or `{"2": ..., ..., "5": ...}`, level `l` being
        `[B, H / 2^l, W / 2^l, C_l]`, rounded up.

    Raises:
        ValueError: for an unknown depth or unusable weights.
    """
    if depth not in VARIANTS:
        raise ValueError(f"ResNet depth {depth!r} is unknown; choose from {list(VARIANTS)}.")
    classifier.check_weights(weights)
    images = classifier.image_input(input_shape, input_tensor, 224, include_top)
    scope = Scope(f"resnet{depth}", norm or NormActivation("relu", epsilon=1e-4), drop_block)
    x = stem(images, scope)
    kind, repeats = VARIANTS[depth]
    levels = {}
    for level, blocks in enumerate(repeats, start=2):
        for index in range(blocks):
            x = residual_block(
                kind,
                x,
                64 * 2 ** (level - 2),
                scope,
                strides=2 if index == 0 and level > 2 else 1,
                project=index == 0,
                drop_rate=(stochastic_depth or 0.0) * level / 5,
            )
        levels[level] = x
    model = classifier.assemble(
        images, levels, lambda: x, scope, include_top, pooling, classes, classifier_activation, name
    )
    if weights is not None:
        model.load_weights(weights)
    return model


ResNet18 = classifier.family_member(ResNet, 18, "ResNet18")
ResNet34 = classifier.family_member(ResNet, 34, "ResNet34")
ResNet50 = classifier.family_member(ResNet, 50, "ResNet50")
ResNet101 = classifier.family_member(ResNet, 101, "ResNet101")
ResNet152 = classifier.family_member(ResNet, 152, "ResNet152")
ResNet200 = classifier.family_member(ResNet, 200, "ResNet200")

preprocess_input = classifier.preprocess_input
decode_predictions = classifier.decode_predictions
