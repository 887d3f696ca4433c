"""What a step may be told: the options of its verb by their names, without dashes in front.

Values are those of TOML: text, numbers, true and false, lists where an option may be given several times. What is
the same for all steps, such as data and seed, is told to the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcompress.compression.goal import closest
from onnxcompress.errors import RecipeError

Reader = Callable[[Any], Any]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """What all steps of a run are told.

    Attributes:
        fitting: File of the samples to fit with, or "none".
        deciding: File of those to decide by.
        original: The file that the whole run began with.
        metric: Figure on labelled samples; None for the usual one.
        labelled: Those samples have labels.
        seed: Same seed, same bytes.
        threads: For timing.
        jobs: Processes; None for one a processor.
        custom_ops: Shared library with custom operators.
    """

    fitting: str
    deciding: str
    original: Path
    metric: str | None = None
    seed: int = 0
    threads: int = 1
    jobs: int | None = None
    custom_ops: Path | None = None
    labelled: bool = False


# -- values ------------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _amount(value: Any) -> str:
    """A goal of a step: text or a bare number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("a number, or text as in '0.7x'")
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a number")
    return float(value)


def _whole(least: int = 1) -> Reader:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"a whole number, {least} or more")
        return value

    return read


def _names(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one for one in found):
        raise ValueError("text, or a list of texts")
    return tuple(found)


def _one_of(*known: str) -> Reader:
    def read(value: Any) -> str:
        if value not in known:
            near = closest(value, known) if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(known)}{near if 'mean' in near else ''}")
        return str(value)

    return read


_POSITIVE = _whole(1)
_TRAINING: dict[str, Reader] = {
    "epochs": _number, "steps": _POSITIVE, "batch": _POSITIVE, "accumulate": _POSITIVE, "lr": _number,
    "optimizer": _one_of("adamw", "sgd"), "weight-decay": _number, "momentum": _number, "warmup": _number,
    "schedule": _one_of("cosine", "linear", "constant", "onecycle"), "clip-norm": _number, "ema": _number,
    "label-smoothing": _number, "temperature": _number, "distill-weight": _number, "labels": _flag, "distill": _flag,
    "augment": _text, "eval-every": _POSITIVE, "patience": _POSITIVE, "target-output": _text, "teacher": _text,
    "device": _one_of("auto", "cpu", "cuda"), "precision": _one_of("auto", "float32", "bfloat16", "float16"),
}  # fmt: skip
_MERGING: dict[str, Reader] = {"calibration": _whole(2), "tolerance": _number, "dask": _text}

READERS: dict[str, dict[str, Reader]] = {
    "optimize": {
        "O": _whole(0), "only": _names, "skip": _names, "verify-each": _flag, "tolerance": _number,
        "max-constant-mb": _number, "cost": _one_of("estimate", "measured"), "allow-approximate": _number,
    },
    "quantize": {
        "ratio": _amount, "size": _amount, "max-drop": _amount, "method": _one_of("sweep", "em", "kmeans", "bgd"),
        "permute": _one_of("auto", "none"), "tune": _one_of("none", "joint", "full"), "tune-steps": _POSITIVE,
        "optimize": _flag, "keep": _names, "only": _names, "limit": _POSITIVE, "batch": _POSITIVE, "dask": _text,
    },
    "prune-width": {
        "macs": _amount, "latency": _amount, "ranking": _one_of("auto", "data", "magnitude"), "compensate": _flag,
        "round-to": _POSITIVE, "min-keep": _number, "skip": _names, "only": _names, "optimize": _flag,
        "limit": _POSITIVE, "batch": _POSITIVE,
    },
    "prune-depth": {
        "blocks": _POSITIVE, "macs": _amount, "latency": _amount, "stages": _text, "block": _names, "only": _names,
        "skip": _names, "delete": _names, "deletions": _flag, "activation": _one_of("nothing", "batchnorm"),
        "search": _one_of("auto", "ga", "exhaustive", "greedy", "random"), "population": _whole(2),
        "generations": _whole(0), "mutation": _number, "crossover": _number, "shortlist": _POSITIVE,
        "ranking": _POSITIVE, "evaluations": _POSITIVE, "supernet": _one_of("fitted", "trained"),
        "start": _one_of("fitted", "original"), "ramp": _number, "ramp-shape": _one_of("linear", "cosine"),
        "supernet-epochs": _number, "limit": _POSITIVE, **_TRAINING, **_MERGING,
    },
    "prune-scale": {
        "macs": _amount, "latency": _amount, "axes": _text, "rounds": _POSITIVE, "round-epochs": _number,
        "candidates": _POSITIVE, "finalists": _POSITIVE,
        "mixed": _whole(0), "rank-blocks": _one_of("fits", "probes"), "rank-channels": _one_of("data", "magnitude"),
        "only": _names, "skip": _names, "round-to": _POSITIVE, "min-keep": _number, "native-input": _flag,
        "limit": _POSITIVE, **_TRAINING, **_MERGING,
    },
    "finetune": {
        "freeze": _names, "train": _names, "freeze-bn": _flag, "bn-only": _flag, "feature": _names,
        "feature-weight": _number, "distill-loss": _one_of("auto", "kl", "mse"), "channels-last": _flag,
        "limit": _POSITIVE, **_TRAINING,
    },
}  # fmt: skip
VERBS = tuple(READERS)
GOALS = {
    "optimize": (),
    "quantize": ("ratio", "size", "max-drop"),
    "prune-width": ("macs", "latency"),
    "prune-depth": ("blocks", "macs", "latency"),
    "prune-scale": ("macs", "latency"),
    "finetune": (),
}
WITH_TORCH = ("prune-depth", "prune-scale", "finetune")
WITH_DATA = ("prune-depth", "prune-scale")
OF_THE_RUN = ("data", "val", "metric", "preprocess", "seed", "threads", "jobs", "custom-ops")


