"""Backbones in the manner of `keras.applications`."""

from official_selftrain.applications.spinenet import (
    SpineNet49,
    SpineNet49S,
    SpineNet96,
    SpineNet143,
    SpineNet143L,
    SpineNet190,
)

__all__ = [
    "SpineNet49",
    "SpineNet49S",
    "SpineNet96",
    "SpineNet143",
    "SpineNet143L",
    "SpineNet190",
]
