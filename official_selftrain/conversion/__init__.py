"""Across the border: released checkpoints and configs in, SavedModel, TFLite and ONNX out."""
