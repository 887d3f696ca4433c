"""``quantize``: codebook weights for a model, within a byte budget or a drop of quality.

0. graph       the exact passes of ``optimize``; every comparison stays with the file that was given
1. menus       every layer's forms, their errors and what they do to the outputs (``planning.py``)
2. plan        a form for each layer, within the bytes asked for, counted to the byte
3. layers      in execution order, each aimed at the float net on the input that the quantized net gives it
4. file        written, reloaded, measured on samples that no fit has used, then renamed into place

A run that is stopped goes on where it was: menus and layers are kept beside the output until it is there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcompress.codebook.augmentation import cuts_for
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, Statistics
from onnxcompress.codebook.damage import DamageMeter
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.evaluation import Judge, Quality
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import Layer, Refusal, find_layers
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.codebook.narrowing import narrow_layer
from onnxcompress.codebook.offers import Form, form_text
from onnxcompress.codebook.options import (
    DEFAULT_ERROR,
    DEFAULT_LIMIT,
    HELD_OUT_SHARE,
    TUNING_BYTES,
    TUNING_LIMIT,
    QuantizeOptions,
)
from onnxcompress.codebook.planning import BudgetError, Item, Plan, Planner, finish, make_menus
from onnxcompress.codebook.pooling import fit_pools
from onnxcompress.codebook.preparing import prepare
from onnxcompress.codebook.resuming import Checkpoint, feeds_digest, files_digest
from onnxcompress.codebook.sharing import SharedCodebook
from onnxcompress.codebook.shaving import Shaving
from onnxcompress.codebook.statistics import Calibration, split_samples
from onnxcompress.codebook.workers import Workers
from onnxcompress.data import Dataset, InputSpec, load_data
from onnxcompress.errors import DataError, QuantizationError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.measure import size_on_disk
from onnxcompress.model_io import StagedFile, external_files, load, read_proto
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.judge import input_specs
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

Stored = QuantizedLayer | Int8Layer | Float16Layer
BATCH = 4
MENU_BATCHES = 12  # of the calibration samples, for the estimates
MENU_ROWS_PER_INPUT = 4
DAMAGE_SAMPLES = 8
MAX_TRIALS = 6  # files made on the way to a drop
SIZE_UNKNOWN = 128  # of an open axis, for an estimate
TUNING_JUDGES = 8  # one in so many of the samples for tuning, up to MAX_JUDGES, decides what is kept
MAX_JUDGES = 256
NEAR_ENOUGH = 0.7  # of the drop that is allowed, used up


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: "estimating", "quantizing", "measuring", ...
        layer: What was done last; "" at the beginning.
        done: Layers done in this step.
        total: Layers of this step.
    """

    step: str
    layer: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class LayerRow:
    """One layer of the result.

    Attributes:
        name: Of the weight.
        kind: Operator that reads it.
        weights: How many numbers it holds.
        form: How it is stored, as text.
        bits_per_weight: All of its bytes, nodes included.
        size_bytes: The same in bytes.
        error: Relative error of its output on held-out samples against the float net, errors of the layers before it
            included; on the fitted samples where none are held out, on the weight without data; None where kept.
        predicted_damage: Its part of the outputs' predicted relative squared error.
    """

    name: str
    kind: str
    weights: int
    form: str
    bits_per_weight: float
    size_bytes: int
    error: float | None
    predicted_damage: float


