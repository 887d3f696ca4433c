"""Integer polynomials in unknowns: what a size is as long as its number is not known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Monomial = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A polynomial: (monomial, coefficient) pairs, sorted; a monomial is a sorted tuple of unknowns, () for 1.

    Equal polynomials are equal for every value of the unknowns; so are different ones sometimes.
    """

    terms: tuple[tuple[Monomial, int], ...] = ()

    @staticmethod
    def of(value: int) -> Size:
        return Size((((), int(value)),)) if value else Size()

    @staticmethod
    def unknown(number: int) -> Size:
        return Size((((number,), 1),))

    @property
    def known(self) -> int | None:
        """The number, when it is one."""
        if not self.terms:
            return 0
        return self.terms[0][1] if self.terms[-1][0] == () else None

    def __add__(self, other: Size) -> Size:
        return _collect([*self.terms, *other.terms])

    def __neg__(self) -> Size:
        return Size(tuple((monomial, -k) for monomial, k in self.terms))

    def __sub__(self, other: Size) -> Size:
        return self + -other

    def __mul__(self, other: Size) -> Size:
        return _collect([(tuple(sorted(m + n)), j * k) for m, j in self.terms for n, k in other.terms])

    def divided_by(self, divisor: Size) -> Size | None:
        """The exact quotient when ``divisor`` has one term and divides every term; None otherwise."""
        if len(divisor.terms) != 1:
            return None
        ((below, j),) = divisor.terms
        quotient = []
        for monomial, k in self.terms:
            rest = list(monomial)
            for unknown in below:
                if unknown not in rest:
                    return None
                rest.remove(unknown)
            if k % j:
                return None
            quotient.append((tuple(rest), k // j))
        return _collect(quotient)


def _collect(terms: Iterable[tuple[Monomial, int]]) -> Size:
    sums: dict[Monomial, int] = {}
    for monomial, k in terms:
        sums[monomial] = sums.get(monomial, 0) + k
    return Size(tuple(sorted((m, k) for m, k in sums.items() if k)))


def product(sizes: Iterable[Size]) -> Size:
    """The product; 1 for none."""
    return math.prod(sizes, start=Size.of(1))
