"""EfficientNet B0 to B8 and L2, and EfficientNet-Lite 0 to 4.

Tan and Le, "EfficientNet", ICML 2019; L2 from Xie et al., "Self-training with Noisy Student",
CVPR 2020. Names and arithmetic are those of the released self-training checkpoints. The Lite
variants have no squeeze-and-excite, ReLU6 instead of swish, and a stem, head, first and last stage
of fixed size.
"""

import keras

from official_selftrain.applications import classifier, imagenet
from official_selftrain.applications.layers import DropConnect, NormActivation, Scope, batch_norm
from official_selftrain.config.networks import EFFICIENTNETS as VARIANTS
from official_selftrain.config.networks import STAGES, is_public
from official_selftrain.config.networks import EfficientNetVariant as Variant
from official_selftrain.utils.types import StrPath, Tensor

# The pyramid level that ends with a stage, before the 1x1 convolution to 1280 channels, which only
# the classifier has.
LEVELS = {1: 2, 2: 3, 4: 4, 6: 5}


def EfficientNet(
    variant: str,
    include_top: bool = True,
    weights: StrPath | None = None,
    input_tensor: Tensor | None = None,
    input_shape: classifier.InputShape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: classifier.Activation = "softmax",
    name: str | None = None,
    *,
    stochastic_depth: float | None = 0.2,
    norm: NormActivation | None = None,
    sizes: Variant | None = None,
) -> keras.Model:
    """Builds an EfficientNet as a classifier or as a pyramid of levels 2 to 5.

    Args:
        variant: a name in `VARIANTS`.
        include_top: end in the classifier.
        weights: None for random ones, a `.weights.h5` file, or a public start of docs/models.md.
        input_tensor: existing input to build on, normalized images.
        input_shape: `(height, width, 3)`; sides may be None.
        pooling: without the top, "avg" or "max" for pooled features, None for the pyramid.
        classes, classifier_activation: outputs of the classifier; None as activation gives logits.
        stochastic_depth: block i of N, counted from 0, is dropped in training with i / N of this
            probability. None never drops.
        norm: batch-norm settings and activation; None is what `released_norm` returns.
        sizes: sizes that replace those of the variant.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to probabilities `[B, classes]`,
        pooled features `[B, C]`, or `{"2": ..., ..., "5": ...}`, where level `l` is
        `[B, H / 2^l, W / 2^l, C_l]`, rounded up.

    Raises:
        ValueError: if the variant is unknown or the weights cannot be loaded.
    """
    _check(variant, weights, sizes, classes if include_top else 1000)
    sizes = sizes or VARIANTS[variant]
    images = classifier.image_input(input_shape, input_tensor, sizes.size, include_top)
    network = _Builder(f"efficientnet-{variant}", sizes, norm or released_norm(sizes))
    # A probability of 0 keeps the layers, so that a saved model fits whatever the probability.
    levels = network.levels(images, stochastic_depth or 0.0)
    model = classifier.assemble(
        images,
        levels,
        lambda: network.head(levels[5]),
        network.scope.child("head"),
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        name=name,
        dropout=sizes.dropout,
        # As released: uniform within 1 / sqrt(classes).
        dense_initializer=keras.initializers.VarianceScaling(1 / 3, "fan_out", "uniform"),
    )
    imagenet.load_weights(model, f"efficientnet-{variant}", weights)
    return model


def _check(variant, weights, sizes, classes):
    if variant not in VARIANTS:
        raise ValueError(f"EfficientNet {variant!r} is unknown; choose from {list(VARIANTS)}.")
    if weights is not None and is_public(weights) and (sizes or classes != 1000):
        raise ValueError(
            f"`weights={weights!r}` needs the published sizes and `classes=1000`. Received "
            f"{sizes=} and {classes=}; for other classes, use `include_top=False` and add a "
            "classifier."
        )
    classifier.check_weights(weights, f"efficientnet-{variant}")


def released_norm(sizes: Variant) -> NormActivation:
    """Batch-norm settings and activation, which the released code takes from no configuration."""
    return NormActivation("relu6" if sizes.lite else "swish", momentum=0.99, epsilon=1e-3)


