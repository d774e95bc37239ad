import io
import itertools

import numpy as np
import pytest
from PIL import Image

from official_selftrain import config as config_lib
from official_selftrain.data import sources
from official_selftrain.data.sources import digits
from official_selftrain.utils.errors import UserError


def test_scenes_are_deterministic_and_boxes_fit_the_masks():
    first, second = (
        [record for record, _ in zip(digits.scenes("train"), range(5), strict=False)]
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a.encoded == b.encoded
        np.testing.assert_array_equal(a.boxes, b.boxes)
        mask = np.asarray(Image.open(io.BytesIO(a.mask)))
        assert mask.shape == (a.height, a.width)
        for box, label in zip(a.boxes * a.height, a.classes, strict=True):
            top, left, bottom, right = box.round().astype(int)
            inside = mask[top:bottom, left:right] == label
            # Ink touches all four sides of its box.
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
        covered = np.zeros_like(mask, bool)
        for top, left, bottom, right in (a.boxes * a.height).round().astype(int):
            covered[top:bottom, left:right] = True
        assert not (mask[~covered] > 0).any()


def test_splits_share_no_digit_and_no_region():
    assert sum(end - start for start, end in digits.SHARES.values()) == pytest.approx(1.0)
    for label in range(len(digits.DIGITS)):
        seen = [
            {sample.tobytes() for sample in digits._digits(split)[label]} for split in digits.SHARES
        ]
        counts = [len(s) for s in seen]
        assert len(set.union(*seen)) == sum(counts)
    widths = [[p.shape[1] for p in digits._photographs(split)] for split in digits.SHARES]
    whole = [image.shape[1] for image in digits._sources()[1]]
    np.testing.assert_array_equal(np.sum(widths, axis=0), whole)


def test_the_digits_are_prepared_like_any_other_source(tmp_path, monkeypatch):
    """They have no path that a message could name."""
    first = list(itertools.islice(digits.scenes("train"), 3))
    monkeypatch.setattr(digits, "scenes", lambda split: iter(first))
    config = config_lib.resolve("demo")
    summary = sources.prepare(config.human, config.path, tmp_path / "human")
    assert summary["images"] == 3 and summary["boxes"] > 0
    monkeypatch.setattr(digits, "scenes", lambda split: iter([]))
    with pytest.raises(UserError, match="no usable image in 'digits/train'"):
        sources.prepare(config.human, config.path, tmp_path / "empty")
