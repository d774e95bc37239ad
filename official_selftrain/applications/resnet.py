"""ResNet 10 to 200, version 1 with the stride on the 3x3 convolution, named as released.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

import keras

from official_selftrain.applications import classifier, imagenet
from official_selftrain.applications.blocks import residual_block, stem
from official_selftrain.applications.layers import NormActivation, Scope
from official_selftrain.config.networks import RESNETS as VARIANTS
from official_selftrain.utils.types import StrPath, Tensor


def ResNet(
    depth: int,
    include_top: bool = True,
    weights: StrPath | None = None,
    input_tensor: Tensor | None = None,
    input_shape: classifier.InputShape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: classifier.Activation = "softmax",
    name: str | None = None,
    *,
    stochastic_depth: float | None = None,
    drop_block: tuple[float, int] | None = None,
    norm: NormActivation | None = None,
) -> keras.Model:
    """Builds a ResNet as a classifier or as a pyramid of levels 2 to 5.

    Args:
        depth: a key of `VARIANTS`.
        include_top: end in the classifier.
        weights: None for random ones, a `.weights.h5` file, or a public start of docs/models.md.
        input_tensor: existing input to build on, normalized images.
        input_shape: `(height, width, 3)`; sides may be None.
        pooling: without the top, "avg" or "max" for pooled features, None for the pyramid.
        classes, classifier_activation: outputs of the classifier; None as activation gives logits.
        stochastic_depth: probability of dropping a block of level 5 in training; a block of level
            `l` is dropped with `l / 5` of it. None never drops.
        drop_block: `(keep_prob, block_size)` of `layers.DropBlock`; needs a fixed input size.
        norm: batch-norm settings and activation; None is momentum 0.997, epsilon 1e-4 and ReLU.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to probabilities `[B, classes]`,
        pooled features `[B, C]`, or `{"2": ..., ..., "5": ...}`, where level `l` is
        `[B, H / 2^l, W / 2^l, C_l]`, rounded up.

    Raises:
        ValueError: if the depth is unknown or the weights cannot be loaded.
    """
    if depth not in VARIANTS:
        raise ValueError(f"ResNet depth {depth!r} is unknown; choose from {list(VARIANTS)}.")
    classifier.check_weights(weights, f"resnet{depth}")
    images = classifier.image_input(input_shape, input_tensor, 224, include_top)
    scope = Scope(f"resnet{depth}", norm or NormActivation("relu", epsilon=1e-4), drop_block)
    # A probability of 0 keeps the layers, so that a saved model fits whatever the probability.
    levels = _levels(images, depth, scope, stochastic_depth or 0.0)
    model = classifier.assemble(
        images,
        levels,
        lambda: levels[5],
        scope,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        name=name,
    )
    imagenet.load_weights(model, f"resnet{depth}", weights)
    return model


def _levels(images, depth, scope, stochastic_depth):
    kind, repeats = VARIANTS[depth]  # the depth counts the convolutions and the dense layer
    x = stem(images, scope)
    levels = {}
    for level, blocks in enumerate(repeats, start=2):
        for index in range(blocks):
            x = residual_block(
                kind,
                x,
                64 * 2 ** (level - 2),
                scope,
                # The stem has already brought the images to the stride of level 2.
                strides=2 if index == 0 and level > 2 else 1,
                # Also in level 2, whose size is right already but whose channels are not.
                project=index == 0,
                drop_rate=stochastic_depth * level / 5,
            )
        levels[level] = x
    return levels


ResNet18 = classifier.family_member(ResNet, 18, "ResNet18")
ResNet34 = classifier.family_member(ResNet, 34, "ResNet34")
ResNet50 = classifier.family_member(ResNet, 50, "ResNet50")
ResNet101 = classifier.family_member(ResNet, 101, "ResNet101")
ResNet152 = classifier.family_member(ResNet, 152, "ResNet152")
ResNet200 = classifier.family_member(ResNet, 200, "ResNet200")

preprocess_input = classifier.preprocess_input
decode_predictions = classifier.decode_predictions
