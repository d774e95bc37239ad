"""What all families share: a backbone as a classifier, as pooled features, or as a pyramid."""

import pathlib

import keras


def image_input(input_shape, input_tensor, default_size, include_top):
    """The input of a family function: the given tensor, or one of the given or default shape.

    Raises:
        ValueError: if the shape is not `(height, width, 3)`.
    """
    if input_tensor is not None:
        shape = input_tensor.shape[1:]
    else:
        side = default_size if include_top else None
        shape = tuple(input_shape or (side, side, 3))
    if len(shape) != 3 or shape[-1] != 3:
        raise ValueError(f"`input_shape` must be (height, width, 3). Received {tuple(shape)}.")
    return keras.Input(shape) if input_tensor is None else input_tensor


def check_weights(weights, imagenet=False):
    """Refuses unusable `weights` before anything is built.

    Args:
        weights: None, a `.weights.h5` path, or "imagenet".
        imagenet: whether the family has ImageNet weights.

    Raises:
        ValueError: for "imagenet" where there are none, or a file that does not exist.
    """
    if weights is None or (weights == "imagenet" and imagenet):
        return
    if weights == "imagenet":
        raise ValueError(
            'There are no public ImageNet weights of this network for `weights="imagenet"`. Give '
            "the path of a .weights.h5 file; convert_checkpoint makes one of a released checkpoint."
        )
    if not pathlib.Path(weights).is_file():
        raise ValueError(
            f'`weights` must be None, "imagenet" or an existing file. Received {weights!r}.'
        )


def assemble(
    images,
    levels,
    features,
    scope,
    include_top,
    pooling,
    classes,
    classifier_activation,
    name=None,
    dropout=0.0,
    dense_initializer="glorot_uniform",
):
    """The model of a family function, as `keras.applications` would return it.

    Args:
        images: input tensor.
        levels: `{level: [B, H / 2^level, W / 2^level, C]}`.
        features: function without arguments that builds `[B, h, w, C]` to be pooled.
        scope: `Scope` of the dense layer.
        include_top: end in class probabilities `[B, classes]`.
        pooling: without the top: None returns the pyramid with levels as string keys, "avg" or
            "max" pooled features `[B, C]`.
        classes: channels of the classifier.
        classifier_activation: of the classifier; None returns logits.
        name: name of the model; None takes that of the scope.
        dropout: before the classifier.
        dense_initializer: of the classifier's kernel.

    Raises:
        ValueError: for another `pooling`.
    """
    if include_top:
        x = keras.layers.GlobalAveragePooling2D(name=scope.name("average_pool"))(features())
        if dropout:
            x = keras.layers.Dropout(dropout, name=scope.name("dropout"))(x)
        outputs = keras.layers.Dense(
            classes,
            activation=classifier_activation,
            kernel_initializer=dense_initializer,
            dtype="float32",
            name=scope.name("dense"),
        )(x)
    elif pooling == "avg":
        outputs = keras.layers.GlobalAveragePooling2D(name=scope.name("average_pool"))(features())
    elif pooling == "max":
        outputs = keras.layers.GlobalMaxPooling2D(name=scope.name("max_pool"))(features())
    elif pooling is None:
        outputs = {str(level): levels[level] for level in sorted(levels)}
    else:
        raise ValueError(f'`pooling` must be None, "avg" or "max". Received {pooling!r}.')
    return keras.Model(images, outputs, name=name or scope.path.split(".")[0])


def family_member(builder, variant, name):
    """The function of one variant with the signature of `keras.applications`."""

    def build(
        include_top=True,
        weights=None,
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=1000,
        classifier_activation="softmax",
        name=None,
        **options,
    ):
        return builder(
            variant,
            include_top,
            weights,
            input_tensor,
            input_shape,
            pooling,
            classes,
            classifier_activation,
            name,
            **options,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}; arguments and result are those of `{builder.__name__}`."
    return build


def preprocess_input(images):
    """Normalizes RGB images `[..., 3]` from 0..255 to zero mean and unit variance (ImageNet)."""
    return keras.applications.imagenet_utils.preprocess_input(images, mode="torch")


def decode_predictions(probabilities, top=5):
    """Names of the most likely ImageNet classes.

    The first call downloads the list of names, as in `keras.applications`.

    Args:
        probabilities: `[B, 1000]`, or `[B, 1001]` with a background class first, which is left out.
        top: classes to return for each image.

    Returns:
        For each image a list of `(WordNet id, name, probability)`, best first.

    Raises:
        ValueError: for another number of classes.
    """
    if probabilities.shape[-1] == 1001:
        probabilities = probabilities[:, 1:]
    return keras.applications.imagenet_utils.decode_predictions(probabilities, top=top)
