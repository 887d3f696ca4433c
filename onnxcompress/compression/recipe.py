"""A recipe: goal, samples and steps of a run in a TOML file.

    goal = "size=10x, drop=1%"      # or a table: goal = { size = "10x", drop = "1%" }
    data = "train.npz"
    val = "val.npz"

    [quantize]                      # what planned steps of a verb are told
    permute = "none"

    [[steps]]                       # these steps in this order, instead of planned ones
    verb = "prune-width"
    macs = "0.7x"

    [[steps]]
    verb = "quantize"               # without a goal of its own: what the goal of the recipe still needs

Keys are the options of ``compress`` and of the verbs without dashes in front; any other key is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.compression.goal import Goal, closest, goal_of, parse_goal
from onnxcompress.compression.settings import GOALS, VERBS, check_settings
from onnxcompress.errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Keys at the top, and what their values are.
TOP: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "val": (str,),
    "metric": (str,),
    "preprocess": (str,),
    "limit": (int,),
    "seed": (int,),
    "threads": (int,),
    "jobs": (int,),
    "custom-ops": (str,),
    "train": (bool,),
    "nearest": (bool,),
}
_WORDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Step:
    """One call of a verb.

    Attributes:
        verb: Its name.
        settings: As in a recipe.
    """

    verb: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """On one line."""
        parts = [f"{key}={_shown(value)}" for key, value in self.settings.items()]
        return " ".join([self.verb, *parts])


@dataclass(frozen=True)
class Recipe:
    """What a run is told.

    Attributes:
        goal: To be reached; None runs the steps as they are.
        wishes: Of the whole run, by key.
        settings: Of planned steps, by verb.
        steps: In this order; planned when empty.
    """

    goal: Goal | None = None
    wishes: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: Sequence[Step] = ()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: It cannot be read, is no TOML, or holds what is unknown.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecipeError(f"recipe {path}: {reason}") from error
    return parse_recipe(content, str(path))


def parse_recipe(content: str, name: str = "the recipe") -> Recipe:
    """Read the text of a recipe.

    Raises:
        RecipeError: It is no TOML, or holds what is unknown.
    """
    try:
        found = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: {error}") from error
    known = ("goal", "steps", *TOP, *VERBS)
    unknown = next((key for key in found if key not in known), None)
    if unknown is not None:
        raise RecipeError(f"{name}: unknown key {unknown!r}{closest(unknown, known)}")
    wishes = {key: _top(name, key, value) for key, value in found.items() if key in TOP}
    settings = {verb: _planned(found[verb], verb, f"{name}, [{verb}]") for verb in VERBS if verb in found}
    steps = _steps(found.get("steps", []), name)
    if steps and settings:
        raise RecipeError(
            f"{name}: [{next(iter(settings))}] is for planned steps, and the steps are given: put it there"
        )
    goal = _goal(found["goal"], name) if "goal" in found else None
    if goal is None and not steps:
        raise RecipeError(f'{name} says neither a goal nor steps: add goal = "size=10x, drop=1%", or [[steps]]')
    return Recipe(goal, wishes, settings, steps)


def _goal(value: Any, name: str) -> Goal:
    try:
        return goal_of(value) if isinstance(value, dict) else parse_goal(str(value))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error


def _top(name: str, key: str, value: Any) -> Any:
    kinds = TOP[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RecipeError(f"{name}: {key} = {value!r}: expected {_WORDS[kinds[0]]}")
    least = {"limit": 1, "jobs": 1}.get(key, 0)
    if isinstance(value, int) and value < least:
        raise RecipeError(f"{name}: {key} = {value}: expected {least} or more")
    return value


def _table(value: Any, verb: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected a table of settings, found {value!r}")
    return check_settings(verb, value, where)


def _planned(value: Any, verb: str, where: str) -> dict[str, Any]:
    table = _table(value, verb, where)
    goal = next((key for key in GOALS[verb] if key in table), None)
    if goal is not None:
        raise RecipeError(f"{where}: {goal} is planned by the goal of the recipe: leave it out, or give [[steps]]")
    return table


def _steps(value: Any, name: str) -> list[Step]:
    if not isinstance(value, list):
        raise RecipeError(f'{name}: steps: expected [[steps]] tables, or a list as in ["optimize", "quantize"]')
    steps = []
    for number, one in enumerate(value, 1):
        where = f"{name}, step {number}"
        table = {"verb": one} if isinstance(one, str) else one
        if not isinstance(table, dict) or "verb" not in table:
            raise RecipeError(f"{where}: expected a verb; there are {', '.join(VERBS)}")
        verb = table["verb"]
        if verb not in VERBS:
            raise RecipeError(f"{where}: unknown verb {verb!r}{closest(str(verb), VERBS)}")
        steps.append(Step(verb, _table({k: v for k, v in table.items() if k != "verb"}, verb, where)))
    return steps


# -- writing -----------------------------------------------------------------------------------------------------------


def recipe_text(recipe: Recipe) -> str:
    """As TOML, which ``parse_recipe`` reads."""
    lines = [] if recipe.goal is None else [f"goal = {_toml(recipe.goal.text)}"]
    lines += [f"{key} = {_toml(value)}" for key, value in recipe.wishes.items() if value is not None]
    tables = [(f"[{verb}]", settings) for verb, settings in recipe.settings.items()]
    tables += [("[[steps]]", {"verb": step.verb, **step.settings}) for step in recipe.steps]
    for header, table in tables:
        lines += ["", header, *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    # A basic string of TOML escapes as JSON does, and DEL as well.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