@dataclass
class QuantizeResult:
    """What ``quantize`` did.

    Attributes:
        source: Name of the input.
        output: Where the result is; None after a dry run.
        before_bytes: Of the original, external data included.
        after_bytes: Of the result; predicted after a dry run.
        layers: What became of each layer.
        refusals: Weights that stay as they are, and why.
        quality: Measured with the file; None after a dry run.
        predicted_error: Relative error of the outputs as planned.
        calibration_samples: How many were used to fit; 0 without data.
        held_out_samples: How many were not, and judged.
        seconds: Wall time.
        notes: What the user should know, one line each.
    """

    source: str
    output: Path | None
    before_bytes: int
    after_bytes: int
    layers: list[LayerRow]
    refusals: list[Refusal]
    quality: Quality | None
    predicted_error: float
    calibration_samples: int
    held_out_samples: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Original bytes over the result's."""
        return self.before_bytes / self.after_bytes

    @property
    def unchanged(self) -> bool:
        """Whether the result is a copy."""
        return self.before_bytes == self.after_bytes and all(row.form == "keep" for row in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "input": self.source,
            "output": None if self.output is None else str(self.output),
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "ratio": round(self.ratio, 3),
            "unchanged": self.unchanged,
            "predicted_error": _finite(self.predicted_error),
            "quality": None if self.quality is None else self.quality.as_dict(),
            "calibration_samples": self.calibration_samples,
            "held_out_samples": self.held_out_samples,
            "seconds": round(self.seconds, 3),
            "layers": [{key: _finite(value) for key, value in asdict(row).items()} for row in self.layers],
            "refused": [asdict(refusal) for refusal in self.refusals],
            "notes": self.notes,
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def quantize(
    model: str | Path,
    output: str | Path | None,
    options: QuantizeOptions | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    runtime: Runtime | None = None,
    **wishes: Any,
) -> QuantizeResult:
    """Store the weights of a model in codebooks.

    Args:
        model: Path of the model.
        output: Where to write; it appears only when complete and measured. None for a dry run.
        options: The wishes; ``wishes`` are the same by keyword.
        progress: Called at each step and after each layer.
        runtime: Where models run; one of its own when None.

    Returns:
        What became of each layer, and what the file is worth.

    Raises:
        ModelError: The model is missing, damaged, or not to be run.
        DataError: The samples are missing or do not fit.
        RecipeError: The wishes conflict.
        QuantizationError: The size cannot be reached; names the nearest.
        OutputError: The output cannot be written.
    """
    chosen = options or QuantizeOptions(**wishes)
    if output is None and not chosen.dry_run:
        raise RecipeError("no output is named: give one, or ask for a dry run")
    with contextlib.ExitStack() as stack:
        runtime = runtime or stack.enter_context(Runtime(timeout_s=600.0))
        return _Job(Path(model), None if output is None else Path(output), chosen, runtime, progress, stack).run()


def checkpoint_folder(output: Path) -> Path:
    """Where a run keeps its work."""
    return output.with_name(f"{output.name}.quantize")


class _Job:
    """One model on its way; holds what the steps share."""

    def __init__(
        self,
        path: Path,
        output: Path | None,
        options: QuantizeOptions,
        runtime: Runtime,
        progress: Callable[[Progress], None] | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.started = time.monotonic()
        self.path, self.output, self.options, self.runtime = path, output, options, runtime
        self.report = progress or (lambda step: None)
        if options.tune != "none":
            _tuner()  # asked for before the work
        self.notes: list[str] = []
        self.report(Progress("reading"))
        self.proto = read_proto(path)
        sources = list(external_files(self.proto, path.parent))
        if output is not None:
            check_target(output, sources)
        self.original_bytes = size_on_disk(path, load(path))
        self.base = self._prepared(stack)  # what is quantized, and what layers are compared with
        self.graph = load(self.base)
        self.base_bytes = size_on_disk(self.base, self.graph)
        self.layers, self.refusals = self._choose(*find_layers(self.graph))
        self.run_options = RunOptions("off", custom_ops=options.custom_ops)
        self.samples, self.more_samples = self._samples()
        fit, held_out = self._split()
        self.fit, self.held_out = fit, held_out
        self.labelled = None if options.val is None else self._load(options.val, None)
        self.metric = (options.metric or "top1") if options.val is not None else None
        if self.metric is not None and self.labelled is not None and self.labelled.labels is None:
            raise DataError(f"--val {options.val} has no labels: {self.metric} needs them")
        self.judge = Judge(
            path, held_out or self._made_up(), runtime, metric=self.metric, labelled=self.labelled,
            custom_ops=options.custom_ops,
        )  # fmt: skip
        self.workers = stack.enter_context(Workers(options.jobs, options.dask))
        self.checkpoint = Checkpoint(
            None if output is None or options.dry_run else checkpoint_folder(output),
            {
                "model": files_digest([path, *sources]),
                "optimized model": files_digest([self.base, *external_files(read_proto(self.base), self.base.parent)]),
                "samples": feeds_digest([*self.samples, *self.more_samples]),
                "options": self._identity(),
            },
            resume=options.resume,
        )

    def _identity(self) -> dict[str, Any]:
        """The wishes that what is kept depends on; what depends on the plan carries its name."""
        chosen = self.options
        return {"method": chosen.method, "seed": chosen.seed, "keep": list(chosen.keep), "only": list(chosen.only)}

    # -- reading -----------------------------------------------------------------------------------------------------

    def _prepared(self, stack: contextlib.ExitStack) -> Path:
        """The model as the passes of ``optimize`` leave it, or the model itself."""
        if not self.options.optimizes:
            if self.options.optimize is None:
                self.notes.append("not optimized first: training with statistics of batches needs BatchNormalization")
            return self.path
        self.report(Progress("optimizing"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-")))
        wishes: dict[str, Any] = {"custom_ops": self.options.custom_ops, "seed": self.options.seed}
        prepared = prepare(self.path, folder, self.runtime, **wishes)
        if prepared.note:
            self.notes.append(prepared.note)
        return prepared.path

    def _choose(self, layers: list[Layer], refusals: list[Refusal]) -> tuple[list[Layer], list[Refusal]]:
        """The layers that the user lets us change."""
        for pattern in (*self.options.keep, *self.options.only):
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                raise RecipeError(
                    f"{pattern!r} names no layer of {self.path}; --dry-run lists them, named as after optimizing"
                )
        kept, refused = [], list(refusals)
        for layer in layers:
            if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in self.options.keep):
                refused.append(Refusal(layer.name, "--keep names it"))
            elif self.options.only and not any(fnmatch.fnmatchcase(layer.name, p) for p in self.options.only):
                refused.append(Refusal(layer.name, "--only does not name it"))
            else:
                kept.append(layer)
        return kept, refused

    def _load(self, spec: str, limit: int | None) -> Dataset:
        specs = input_specs(self.proto)
        unknown = set(self.options.input_shapes) - {one.name for one in specs}
        if unknown:
            names = ", ".join(repr(one.name) for one in specs)
            raise RecipeError(f"--input-shape names {sorted(unknown)[0]!r}; the model's inputs are {names}")
        fixed = [_with_sizes(one, self.options.input_shapes.get(one.name)) for one in specs]
        return load_data(spec, inputs=fixed, limit=limit, preprocess=self.options.preprocess, seed=self.options.seed)

    def _samples(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Those to fit and judge layers with, and more for tuning."""
        if self.options.data == "none":
            self.notes.append(
                "without data nothing knows which weights matter: the error is several times that with 32 samples"
            )
            return [], []
        self.report(Progress("reading samples"))
        dataset = self._load(self.options.data, self._limit())
        size = self.options.batch or min(BATCH, max(1, len(dataset) // 8))
        feeds = [feed for feed, _ in dataset.batches(size)]
        if len(dataset) < 32:
            self.notes.append(f"{len(dataset)} samples are few to calibrate with: 32 to 1,024 are better")
        most = len(feeds) if self.options.tune == "none" else max(2, DEFAULT_LIMIT // size)
        order = np.random.default_rng(self.options.seed).permutation(len(feeds))
        fitted = sorted(map(int, order[:most]))
        return [feeds[i] for i in fitted], [feeds[i] for i in sorted(map(int, order[most:]))]

    def _limit(self) -> int:
        if self.options.limit is not None:
            return self.options.limit
        if self.options.tune == "none":
            return DEFAULT_LIMIT
        shapes = [self.options.input_shapes.get(one.name, one.shape) for one in input_specs(self.proto)]
        known = [
            [size if isinstance(size, int) and size > 0 else SIZE_UNKNOWN for size in shape[1:]] for shape in shapes
        ]
        return max(DEFAULT_LIMIT, min(TUNING_LIMIT, TUNING_BYTES // (4 * sum(map(math.prod, known)) or 1)))

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        numbers = split_samples(len(self.samples), 1 / HELD_OUT_SHARE, self.options.seed)
        return [self.samples[i] for i in numbers["fit"]], [self.samples[i] for i in numbers["held_out"]]

    def _calibration_wishes(self) -> dict[str, Any]:
        return {"held_out_fraction": 1 / HELD_OUT_SHARE, "options": self.run_options, "seed": self.options.seed}

    def _made_up(self) -> list[dict[str, Any]]:
        """Inputs to compare files on where there are no samples to spare."""
        if self.samples:
            return self.samples

        def run(feed: Mapping[str, Any]) -> list[Any]:
            return run_model(self.runtime, for_runtime(self.path), [feed], self.run_options)[0]

        shapes = {name: [*shape] for name, shape in self.options.input_shapes.items()}
        return list(check_samples(self.proto, run, seed=self.options.seed, shapes=shapes))

    # -- the way -----------------------------------------------------------------------------------------------------

    def run(self) -> QuantizeResult:
        """Do it all."""
        try:
            result = self._run()
        except QuantizationError:
            self.checkpoint.remove()  # done, if without success
            raise
        self.checkpoint.remove()
        return result

    def _run(self) -> QuantizeResult:
        planner = self._planner()
        if self.options.dry_run:
            plan = self._first_plan(planner)
            return self._result(plan, None, None, None, plan.size_bytes)
        assert self.output is not None
        if self.options.max_drop is not None:
            result = self._within_drop(planner, self.options.max_drop)
        else:
            plan = self._first_plan(planner)
            made, plan = self._quantize(planner, plan, lambda: self._first_plan(planner))
            with self._staged(made, plan.shaving) as staged:
                quality = self._judge(staged)
                self._check_budget(staged.size_bytes)
                result = self._result(plan, made, quality, self.output, staged.size_bytes)
                staged.commit()
        return result

    def _planner(self) -> Planner:
        feeds = self.fit[:MENU_BATCHES]
        wishes = {**self._calibration_wishes(), "held_out_fraction": 0.0, "rows_per_input": MENU_ROWS_PER_INPUT}
        self.report(Progress("estimating", "", 0, len(self.layers)))
        done = 0

        def finished(layer: Layer) -> None:
            nonlocal done
            done += 1
            self.report(Progress("estimating", layer.name, done, len(self.layers)))

        with Calibration(self.graph, self.layers, feeds, runtime=self.runtime, **wishes) as calibration:
            menus = make_menus(
                self.graph,
                self.layers,
                calibration,
                self._meter(),
                self.workers,
                self.checkpoint,
                method=self.options.method,
                seed=self.options.seed,
                done=finished,
            )
        name = self.path.name if self.output is None else self.output.name
        return Planner(self.base, self.original_bytes, self.layers, menus, name, self.base_bytes)

    def _meter(self) -> DamageMeter | None:
        if not self.layers:
            return None
        feeds = self.held_out or self.samples or self._made_up()
        few: list[dict[str, Any]] = []
        for feed in feeds:
            few.append(feed)
            if sum(_batch_of(one) for one in few) >= DAMAGE_SAMPLES:
                break
        return DamageMeter(self.graph, self.layers, few, self.runtime, self.options.custom_ops)

    def budget_bytes(self) -> int | None:
        """What was asked for."""
        if self.options.ratio is not None:
            return math.floor(self.original_bytes / self.options.ratio)
        return self.options.size_bytes

    def _first_plan(self, planner: Planner) -> Plan:
        budget = self.budget_bytes()
        if budget is None:
            return planner.for_damage(DEFAULT_ERROR**2)
        return planner.within(budget)

    def _check_budget(self, size_bytes: int) -> None:
        budget = self.budget_bytes()
        if budget is not None and size_bytes > budget:
            raise BudgetError(f"the file has {size_bytes} bytes, allowed {budget}: ask for {size_bytes}")

    def _within_drop(self, planner: Planner, limit: float) -> QuantizeResult:
        """Look for the smallest file whose drop is allowed; a drop grows about as the root of the damage."""
        assert self.output is not None
        damage, good, bad = DEFAULT_ERROR**2, 0.0, math.inf
        best: tuple[StagedFile, QuantizeResult] | None = None
        nearest: tuple[float, int] | None = None
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_TRIALS):
                plan = planner.for_damage(damage)
                replan = functools.partial(planner.for_damage, damage)
                made, plan = self._quantize(planner, plan, replan)
                staged = stack.enter_context(self._staged(made, plan.shaving))
                quality = self._judge(staged)
                logger.info("%s bytes: %s drops by %.4f", staged.size_bytes, quality.criterion, quality.drop)
                if quality.drop <= limit:
                    good = damage
                    if best is None or staged.size_bytes < best[0].size_bytes:
                        best = staged, self._result(plan, made, quality, self.output, staged.size_bytes)
                    if quality.drop >= NEAR_ENOUGH * limit and quality.drop > 0:
                        break
                else:
                    bad = damage
                    if nearest is None or quality.drop < nearest[0]:
                        nearest = quality.drop, staged.size_bytes
                if plan.keeps_all or bad <= good * 1.3:
                    break
                damage = _next_damage(damage, quality.drop, limit, good, bad)
            if best is None:  # the original itself drops by nothing
                plan = planner.within(planner.original_bytes)
                made, plan = self._quantize(planner, plan, lambda: plan)
                staged = stack.enter_context(self._staged(made, plan.shaving))
                best = staged, self._result(plan, made, self._judge(staged), self.output, staged.size_bytes)
                if nearest is not None:
                    drop, size = nearest
                    self.notes.append(f"the nearest smaller file, {size} bytes, drops by {drop:.2%}")
            staged, result = best
            staged.commit()
        return replace(result, seconds=time.monotonic() - self.started, notes=self.notes)

    # -- layers ------------------------------------------------------------------------------------------------------

    def _quantize(
        self, planner: Planner, plan: Plan, replan: Callable[[], Plan]
    ) -> tuple[dict[str, tuple[Stored, float | None]], Plan]:
        """All layers of a plan, in execution order; a form that turns out impossible is planned around."""
        while True:
            try:
                return self._quantize_once(plan), plan
            except _Impossible as found:
                self.notes.append(f"{found.name} cannot be stored as {form_text(found.form)}: {found.reason}")
                planner.exclude(found.name, found.form)
                plan = replan()

    def _quantize_once(self, plan: Plan) -> dict[str, tuple[Stored, float | None]]:
        changed = [layer for layer in self.layers if plan.forms[layer.name] != "keep"]
        made: dict[str, tuple[Stored, float | None]] = {}
        if not changed:
            return made
        numbers = {layer.name: index for index, layer in enumerate(self.layers)}
        self.report(Progress("quantizing", "", 0, len(changed)))
        wishes = self._calibration_wishes()
        shared = self._shared_codebooks(plan)
        cuts = cuts_for(sum(map(_batch_of, self.samples)))
        with Calibration(self.graph, changed, self.samples, runtime=self.runtime, cuts=cuts, **wishes) as calibration:
            for stage in calibration.stages():
                waiting = []
                for layer in stage:
                    name = f"{plan.digest}-{numbers[layer.name]:04d}"
                    kept = self.checkpoint.load_layer(name)
                    error = self.checkpoint.load(name)
                    if kept is not None and error is not None and _form_of(kept) == plan.forms[layer.name]:
                        made[layer.name] = kept, error["error"]
                        self.report(Progress("quantizing", layer.name, len(made), len(changed)))
                    else:
                        waiting.append(layer)

                def finish(number: int, found: Any, waiting: list[Layer] = waiting) -> None:
                    layer = waiting[number]
                    if isinstance(found, str):
                        raise _Impossible(layer.name, plan.forms[layer.name], found)
                    made[layer.name] = found
                    name = f"{plan.digest}-{numbers[layer.name]:04d}"
                    self.checkpoint.save_layer(name, found[0])
                    self.checkpoint.save(name, {"error": found[1]})
                    self.report(Progress("quantizing", layer.name, len(made), len(changed)))

                tasks = (
                    (
                        layer.matrix(),
                        layer.bias(),
                        calibration.statistics(layer),
                        calibration.statistics(layer, "held_out"),
                        plan.forms[layer.name],
                        {
                            "seed": self.options.seed * 100_003 + numbers[layer.name],
                            "method": self.options.method,
                            "correct_bias": layer.has_bias,
                            "shared": shared.get(layer.name),
                        },
                    )
                    for layer in waiting
                )
                self.workers.map(_quantize_task, tasks, finish)
                for layer in stage:
                    stored = made[layer.name][0]
                    calibration.replace(layer, stored.decode(), stored.bias if layer.has_bias else None)
        return made

    def _shared_codebooks(self, plan: Plan) -> dict[str, SharedCodebook]:
        importance = {name: item.damage / item.error**2 if item.error else 0.0 for name, item in plan.items.items()}
        wishes = {**self._calibration_wishes(), "runtime": self.runtime}
        return fit_pools(self.graph, self.layers, plan.forms, importance, self.fit[:MENU_BATCHES], **wishes)

    def _staged(self, made: Mapping[str, tuple[Stored, float | None]], shaving: Shaving) -> StagedFile:
        """Write the file beside its place, with what was made in it."""
        assert self.output is not None
        self.report(Progress("writing"))
        graph = load(self.base)
        if made:
            for layer in find_layers(graph)[0]:
                if layer.name in made:
                    encode(graph, layer, _without_idle_bias(layer, made[layer.name][0]))
            if self.options.tune != "none":
                self._tune(graph)
            finish(graph, shaving)
        return StagedFile(graph, self.output)

    def _tune(self, graph: Graph) -> None:
        tune = _tuner()
        self.report(Progress("tuning"))

        def step(state: Any) -> None:
            self.report(Progress("tuning", "", state.step, state.total))

        # Those that the report is about decide only where there are no others.
        count = min(len(self.more_samples) // TUNING_JUDGES, MAX_JUDGES // max(1, _batch_of(self.samples[0])))
        deciding, others = self.more_samples[:count], self.more_samples[count:]
        fit, judged = [*self.fit, *others], deciding or self.held_out
        done = tune(graph, fit, judged, reference_model=self.base, mode=self.options.tune, progress=step)
        self.notes.append(
            f"tuned for {done.steps} steps on {sum(map(_batch_of, fit))} samples: relative error {done.before:.4f} -> "
            f"{done.after:.4f} on {sum(map(_batch_of, judged))} others; errors of layers are those before"
        )

    def _judge(self, staged: StagedFile) -> Quality:
        """Check and measure the written file."""
        self.report(Progress("measuring"))
        changes = interface_differences(self.proto, read_proto(staged.path))
        if changes:
            raise QuantizationError(f"the interface of {self.path} changed: {changes[0]}")
        if _checks(self.path):
            try:
                onnx.checker.check_model(str(staged.path))
            except onnx.checker.ValidationError as error:
                raise QuantizationError(f"the result is no valid model: {str(error).splitlines()[0]}") from error
        return self.judge.judge(staged.path)

    def _result(
        self,
        plan: Plan,
        made: Mapping[str, tuple[Stored, float | None]] | None,
        quality: Quality | None,
        output: Path | None,
        size_bytes: int,
    ) -> QuantizeResult:
        rows = [_row(layer, plan.items[layer.name], made) for layer in self.layers]
        if made is not None and plan.keeps_all:
            copy = "nothing could be gained: the output is a copy of the input"
            self.notes.append(copy if self.base == self.path else "no weight is quantized: optimizing was enough")
        if plan.shaving == Shaving.NAMES:
            self.notes.append("to save bytes, tensors between nodes have short names; nodes and weights keep theirs")
        if plan.shaving == Shaving.PACKED:
            self.notes.append("to save bytes, weights are decoded together and have short names; nodes keep theirs")
        return QuantizeResult(
            source=str(self.path),
            output=output,
            before_bytes=self.original_bytes,
            after_bytes=size_bytes,
            layers=rows,
            refusals=self.refusals,
            quality=quality,
            predicted_error=math.sqrt(plan.damage),
            calibration_samples=sum(map(_batch_of, self.fit)),
            held_out_samples=sum(map(_batch_of, self.held_out)),
            seconds=time.monotonic() - self.started,
            notes=self.notes,
        )


class _Impossible(Exception):
    """A form that a layer cannot have after all."""

    def __init__(self, name: str, form: Form, reason: str) -> None:
        super().__init__(name)
        self.name, self.form, self.reason = name, form, reason


def _quantize_task(
    weight: np.ndarray,
    bias: np.ndarray | None,
    statistics: Statistics | None,
    held_out: Statistics | None,
    form: Form,
    wishes: Mapping[str, Any],
) -> tuple[Stored, float | None] | str:
    """In another process: a layer in its form with its error, or why it cannot have it."""
    try:
        if isinstance(form, Choice):
            made = quantize_layer(weight, bias, statistics, form, held_out=held_out, int8_tolerance=None, **wishes)
            return made, made.error if made.held_out_error is None else made.held_out_error
        assert form in ("int8", "float16"), "what is kept is not quantized"
        narrow = narrow_layer(
            weight,
            bias,
            statistics,
            form,
            held_out=held_out,
            correct_bias=wishes["correct_bias"] and wishes["method"] in ("sweep", "em"),
            aim=wishes["method"] in ("sweep", "em"),
        )
        return narrow.stored, narrow.error if narrow.held_out_error is None else narrow.held_out_error
    except QuantizationError as error:
        return str(error)


def _tuner() -> Callable[..., Any]:
    try:
        from onnxcompress.train.codebook_finetune import tune
    except ImportError as error:
        raise RecipeError("--tune needs torch: pip install onnxcompress[train]") from error
    return tune


def _without_idle_bias(layer: Layer, stored: Stored) -> Stored:
    """Leave a bias alone that has no place, or is what it was."""
    before = layer.bias()
    same = stored.bias is not None and before is not None and np.array_equal(stored.bias, before)
    return replace(stored, bias=None) if same or not layer.has_bias else stored


def _form_of(stored: Stored) -> Form:
    if isinstance(stored, QuantizedLayer):
        return stored.choice
    return "int8" if isinstance(stored, Int8Layer) else "float16"


def _row(layer: Layer, item: Item, made: Mapping[str, tuple[Stored, float | None]] | None) -> LayerRow:
    weights = layer.outputs * layer.length
    error = None if item.form == "keep" else item.error
    if made is not None and layer.name in made:
        error = made[layer.name][1]
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        weights=weights,
        form=form_text(item.form),
        bits_per_weight=8 * item.size_bytes / weights,
        size_bytes=item.size_bytes,
        error=error,
        predicted_damage=item.damage,
    )


def _next_damage(damage: float, drop: float, limit: float, good: float, bad: float) -> float:
    """The damage to try next: by the root law, kept inside of what is known."""
    factor = (limit / drop) ** 2 if drop > 0 else 16.0
    wanted = damage * min(max(factor, 1 / 64), 16.0)
    if bad < math.inf and good > 0:
        return math.sqrt(good * bad)
    if bad < math.inf:
        return min(wanted, bad / 2)
    return max(wanted, good * 2)


def _with_sizes(spec: InputSpec, sizes: Sequence[int] | None) -> InputSpec:
    """The input with its open axes fixed; the batch axis stays open."""
    if sizes is None:
        return spec
    if len(sizes) != len(spec.shape):
        raise RecipeError(f"--input-shape {spec.name}: {len(sizes)} sizes, the input has {len(spec.shape)} axes")
    given = [size if size > 0 else None for size in sizes]
    return replace(spec, shape=(spec.shape[0], *given[1:]) if spec.shape[0] in (None, -1, 0) else tuple(given))


def _batch_of(feed: Mapping[str, Any]) -> int:
    return max((np.shape(value)[0] for value in feed.values() if np.ndim(value)), default=1)


def _checks(path: Path) -> bool:
    """Whether the original passes the ONNX checker itself."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError):
        return False
    return True
