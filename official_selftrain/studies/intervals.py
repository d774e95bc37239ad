"""Means, deviations and intervals over the seeds of a study."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Spread:
    """Numbers of several seeds.

    Attributes:
        values: one per seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean; NaN without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (of a sample); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t; None for fewer than two."""
        if self.deviation is None:
            return None
        count = len(self.values)
        half = t_quantile(count - 1) * self.deviation / math.sqrt(count)
        return self.mean - half, self.mean + half

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies above or below 0, else 0."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return (low > 0) - (high < 0)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's t stays within, on both sides of 0, with a probability.

    Args:
        freedom: degrees of freedom, 1 or more.
        confidence: the probability, in (0, 1).
    """
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return high


def t_within(t: float, freedom: int) -> float:
    """The probability that Student's t lies in -t to t.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def paired(first: Sequence[float | None], second: Sequence[float | None]) -> Spread:
    """The differences first - second of the seeds that have both numbers."""
    pairs = zip(first, second, strict=True)
    return Spread(tuple(a - b for a, b in pairs if a is not None and b is not None))
