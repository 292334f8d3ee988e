"""Seconds as a function of tokens, and back."""

from math import sqrt
from typing import NamedTuple, Self


class Curve(NamedTuple):
    """Seconds `(square * n + slope) * n + start` for n tokens; no coefficient is negative."""

    square: float
    slope: float
    start: float

    def at(self, tokens: float) -> float:
        return (self.square * tokens + self.slope) * tokens + self.start

    def inverse(self, seconds: float) -> float:
        """Tokens that take so long; less than 0 if `start` alone takes longer."""
        rest = seconds - self.start
        if rest <= 0:
            return rest
        # This form of the root is exact too where `square` is 0 or almost.
        return 2 * rest / (self.slope + sqrt(self.slope * self.slope + 4 * self.square * rest))

    def plus(self, other: Self) -> "Curve":
        return Curve(self[0] + other[0], self[1] + other[1], self[2] + other[2])

    def times(self, factor: float) -> "Curve":
        return Curve(factor * self[0], factor * self[1], factor * self[2])
