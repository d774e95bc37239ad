import collections
import json
import pathlib

import numpy as np
import pytest

from official_selftrain.data import splits
from official_selftrain.utils.errors import UserError

# 1,000 images; class 3 is in one of a hundred, a tenth holds nothing.
RNG = np.random.default_rng(0)
IMAGES = [
    (
        f"{i:06d}.jpg",
        [] if i % 10 == 0 else [*RNG.choice([1, 1, 1, 2], 2).tolist(), *([3] * (i % 100 == 7))],
    )
    for i in range(1000)
]
PERCENTAGES = (1, 2, 5, 10, 20, 25, 50)


@pytest.mark.parametrize("stratified", [False, True])
def test_subsets_are_nested_seeded_and_of_the_right_size(tmp_path, stratified):
    lists = {}
    for seed in (0, 1):
        prefix = tmp_path / "train"
        written = splits.write(IMAGES, str(prefix), PERCENTAGES, seed, stratified)
        lists[seed] = [pathlib.Path(written[p]).read_text().split() for p in PERCENTAGES]
        assert [len(names) for names in lists[seed]] == [10 * p for p in PERCENTAGES]
        for small, large in zip(lists[seed], lists[seed][1:], strict=False):
            assert set(small) < set(large)
        content = json.loads((tmp_path / f"train_splits_seed{seed}.json").read_text())
        assert content["subsets"]["10"]["images"] == 100
    assert set(lists[0][0]) != set(lists[1][0])


def test_order_does_not_depend_on_the_order_of_the_images():
    for stratified in (False, True):
        first = splits.order(IMAGES, 3, stratified)
        assert splits.order(IMAGES[::-1], 3, stratified) == first
        assert sorted(first) == sorted(name for name, _ in IMAGES)


def test_the_draw_is_published():
    """Names drawn once and written down: a change would change everybody's subsets."""
    assert splits.order(IMAGES, 0)[:4] == ["000837.jpg", "000053.jpg", "000374.jpg", "000912.jpg"]


def test_uniform_draws_are_uniform():
    counts = collections.Counter()
    for seed in range(400):
        counts.update(splits.order(IMAGES[:20], seed)[:5])
    # 100 each, standard deviation 8.7.
    assert len(counts) == 20 and all(abs(n - 100) < 5 * 8.7 for n in counts.values())


def test_stratified_subsets_keep_every_class_in_proportion():
    classes = dict(IMAGES)
    total = collections.Counter(c for _, cs in IMAGES for c in set(cs))
    ordered = splits.order(IMAGES, 0, stratified=True)
    for percentage in PERCENTAGES:
        subset = ordered[: 10 * percentage]
        found = collections.Counter(c for name in subset for c in set(classes[name]))
        assert found.keys() == total.keys()
        for label, count in total.items():
            assert abs(found[label] - count * percentage / 100) <= 3
        empty = sum(not classes[name] for name in subset)
        assert abs(empty - percentage) <= 2


@pytest.mark.parametrize(
    ("images", "percentages", "message"),
    [
        (IMAGES, [0], "above 0 and at most 100"),
        (IMAGES, [120], "above 0 and at most 100"),
        (IMAGES + IMAGES[:1], [10], "2 images are called '000000.jpg'"),
        ([], [10], "no image to draw"),
        ([("a\nb", [1])], [10], r"the name 'a\\nb' has several lines"),
        ([("a", [1]), ("b", [2]), ("c", [3])], [40], "40 % is 1 of 3 images, without 2 of 3"),
    ],
)
def test_impossible_subsets_are_refused(tmp_path, images, percentages, message):
    with pytest.raises(UserError, match=message):
        splits.write(images, str(tmp_path / "x"), percentages, stratified=True)
