"""Types of options, and what several options of one name mean together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxcompress.errors import RecipeError

LARGEST_SIZE = (1 << 31) - 1
MOST_THREADS = 4096


class Number(click.FloatRange):
    """A float in a range, infinity and nan excluded: nan is within no limit and above none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class FilePath(click.Path):
    """A path; an empty one, as an unset variable gives it, is not the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes: 1048576, 10K, 5M, 1G; a bare number counts ``unit`` bytes each."""

    name = "size"

    def __init__(self, unit: int = 1) -> None:
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        try:
            number = float(text[:-1] if factor else text) * (factor or self.unit)
        except ValueError:
            self.fail(f"{value!r} is not a size; expected bytes as 10K, 5M or 1G", param, ctx)
        if not 0 <= number < 1 << 62:
            self.fail(f"{value!r} is out of range", param, ctx)
        return int(number)


class InputShape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``NAME:1,3,224,224``; names may hold colons, the last one counts; -1 or ? leaves an axis dynamic."""

    name = "name:dims"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, colon, dims = str(value).rpartition(":")
        try:
            shape = (
                tuple(-1 if dim.strip() in ("?", "") else int(dim) for dim in dims.replace("x", ",").split(","))
                if dims
                else ()
            )
        except ValueError:
            self.fail(f"{value!r}: expected NAME:1,3,224,224", param, ctx)
        if not colon or not name:
            self.fail(f"{value!r}: expected NAME:1,3,224,224", param, ctx)
        if any(size > LARGEST_SIZE for size in shape):
            self.fail(f"{value!r}: a size is above {LARGEST_SIZE}", param, ctx)
        return name, shape


def pass_names(values: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for value in values for name in value.split(",") if name.strip())
    if values and not names:
        raise RecipeError("a list of passes is empty: name one, or leave the option out")
    return names


def shapes_by_name(given: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    shapes = dict(given)
    for name, shape in given:
        if shapes[name] != shape:
            raise RecipeError(f"--input-shape gives {name!r} both {list(shape)} and {list(shapes[name])}")
    return shapes
