"""Policies S1 to S4: image, boxes and mask changed together."""