def check_settings(verb: str, given: Settings, where: str) -> dict[str, Any]:
    """The settings of one step, as they are given.

    Raises:
        RecipeError: A key is unknown or a value is of another kind.
    """
    known = READERS[verb]
    for key, value in given.items():
        if key in OF_THE_RUN and key not in known:
            raise RecipeError(f"{where}: {key!r} is for all steps: give it at the top of the recipe")
        if key not in known:
            raise RecipeError(f"{where}: {verb} has no setting {key!r}{closest(key, known)}")
        _read(verb, key, value, where)
    goals = [name for name in GOALS[verb] if name in given]
    if len(goals) > 1:
        raise RecipeError(f"{where}: {' and '.join(goals)} are two goals of one step: give one")
    return dict(given)


def _read(verb: str, key: str, value: Any, where: str) -> Any:
    try:
        return READERS[verb][key](value)
    except ValueError as error:
        raise RecipeError(f"{where}: {verb} {key} = {value!r}: expected {error}") from None


# -- options of the verbs ----------------------------------------------------------------------------------------------


class _Taken:
    """The settings of a step under the names of fields: only what was given, so that defaults are those of the verb."""

    def __init__(self, verb: str, settings: Settings) -> None:
        self.values = {key: _read(verb, key, value, verb) for key, value in settings.items()}

    def take(self, *keys: str, **renamed: str) -> dict[str, Any]:
        """Fields by key, dashes as underscores, and by ``field="key"``."""
        pairs = [*((key.replace("-", "_"), key) for key in keys), *renamed.items()]
        return {name: self.values[key] for name, key in pairs if key in self.values}


def options_of(verb: str, settings: Settings, shared: Shared, **more: Any) -> Any:
    """The options object of a verb.

    Raises:
        RecipeError: The settings conflict.
    """
    build = {"optimize": _optimize, "quantize": _quantize, "prune-width": _width, "prune-depth": _depth}
    return {**build, "prune-scale": _scale, "finetune": _finetune}[verb](_Taken(verb, settings), shared, more)


