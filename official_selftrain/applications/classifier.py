"""What all families have in common: their arguments, and how their models end."""

import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeAlias, TypeVar

import keras

from official_selftrain.config.networks import PUBLIC_WEIGHTS, is_named
from official_selftrain.utils.types import StrPath, Tensor

if TYPE_CHECKING:
    import numpy as np

    from official_selftrain.applications.layers import Scope

Activation: TypeAlias = str | Callable[[Tensor], Tensor] | None
InputShape: TypeAlias = tuple[int | None, int | None, int]
Variant = TypeVar("Variant")
Arguments = ParamSpec("Arguments")


def image_input(
    input_shape: InputShape | None,
    input_tensor: Tensor | None,
    default_size: int,
    include_top: bool,
) -> Tensor:
    """The input of a network: the tensor if one is given, otherwise a new one.

    Args:
        input_shape: `(height, width, 3)` in pixels, where None leaves a side open, or None.
        input_tensor: `[B, H, W, 3]`, or None.
        default_size: side in pixels of a classifier for which no shape is given.
        include_top: whether the network is a classifier; without a shape, others have open sides.

    Returns:
        A symbolic tensor `[B, H, W, 3]`.

    Raises:
        ValueError: if the shape is not `(height, width, 3)`.
    """
    if input_tensor is not None:
        shape = input_tensor.shape[1:]
    else:
        side = default_size if include_top else None
        shape = tuple(input_shape or (side, side, 3))
    if len(shape) != 3 or shape[-1] != 3:
        raise ValueError(
            f"`input_shape` must be (height, width, 3), without the batch. Received {tuple(shape)}."
        )
    return keras.Input(shape) if input_tensor is None else input_tensor


def check_weights(weights: StrPath | None, backbone: str) -> None:
    """Refuses `weights` that cannot be loaded, before anything is built.

    Args:
        weights: None, the path of a file, or the name of public weights.
        backbone: name of the network, such as "resnet50".

    Raises:
        ValueError: if there are no such weights for the network, or if the file does not exist.
    """
    known = PUBLIC_WEIGHTS.get(str(weights), {backbone: None})
    if weights is None or (is_named(weights) and backbone in known):
        return
    if is_named(weights):
        raise ValueError(
            f"There are no public weights of {backbone} for `weights={weights!r}`. Give the path "
            "of a .weights.h5 file; convert_checkpoint makes one from a released checkpoint."
        )
    # Keras would report a missing file only after the network has been built, which takes a minute.
    if not pathlib.Path(weights).is_file():
        raise ValueError(
            '`weights` must be None, the name of public weights such as "imagenet", or the path '
            "of an existing file. "
            f"Received {weights!r}."
        )


def assemble(
    images: Tensor,
    levels: Mapping[int, Tensor],
    features: Callable[[], Tensor],
    scope: "Scope",
    *,
    include_top: bool,
    pooling: str | None,
    classes: int,
    classifier_activation: Activation,
    name: str | None = None,
    dropout: float = 0.0,
    dense_initializer: str | keras.initializers.Initializer = "glorot_uniform",
) -> keras.Model:
    """The model that a family function returns.

    Args:
        images: symbolic tensor `[B, H, W, 3]`.
        levels: `{level: [B, H / 2^level, W / 2^level, C]}`.
        features: builds the features `[B, h, w, C]` that are pooled. It is called only if something
            is pooled, so that a pyramid has no layers that it does not use.
        scope: names the layers made here.
        include_top: end in a classifier.
        pooling: used without the top. None returns the pyramid, with the levels as string keys;
            "avg" and "max" return pooled features `[B, C]`.
        classes: number of outputs of the classifier.
        classifier_activation: activation of the classifier; None returns logits.
        name: name of the model; None takes the first part of the scope's path.
        dropout: rate before the classifier, in [0, 1).
        dense_initializer: initializer of the classifier's kernel.

    Raises:
        ValueError: if `pooling` is anything else.
    """
    layers = keras.layers
    if include_top:
        x = layers.GlobalAveragePooling2D(name=scope.name("average_pool"))(features())
        if dropout:
            x = layers.Dropout(dropout, name=scope.name("dropout"))(x)
        outputs = layers.Dense(
            classes,
            activation=classifier_activation,
            kernel_initializer=dense_initializer,
            dtype="float32",  # probabilities in 16 bits are too coarse for a loss
            name=scope.name("dense"),
        )(x)
    elif pooling == "avg":
        outputs = layers.GlobalAveragePooling2D(name=scope.name("average_pool"))(features())
    elif pooling == "max":
        outputs = layers.GlobalMaxPooling2D(name=scope.name("max_pool"))(features())
    elif pooling is None:
        outputs = {str(level): levels[level] for level in sorted(levels)}
    else:
        raise ValueError(f'`pooling` must be None, "avg" or "max". Received {pooling!r}.')
    return keras.Model(images, outputs, name=name or scope.path.split(".")[0])


def family_member(
    builder: Callable[Concatenate[Variant, Arguments], keras.Model], variant: Variant, name: str
) -> Callable[Arguments, keras.Model]:
    """The function of one variant, such as `SpineNet49`.

    Editors, `help` and `inspect` show the arguments of `builder` without the first.

    Args:
        builder: function of the family, such as `SpineNet`, whose first argument is the variant.
        variant: value of that argument.
        name: name of the new function.
    """

    @functools.wraps(builder)
    def build(*args: Arguments.args, **kwargs: Arguments.kwargs) -> keras.Model:
        return builder(variant, *args, **kwargs)

    # `wraps` alone would show the variant, too, as an argument.
    signature = inspect.signature(builder)
    parameters = list(signature.parameters.values())[1:]
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"Builds {name}: `{builder.__name__}({variant!r}, ...)`, which documents the arguments."
    )
    return build


def preprocess_input(images: Tensor) -> Tensor:
    """Normalizes RGB images `[..., 3]` from 0..255 to zero mean and unit variance (ImageNet)."""
    return keras.applications.imagenet_utils.preprocess_input(images, mode="torch")


def decode_predictions(
    probabilities: "np.ndarray", top: int = 5
) -> list[list[tuple[str, str, float]]]:
    """Names of the most likely ImageNet classes.

    The first call downloads the list of names, as in `keras.applications`.

    Args:
        probabilities: `[B, 1000]`, or `[B, 1001]` with a background class first, which is ignored.
        top: number of classes to return for each image.

    Returns:
        For each image a list of `(WordNet id, name, probability)`, best first.

    Raises:
        ValueError: if there is another number of classes.
    """
    # TF1's ImageNet classifiers count from 1 and keep class 0 for the background.
    if probabilities.shape[-1] == 1001:
        probabilities = probabilities[:, 1:]
    return keras.applications.imagenet_utils.decode_predictions(probabilities, top=top)
