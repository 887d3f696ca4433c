"""Recipes: read, written, and refused with what was meant."""

from __future__ import annotations

import importlib

import click
import pytest

from onnxcompress.compression.goal import parse_goal
from onnxcompress.compression.options import CompressOptions, options_from
from onnxcompress.compression.recipe import TOP, Recipe, Step, parse_recipe, read_recipe, recipe_text
from onnxcompress.compression.settings import OF_THE_RUN, READERS, Shared, options_of
from onnxcompress.errors import RecipeError

WHOLE = """
goal = { size = "10x", drop = "1%" }
data = "train.npz"
limit = 100
train = false

[[steps]]
verb = "prune-width"
macs = "0.7x"
skip = ["head*", "a\\"b"]
compensate = false

[[steps]]
verb = "quantize"
tune-steps = 40
tune = "joint"
"""
# Options that say where, how loud, or what only to show; teachers and places are those of the run.
NOT_A_SETTING = {
    "output", "in-place", "report", "json", "quiet", "dry-run", "resume", "list-passes", "list-groups", "list-blocks",
    "check", "latency", "input-shape", "batch", "checkpoint", "checkpoint-every", "tensorboard", "help",
}  # fmt: skip


def test_a_recipe_is_read():
    found = parse_recipe(WHOLE)
    assert found.goal == parse_goal("size=10x, drop=1%")
    assert found.wishes == {"data": "train.npz", "limit": 100, "train": False}
    assert [step.verb for step in found.steps] == ["prune-width", "quantize"]
    assert found.steps[0].settings == {"macs": "0.7x", "skip": ["head*", 'a"b'], "compensate": False}


def test_what_is_written_is_read_again():
    found = parse_recipe(WHOLE)
    assert parse_recipe(recipe_text(found)) == found
    planned = Recipe(parse_goal("macs=0.5x"), {"data": "ä\u007f\\"}, {"quantize": {"permute": "none"}})
    again = parse_recipe(recipe_text(planned))
    assert (again.goal, again.wishes, again.settings) == (planned.goal, planned.wishes, planned.settings)


def test_steps_may_be_named_in_a_list():
    found = parse_recipe('goal = "size=4x"\nsteps = ["optimize", {verb = "quantize", ratio = 4}]')
    assert found.steps == [Step("optimize"), Step("quantize", {"ratio": 4})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gaol = 'size=2x'", "unknown key 'gaol'; did you mean 'goal'?"),
        ("goal = 'size=2x'\nprune_width = {}", "did you mean 'prune-width'?"),
        ("goal = 'sice=2x'", "did you mean 'size'?"),
        ("goal = 'size=2x'\nlimit = '9'", "expected a whole number"),
        ("goal = 'size=2x'\nlimit = 0", "expected 1 or more"),
        ("goal = 'size=2x'\nlimit = true", "expected a whole number"),
        ("goal = 'size=2x'\n[quantize]\ntunes = 'joint'", "quantize has no setting 'tunes'; did you mean 'tune'?"),
        ("goal = 'size=2x'\n[quantize]\ntune_steps = 4", "did you mean 'tune-steps'?"),
        ("goal = 'size=2x'\n[quantize]\ntune = 'joined'", "did you mean 'joint'?"),
        ("goal = 'size=2x'\n[quantize]\ntune-steps = 1.5", "expected a whole number, 1 or more"),
        ("goal = 'size=2x'\n[quantize]\nseed = 1", "give it at the top of the recipe"),
        ("goal = 'size=2x'\n[quantize]\nratio = '3x'", "planned by the goal"),
        ("goal = 'size=2x'\nquantize = 4", "expected a table"),
        ("goal = 'size=2x'\nsteps = ['prune-with']", "step 1: unknown verb 'prune-with'; did you mean 'prune-width'?"),
        ("goal = 'size=2x'\nsteps = [{ratio = 3}]", "step 1: expected a verb"),
        ("goal = 'size=2x'\nsteps = 'optimize'", "expected [[steps]] tables"),
        ("steps = [{verb = 'quantize', ratio = 3, size = '4K'}]", "two goals of one step"),
        ("goal = 'size=2x'\nsteps = ['optimize']\n[quantize]\ntune = 'none'", "is for planned steps"),
        ("data = 'x.npz'", "neither a goal nor steps"),
        ("goal = 'size=2x", "the recipe: Expected"),
    ],
)
def test_a_near_miss_is_refused_with_the_way_out(text, said):
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert said in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml"):
        read_recipe(tmp_path / "none.toml")


def options_of_verb(verb: str) -> set[str]:
    command: click.Command = importlib.import_module(f"onnxcompress.cli.{verb.replace('-', '_')}").command
    names = [name for option in command.params for name in option.opts if name.startswith("-")]
    return {name.lstrip("-") for name in names if name.startswith("--") or name == "-O"}


@pytest.mark.parametrize("verb", READERS)
def test_settings_are_the_options_of_the_verb(verb):
    options = options_of_verb(verb)
    assert set(READERS[verb]) <= options
    assert options - set(READERS[verb]) <= NOT_A_SETTING | set(OF_THE_RUN)


def test_wishes_are_the_options_of_compress():
    assert set(TOP) <= options_of_verb("compress")


@pytest.mark.parametrize(
    ("verb", "settings", "found"),
    [
        ("optimize", {"O": 2, "skip": "fold-constants"}, {"level": 2, "skip": ("fold-constants",)}),
        ("quantize", {"size": "5M", "keep": ["a"]}, {"size_bytes": 5 << 20, "keep": ("a",), "data": "fit.npz"}),
        ("quantize", {"ratio": "3x"}, {"ratio": 3.0, "seed": 7}),
        ("prune-width", {"round-to": 4, "compensate": False}, {"round_to": 4, "compensate": False}),
    ],
)
def test_settings_reach_the_options_of_the_verb(verb, settings, found):
    options = options_of(verb, settings, SHARED)
    assert {key: getattr(options, key) for key in found} == found


def test_settings_reach_the_options_of_verbs_that_train():
    pytest.importorskip("torch")
    settings = {"macs": "0.5x", "stages": "supernet,search", "lr": 0.1, "search": "ga", "temperature": 3.0}
    options = options_of("prune-depth", settings, SHARED)
    assert options.goal.amount == 0.5 and options.stages == ("supernet", "search")
    assert options.training.learning_rate == 0.1 and options.search.method == "ga"
    assert options.wishes.losses.temperature == 3.0 and options.wishes.losses.distill_weight == 0.5
    assert (options.data, options.val, options.training.seed) == ("fit.npz", "deciding.npz", 7)
    scale = options_of("prune-scale", {"macs": "0.5x", "axes": "d,w", "native-input": True}, SHARED)
    assert scale.axes == ("depth", "width") and scale.native


def test_the_command_line_wins_over_the_recipe():
    recipe = parse_recipe(WHOLE)
    options = options_from(recipe, "size=4x", data="other.npz", limit=None)
    assert options.goal == parse_goal("size=4x") and options.data == "other.npz" and options.limit == 100
    assert options.steps == recipe.steps and options.train is False


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({}, "nothing to reach"),
        ({"goal": parse_goal("size=2x, drop=1%")}, "give --data or --val"),
        ({"goal": parse_goal("size=2x"), "metric": "top1"}, "give --val"),
    ],
)
def test_wishes_that_conflict_are_refused(wishes, said):
    with pytest.raises(RecipeError, match=said):
        CompressOptions(**wishes)


SHARED = Shared("fit.npz", "deciding.npz", importlib.import_module("pathlib").Path("m.onnx"), seed=7)
