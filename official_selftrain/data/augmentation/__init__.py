"""Policies S1 to S4, which change image, boxes and mask together."""
