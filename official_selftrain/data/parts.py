"""Which images of a prepared source are used: labeled, held out, or left out.

The draws are those of `splits.order`: they depend only on a seed and the names of the images.
"""

import collections
from collections.abc import Container, Sequence
from typing import TypeAlias

from official_selftrain.config import HumanConfig, SelectionConfig
from official_selftrain.data import splits
from official_selftrain.utils.errors import UserError

Index: TypeAlias = Sequence[tuple[str, int, str, list[int]]]  # see `sources.read_index`


def order(index: Index, positions: Sequence[int], seed: int) -> list[int]:
    """Some positions of an index in the order in which `splits.order` draws their images."""
    seen: collections.Counter[str] = collections.Counter()
    places = {}
    for position in positions:
        name = index[position][0]
        # TFRecords may have the same name, or none, several times; a line break is in no name.
        places[f"{name}\n{seen[name]}" if seen[name] else name] = position
        seen[name] += 1
    images = [(name, index[position][3]) for name, position in places.items()]
    return [places[name] for name in splits.order(images, seed, stratified=True)]


def _single(
    index: Index, positions: Sequence[int], seed: int, left_out: Container[str]
) -> list[int]:
    """`order` of the images of which no copy is among the others or, by digest, `left_out`."""
    copies = collections.Counter(index[position][2] for position in positions)
    return [
        position
        for position in order(index, positions, seed)
        if index[position][2] not in left_out and copies[index[position][2]] == 1
    ]


def measured(index: Index, fraction: float) -> list[int]:
    """Which labeled images are held out of a whole run to evaluate on, in ascending order.

    They are drawn before all other parts, so they are the same for every `human.fraction`. The rest
    holds an image of each class.

    Args:
        index: of the labeled images.
        fraction: how many, in (0, 1); at least one is held out, and one is left.

    Raises:
        UserError: if none can be held out, or none of them has a label.
    """
    total = len(index)
    count = min(max(round(fraction * total), 1), total - 1)
    chosen = _single(index, range(total), 0, ())[-count:] if count else []
    if any(index[position][3] for position in chosen):
        return sorted(chosen)
    why = f"none of the {len(chosen)} that would be held out has a label"
    if not chosen:
        why = "all of them are copies" if count else "one is needed to learn from"
    raise UserError(
        f"of {total} labeled {'image' if total == 1 else 'images'} none can be held out to measure "
        f"the result: {why}; label more images, or set evaluation.images and their labels"
    )


def labeled(index: Index, human: HumanConfig, left: Sequence[int] | None = None) -> list[int]:
    """The positions of the labeled images that are used, in ascending order.

    Args:
        index: of the labeled images.
        human: says how many are used.
        left: positions among which they are drawn, by default all.

    Raises:
        UserError: if `human.fraction` leaves none.
    """
    left = range(len(index)) if left is None else left
    if human.fraction is None:
        return list(left)
    count = round(human.fraction * len(left))
    if not count:
        raise UserError(
            f"human.fraction={human.fraction:g} of {len(left)} labeled images is not one image; "
            f"give at least {1 / len(left):.2g}"
        )
    return sorted(order(index, left, human.fraction_seed)[:count])


def held_out(
    index: Index, used: Sequence[int], selection: SelectionConfig, measured: Container[str]
) -> tuple[list[int], str]:
    """Which of the labeled images are held out of the training, to choose its weights.

    The training keeps the head of the order, which holds an image of each class.

    Args:
        index: of the labeled images.
        used: positions of those that are used.
        selection: how many are held out.
        measured: digests of the evaluation images, none of which is held out.

    Returns:
        Their positions in ascending order, and why there are none, "" if there are.
    """
    most, fewest = len(used) // 4, selection.min_images
    if most < fewest:
        return [], (
            f"{len(used)} labeled images are fewer than {4 * fewest}, four times "
            f"selection.min_images={fewest}"
        )
    count = min(max(round(selection.fraction * len(used)), fewest), most)
    ordered = _single(index, used, selection.seed, measured)
    if len(ordered) < count:
        return [], (
            f"only {len(ordered)} of {len(used)} labeled images occur once and are not among the "
            f"evaluation images, and {count} would be held out"
        )
    chosen = sorted(ordered[-count:])
    if not any(index[position][3] for position in chosen):
        return [], f"none of the {count} images that would be held out has a label"
    return chosen, ""
