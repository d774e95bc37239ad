"""Pure functions on arrays, and constants; nothing depends on a network or a file."""
