"""The number of operations of a network."""

import math

import keras


def multiply_adds(model: keras.Model) -> int:
    """Multiply-adds for one image in the convolutions and dense layers of a functional model.

    The input size of the model must be fixed. Element-wise layers are not counted.
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        # A layer that several levels share has a node for each. Keras has no public way to them:
        # `layer.output` raises for such a layer.
        for node in layer._inbound_nodes:
            cells = math.prod(node.outputs[0].shape[1:-1])
            total += cells * _per_cell(layer, node.arguments.keras_tensors[0].shape[-1])
    return total


def _per_cell(layer, channels):
    # The first two are subclasses of a convolution that costs more, so their order matters.
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return layer.kernel_size[0] * layer.kernel_size[1] * channels
    if isinstance(layer, keras.layers.SeparableConv2D):
        return channels * (layer.kernel_size[0] * layer.kernel_size[1] + layer.filters)
    if isinstance(layer, keras.layers.Conv2D):
        return layer.kernel_size[0] * layer.kernel_size[1] * channels * layer.filters
    if isinstance(layer, keras.layers.Dense):
        return channels * layer.units
    return 0
