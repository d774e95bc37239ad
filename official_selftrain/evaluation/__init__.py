"""How good predictions and labels are."""