class _Builder:
    """The layers of an EfficientNet, named as in the released checkpoints."""

    def __init__(self, path, sizes, norm):
        self.scope = Scope(path, norm)
        self.sizes = sizes

    def levels(self, images, stochastic_depth):
        stem = self.scope.child("stem")
        x = _norm(_conv(images, self.sizes.stem_channels(), 3, stem, strides=2), stem)
        repeats = self.sizes.repeats()
        levels, index = {}, 0
        for number, stage in enumerate(STAGES):
            for repeat in range(repeats[number]):
                x = self._block(
                    x,
                    stage,
                    self.scope.child(f"blocks_{index}"),
                    strides=1 if repeat else stage.strides,
                    # The first block is never dropped, and the last one with a little less than the
                    # full probability (released code).
                    drop_rate=stochastic_depth * index / sum(repeats),
                )
                index += 1
            if number in LEVELS:
                levels[LEVELS[number]] = x
        return levels

    def _block(self, x, stage, scope, *, strides, drop_rate):
        """Inverted residual block with squeeze-and-excite (MBConv)."""
        shortcut, channels = x, self.sizes.channels(stage.channels)
        if stage.expansion != 1:
            x = _norm(_conv(x, x.shape[-1] * stage.expansion, 1, scope), scope)
        x = keras.layers.DepthwiseConv2D(
            stage.kernel_size,
            strides,
            padding="same",
            use_bias=False,
            depthwise_initializer=_initializer(),
            name=scope.name("depthwise_conv2d"),
        )(x)
        x = _norm(x, scope)
        if not self.sizes.lite:
            # A quarter of the channels of the block's input, not of the expanded ones.
            x = _squeeze_excite(x, max(1, shortcut.shape[-1] // 4), scope.child("se"))
        x = _norm(_conv(x, channels, 1, scope), scope, activate=False)
        if strides == 1 and shortcut.shape[-1] == channels:
            x = DropConnect(drop_rate, name=scope.name("drop_connect"))(x)
            x = keras.layers.Add(name=scope.name("add"))([x, shortcut])
        return x

    def head(self, x):
        scope = self.scope.child("head")
        channels = 1280 if self.sizes.lite else self.sizes.channels(1280)
        return _norm(_conv(x, channels, 1, scope), scope)


def _squeeze_excite(x, filters, scope):
    pool = keras.layers.GlobalAveragePooling2D(keepdims=True, name=scope.name("squeeze"))
    gate = _conv(pool(x), filters, 1, scope, use_bias=True)
    gate = scope.activation(gate)
    gate = _conv(gate, x.shape[-1], 1, scope, use_bias=True)
    gate = keras.layers.Activation("sigmoid", name=scope.name("sigmoid"))(gate)
    return keras.layers.Multiply(name=scope.name("excite"))([x, gate])


def _conv(x, filters, kernel_size, scope, *, strides=1, use_bias=False):
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same",
        use_bias=use_bias,
        kernel_initializer=_initializer(),
        name=scope.name("conv2d"),
    )(x)


def _norm(x, scope, activate=True):
    # The released checkpoints call it so, on whatever device they were trained.
    x = batch_norm(scope.norm_settings, scope.name("tpu_batch_normalization"))(x)
    return scope.activation(x) if activate else x


def _initializer():
    # Not Keras' `he_normal`, which counts the inputs and cuts off the tails.
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


EfficientNetB0 = classifier.family_member(EfficientNet, "b0", "EfficientNetB0")
EfficientNetB1 = classifier.family_member(EfficientNet, "b1", "EfficientNetB1")
EfficientNetB2 = classifier.family_member(EfficientNet, "b2", "EfficientNetB2")
EfficientNetB3 = classifier.family_member(EfficientNet, "b3", "EfficientNetB3")
EfficientNetB4 = classifier.family_member(EfficientNet, "b4", "EfficientNetB4")
EfficientNetB5 = classifier.family_member(EfficientNet, "b5", "EfficientNetB5")
EfficientNetB6 = classifier.family_member(EfficientNet, "b6", "EfficientNetB6")
EfficientNetB7 = classifier.family_member(EfficientNet, "b7", "EfficientNetB7")
EfficientNetB8 = classifier.family_member(EfficientNet, "b8", "EfficientNetB8")
EfficientNetL2 = classifier.family_member(EfficientNet, "l2", "EfficientNetL2")
EfficientNetLite0 = classifier.family_member(EfficientNet, "lite0", "EfficientNetLite0")
EfficientNetLite1 = classifier.family_member(EfficientNet, "lite1", "EfficientNetLite1")
EfficientNetLite2 = classifier.family_member(EfficientNet, "lite2", "EfficientNetLite2")
EfficientNetLite3 = classifier.family_member(EfficientNet, "lite3", "EfficientNetLite3")
EfficientNetLite4 = classifier.family_member(EfficientNet, "lite4", "EfficientNetLite4")

preprocess_input = classifier.preprocess_input
decode_predictions = classifier.decode_predictions
