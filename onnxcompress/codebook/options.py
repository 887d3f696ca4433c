"""What a user can ask of ``quantize``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onnxcompress.codebook.layer import Method
from onnxcompress.errors import RecipeError

Tune = Literal["none", "joint", "full"]
Permute = Literal["auto", "none"]
PERMUTES = ("auto", "none")
METHODS = ("sweep", "em", "kmeans", "bgd")
TUNES = ("none", "joint", "full")
DEFAULT_LIMIT = 256
SMALL_LIMIT = 1024  # where so many samples take no more than SMALL_BYTES
SMALL_BYTES = 16 << 20
TUNING_LIMIT = 4096  # samples that tuning makes use of by default, fewer where they are large
TUNING_BYTES = 512 << 20
HELD_OUT_SHARE = 4  # every fourth sample
DEFAULT_ERROR = 0.1  # predicted relative output error where no size is asked for


@dataclass(frozen=True)
class QuantizeOptions:
    """The user's wishes.

    Args:
        data: Calibration samples, see ``onnxcompress.data``; "none" quantizes the weights for themselves.
        ratio: Original bytes over the result's.
        size_bytes: Largest size of the result.
        max_drop: Largest drop of the metric, or of the agreement with the original without labels.
        val: Labelled samples for ``metric``.
        metric: See ``onnxcompress.validation.metrics``.
        method: "sweep" does everything, "em" stops after the codebooks, "kmeans" and "bgd" are baselines.
        permute: "auto" puts channels between layers in an order in which weights quantize better, and stores those of a
            layer in an order of its own where that is worth its bytes; "none" leaves them.
        tune: "joint" tunes all codebooks together afterwards, "full" is the paper's recipe; both need torch.
        tune_steps: Of the joint part, 32 samples each; None is what takes about two minutes on one core.
        keep: Names of weights to leave as they are, with * and ?.
        only: Names of weights to quantize, with * and ?; all when empty.
        limit: At most so many samples of ``data``; None is 256, or up to 1,024 that take 16 MiB, with ``tune`` up to
            4,096 that take 512 MiB. With ``tune`` the layers are fitted on as many as without, all others tune.
        preprocess: How images are prepared.
        batch: Samples in a run.
        input_shapes: Sizes of inputs with open axes, for samples that come without them.
        jobs: Layers at once; None for one a processor. The result does not depend on it.
        dask: Address of a Dask scheduler to quantize layers on.
        custom_ops: Shared library with custom operators.
        optimize: Run the exact passes of ``onnxcompress optimize`` first; None unless BatchNormalization is needed.
        seed: Same seed, same file.
        dry_run: Plan only.
        resume: Go on from a run that was stopped.
    """

    data: str = "none"
    ratio: float | None = None
    size_bytes: int | None = None
    max_drop: float | None = None
    val: str | None = None
    metric: str | None = None
    method: Method = "sweep"
    permute: Permute = "none"
    tune: Tune = "none"
    tune_steps: int | None = None
    keep: Sequence[str] = ()
    only: Sequence[str] = ()
    limit: int | None = None
    preprocess: str | None = None
    batch: int | None = None
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    jobs: int | None = None
    dask: str | None = None
    custom_ops: Path | None = None
    optimize: bool | None = None
    seed: int = 0
    dry_run: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        goals = [name for name in ("ratio", "size_bytes", "max_drop") if getattr(self, name) is not None]
        if len(goals) > 1:
            names = {"ratio": "--ratio", "size_bytes": "--size", "max_drop": "--max-drop"}
            raise RecipeError(f"{names[goals[0]]} and {names[goals[1]]} exclude each other: give one")
        if self.ratio is not None and not self.ratio >= 1:
            raise RecipeError(f"ratio {self.ratio:g}: must be at least 1")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise RecipeError(f"max_drop {self.max_drop:g}: must be within 0 and 1 (as in 1% or 0.01)")
        if self.max_drop is not None and self.data == "none" and self.val is None:
            raise RecipeError("--max-drop needs samples to measure the drop on: give --data or --val")
        kinds = ("method", self.method, METHODS), ("permute", self.permute, PERMUTES), ("tune", self.tune, TUNES)
        for name, value, known in kinds:
            if value not in known:
                raise RecipeError(f"{name} {value!r}: must be one of {', '.join(known)}")
        if self.tune != "none" and self.data == "none":
            raise RecipeError(f"--tune {self.tune} needs samples: give --data")
        if self.tune_steps is not None and self.tune == "none":
            raise RecipeError(f"{self.tune_steps} steps of tuning, and no tuning is asked for: give --tune joint")
        if self.metric is not None and self.val is None:
            raise RecipeError(f"metric {self.metric} needs samples of its own: give --val")

    @property
    def optimizes(self) -> bool:
        """Whether the exact passes run first."""
        return self.optimize if self.optimize is not None else self.tune != "full" and self.method != "bgd"


def parse_ratio(text: str) -> float:
    """A ratio: ``19x``, ``19``.

    Raises:
        RecipeError: It is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*[xX]?", text.strip())
    if not found:
        raise RecipeError(f"ratio {text!r}: expected a number as in 19x")
    return float(found[1])


def parse_share(text: str) -> float:
    """A share: ``1%``, ``0.01``.

    Raises:
        RecipeError: It is none.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", text.strip())
    if not found:
        raise RecipeError(f"share {text!r}: expected a number as in 1% or 0.01")
    return float(found[1]) / (100 if found[2] else 1)
