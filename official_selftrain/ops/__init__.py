"""Pure functions and constants; none of them knows a network or a file."""
