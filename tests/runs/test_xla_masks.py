"""The train step of a segmenter with XLA, in a process of its own: XLA gives no memory back."""

import pytest
from xla_steps import assert_train_step_compiles


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_the_whole_train_step_of_a_segmenter_compiles(precision):
    assert_train_step_compiles("segmentation", precision)
