"""Pure functions on boxes and anchors, written in `keras.ops` only."""