def _optimize(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.optimizer import OptimizeOptions

    wishes = given.take("only", "skip", "verify-each", "tolerance", "cost", "allow-approximate", level="O")
    if "max-constant-mb" in given.values:
        wishes["max_constant_bytes"] = int(given.values["max-constant-mb"] * (1 << 20))
    rest = {"threads": shared.threads, "custom_ops": shared.custom_ops, "seed": shared.seed}
    return OptimizeOptions(**{**wishes, **rest, **more})


def _quantize(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.codebook.options import QuantizeOptions, parse_ratio, parse_share
    from onnxcompress.compression.goal import goal_of

    wishes = given.take("method", "permute", "tune", "tune-steps", "optimize", "keep", "only", "limit", "batch", "dask")
    if "ratio" in given.values:
        wishes["ratio"] = parse_ratio(given.values["ratio"])
    if "size" in given.values:
        limit = goal_of({"size": given.values["size"]}).size
        assert limit is not None
        if limit.relative:
            raise RecipeError(f"quantize size = {limit.text!r}: expected bytes as in 5M; a ratio is ratio = '10x'")
        wishes["size_bytes"] = int(limit.amount)
    if "max-drop" in given.values:
        wishes["max_drop"] = parse_share(given.values["max-drop"])
        if shared.labelled:
            wishes |= {"val": shared.deciding, "metric": shared.metric}
    rest = {"jobs": shared.jobs, "custom_ops": shared.custom_ops, "seed": shared.seed}
    return QuantizeOptions(**{**wishes, **rest, "data": shared.fitting, **more})


def _width(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.channels.options import WidthOptions, parse_goal

    wishes = given.take("ranking", "compensate", "round-to", "min-keep", "skip", "only", "optimize", "limit", "batch")
    for kind in ("macs", "latency"):
        if kind in given.values:
            wishes["goal"] = parse_goal(kind, given.values[kind])  # type: ignore[arg-type]
    rest = {"threads": shared.threads, "custom_ops": shared.custom_ops, "seed": shared.seed}
    data = None if shared.fitting == "none" else shared.fitting
    return WidthOptions(**{**wishes, **rest, "data": data, **more})


def _learning(given: _Taken, shared: Shared) -> dict[str, Any]:
    """What the verbs that train have in common."""
    from onnxcompress.train.losses import LossSettings
    from onnxcompress.train.settings import TrainSettings
    from onnxcompress.train.supervision import Wishes

    losses = LossSettings(**given.take("temperature", "distill-weight", "feature-weight", smoothing="label-smoothing"))
    training = TrainSettings(
        **given.take("epochs", "steps", "batch", "accumulate", "optimizer", "weight-decay", "momentum", "schedule"),
        **given.take("warmup", "clip-norm", "eval-every", "patience", "precision", "device"),
        **given.take("channels-last"),
        **given.take(learning_rate="lr", ema_decay="ema", freeze_statistics="freeze-bn"),
        seed=shared.seed,
    )
    wishes = Wishes(
        losses=losses,
        metric=shared.metric,
        **given.take("labels", "distill", "distill-loss", output="target-output", features="feature"),
    )
    found = given.take("calibration", "augment", "tolerance", "dask", "limit")
    teacher = Path(given.values["teacher"]) if "teacher" in given.values else shared.original
    rest = {"data": shared.fitting, "val": shared.deciding, "teacher": teacher, "jobs": shared.jobs}
    # 0 leaves torch its threads, and times with one.
    threads = 0 if shared.threads == 1 else shared.threads
    return {**found, **rest, "threads": threads, "training": training, "wishes": wishes}


def _depth(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.train.depth.offers import parse_goal
    from onnxcompress.train.depth.options import DepthOptions
    from onnxcompress.train.depth.search import SearchSettings
    from onnxcompress.train.depth.training import Ramp

    wishes = given.take(
        "only", "skip", "delete", "deletions", "activation", "shortlist", "ranking", "supernet", "supernet-epochs",
        "start",
    )  # fmt: skip
    for kind in ("blocks", "macs", "latency"):
        if kind in given.values:
            wishes["goal"] = parse_goal(kind, str(given.values[kind]))  # type: ignore[arg-type]
    if "stages" in given.values:
        wishes["stages"] = tuple(part.strip() for part in given.values["stages"].split(",") if part.strip())
    wishes["named_runs"] = tuple(_run_of(text) for text in given.values.get("block", ()))
    if "ramp" in given.values or "ramp-shape" in given.values:
        wishes["ramp"] = Ramp(given.values.get("ramp", Ramp().share), given.values.get("ramp-shape", Ramp().shape))
    wishes["search"] = SearchSettings(
        **given.take("population", "generations", "mutation", "crossover", "evaluations", method="search"),
        seed=shared.seed,
    )
    return DepthOptions(**{**wishes, **_learning(given, shared), **more})


def _run_of(text: str) -> tuple[str, str]:
    first, colon, last = text.partition(":")
    if not (first and colon and last):
        raise RecipeError(f"prune-depth block = {text!r}: expected the names of its first and last node, FIRST:LAST")
    return first, last


def _scale(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.channels.options import parse_goal
    from onnxcompress.train.scale.options import ScaleOptions, parse_axes

    wishes = given.take(
        "rounds", "mixed", "round-epochs", "candidates", "finalists", "only", "skip", "round-to", "min-keep",
        depth_ranking="rank-blocks", width_ranking="rank-channels", native="native-input",
    )  # fmt: skip
    for kind in ("macs", "latency"):
        if kind in given.values:
            wishes["goal"] = parse_goal(kind, given.values[kind])  # type: ignore[arg-type]
    if "axes" in given.values:
        wishes["axes"] = parse_axes(given.values["axes"])
    return ScaleOptions(**{**wishes, **_learning(given, shared), **more})


def _finetune(given: _Taken, shared: Shared, more: dict[str, Any]) -> Any:
    from onnxcompress.train.finetune import FinetuneOptions

    learning = _learning(given, shared)
    del learning["jobs"]
    wanted = given.values.get("distill") or {"teacher", "feature"} & set(given.values)
    if shared.labelled and not wanted:
        learning["teacher"] = None  # labels are enough, and the original would be its own teacher
    wishes = given.take("bn-only", "freeze", only="train")
    return FinetuneOptions(**{**learning, **wishes, **more})
