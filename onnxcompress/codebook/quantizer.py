"""``quantize``: codebook weights for a model, within a byte budget or a drop of quality.

0. graph       the exact passes of ``optimize``; every comparison stays with the file that was given
1. menus       every layer's forms, their errors and what they do to the outputs (``planning.py``)
2. plan        a form for each layer, within the bytes asked for, counted to the byte
3. layers      in execution order, each aimed at the float net on the input that the quantized net gives it
4. file        written, reloaded, measured on samples that no fit has used, then renamed into place

A run that is stopped goes on where it was: menus, layers and the state of tuning are kept beside the output until it
is there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from onnxcompress.codebook.augmentation import cuts_for
from onnxcompress.codebook.damage import DamageMeter
from onnxcompress.codebook.dropping import DropSearch
from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.evaluation import Judge, Quality
from onnxcompress.codebook.layers import Layer, Refusal, find_layers
from onnxcompress.codebook.layerwise import ImpossibleForm, Made, Stored, quantize_layers
from onnxcompress.codebook.offers import form_text
from onnxcompress.codebook.options import DEFAULT_ERROR, HELD_OUT_SHARE, QuantizeOptions
from onnxcompress.codebook.planning import BudgetError, Menu, Plan, Planner, finish, make_menus
from onnxcompress.codebook.pooling import MEASURABLE, fit_pools, is_shared, measure_pools
from onnxcompress.codebook.preparing import prepare
from onnxcompress.codebook.results import Progress, QuantizeResult, layer_row
from onnxcompress.codebook.resuming import Checkpoint, feeds_digest, files_digest
from onnxcompress.codebook.sampling import (
    batch_size,
    first_samples,
    made_up_samples,
    read_labelled,
    read_samples,
    sample_count,
)
from onnxcompress.codebook.sharing import SharedCodebook
from onnxcompress.codebook.shaving import SMALL_FILE_BYTES, Shaving
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.codebook.workers import Workers
from onnxcompress.errors import QuantizationError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.measure import size_on_disk
from onnxcompress.model_io import StagedFile, external_files, load, read_proto
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import RunOptions, Runtime
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)

MENU_BATCHES = 12  # of the calibration samples, for the estimates
MENU_ROWS_PER_INPUT = 4
DAMAGE_SAMPLES = 8
REORDERABLE_BYTES = 1 << 30  # all weights are in memory while channels are put in order
TUNING_JUDGES = 8  # one in so many of the samples for tuning, up to MAX_JUDGES, decides what is kept
MAX_JUDGES = 256


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
        if options.data != "none":
            self.report(Progress("reading samples"))
        self.samples = read_samples(self.proto, options)
        self.notes += self.samples.notes
        self._reorder(stack)
        self.labelled = read_labelled(self.proto, options)
        self.metric = (options.metric or "top1") if options.val is not None else None
        self.judge = Judge(
            path, self.samples.held_out or self._others(), runtime, metric=self.metric, labelled=self.labelled,
            custom_ops=options.custom_ops,
        )  # fmt: skip
        self.workers = stack.enter_context(Workers(options.jobs, options.dask))
        self.checkpoint = Checkpoint(
            None if output is None or options.dry_run else checkpoint_folder(output),
            {
                "model": files_digest([path, *sources]),
                "optimized model": files_digest([self.base, *external_files(read_proto(self.base), self.base.parent)]),
                "samples": feeds_digest([*self.samples.all, *self.samples.more]),
                "options": self._identity(),
            },
            resume=options.resume,
        )

    def _identity(self) -> dict[str, Any]:
        """The wishes that what is kept depends on; what depends on the plan carries its name."""
        chosen = self.options
        names = {"keep": list(chosen.keep), "only": list(chosen.only)}
        return {"method": chosen.method, "permute": chosen.permute, "seed": chosen.seed, **names}

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

    def _reorder(self, stack: contextlib.ExitStack) -> None:
        """Put channels in an order in which weights quantize better, where the graph computes the same."""
        chosen = self.options
        if chosen.permute == "none" or not chosen.optimizes or chosen.method not in ("sweep", "em"):
            return
        if self.base_bytes > REORDERABLE_BYTES:
            return
        from onnxcompress.channels.reordering import reorder  # which builds on codebooks itself

        self.report(Progress("ordering channels"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxcompress-")))
        few = first_samples(self.samples.fit, DAMAGE_SAMPLES) if self.samples.fit else []
        names = {layer.name for layer in self.layers}
        found = reorder(self.base, folder, names, few, self.runtime, options=self.run_options)
        if found is not None:
            self.base, self.graph = found, load(found)
            self.layers = [layer for layer in find_layers(self.graph)[0] if layer.name in names]
            self.notes.append("channels between layers stand in an order in which their weights quantize better")

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

    def _calibration_wishes(self) -> dict[str, Any]:
        return {"held_out_fraction": 1 / HELD_OUT_SHARE, "options": self.run_options, "seed": self.options.seed}

    def _others(self) -> list[dict[str, Any]]:
        """What to run where no samples are kept apart."""
        if self.samples.all:
            return self.samples.all
        return made_up_samples(self.proto, self.path, self.options, self.runtime, self.run_options)

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
            plan = self._plans(planner)[0]
            return self._result(plan, None, None, None, plan.size_bytes)
        assert self.output is not None
        if self.options.max_drop is not None:
            result = self._within_drop(planner, self.options.max_drop)
        else:
            made, plan = self._quantize(planner, lambda: self._plans(planner))
            with self._staged(made, plan) as staged:
                quality = self._judge(staged)
                self._check_budget(staged.size_bytes)
                result = self._result(plan, made, quality, self.output, staged.size_bytes)
                staged.commit()
        return result

    def _planner(self) -> Planner:
        feeds = self.samples.fit[:MENU_BATCHES]
        wishes = {**self._calibration_wishes(), "held_out_fraction": 0.0, "rows_per_input": MENU_ROWS_PER_INPUT}
        self.report(Progress("estimating", "", 0, len(self.layers)))
        with Calibration(self.graph, self.layers, feeds, runtime=self.runtime, **wishes) as calibration:
            menus = make_menus(
                self.graph,
                self.layers,
                calibration,
                self._meter(),
                self.workers,
                self.checkpoint,
                method=self.options.method,
                permute=self.options.permute == "auto",
                seed=self.options.seed,
                done=self._counted("estimating", len(self.layers)),
            )
        self._measure_sharing(menus)
        name = self.path.name if self.output is None else self.output.name
        return Planner(self.base, self.original_bytes, self.layers, menus, name, self.base_bytes)

    def _measure_sharing(self, menus: Sequence[Menu]) -> None:
        """Correct what shared codebooks are expected to cost, where the file may be small enough to have some."""
        budget = self.budget_bytes()
        forms = {menu.name: [item.form for item in menu.items if is_shared(item.form)] for menu in menus}
        numbers = sum(layer.outputs * layer.length for layer in self.layers if forms[layer.name])
        if numbers > MEASURABLE or not numbers or (budget is not None and budget > SMALL_FILE_BYTES):
            return
        kept = self.checkpoint.load("sharing")
        if kept is None:
            found = measure_pools(
                self.graph,
                self.layers,
                forms,
                {menu.name: menu.sensitivity for menu in menus},
                self.samples.fit[:MENU_BATCHES],
                swept=self.options.method == "sweep" and self.options.data != "none",
                runtime=self.runtime,
                **self._calibration_wishes(),
            )
            kept = {name: {form_text(form): error for form, error in its.items()} for name, its in found.items()}
            self.checkpoint.save("sharing", kept)
        for menu in menus:
            known = kept.get(menu.name, {})
            menu.correct({form: known[form_text(form)] for form in forms[menu.name] if form_text(form) in known})

    def _meter(self, samples: int = DAMAGE_SAMPLES) -> DamageMeter | None:
        if not self.layers:
            return None
        few = first_samples(self.samples.held_out or self._others(), samples)
        return DamageMeter(self.graph, self.layers, few, self.runtime, self.options.custom_ops)

    def budget_bytes(self) -> int | None:
        """What was asked for."""
        if self.options.ratio is not None:
            return math.floor(self.original_bytes / self.options.ratio)
        return self.options.size_bytes

    def _plans(self, planner: Planner) -> list[Plan]:
        """Those for what was asked for, the one expected to be the best first."""
        budget = self.budget_bytes()
        return [planner.for_damage(DEFAULT_ERROR**2)] if budget is None else planner.rivals(budget)

    def _check_budget(self, size_bytes: int) -> None:
        budget = self.budget_bytes()
        if budget is not None and size_bytes > budget:
            raise BudgetError(f"the file has {size_bytes} bytes, allowed {budget}: ask for {size_bytes}")

    @staticmethod
    def _plan_for_damage(planner: Planner, damage: float) -> list[Plan]:
        return [planner.for_damage(damage)]

    def _within_drop(self, planner: Planner, limit: float) -> QuantizeResult:
        """The smallest file whose drop is allowed."""
        assert self.output is not None
        search = DropSearch(limit)
        best: tuple[StagedFile, QuantizeResult] | None = None
        nearest: tuple[float, int] | None = None
        with contextlib.ExitStack() as stack:
            while not search.done:
                replan = functools.partial(self._plan_for_damage, planner, search.damage)
                made, plan = self._quantize(planner, replan)
                staged = stack.enter_context(self._staged(made, plan))
                quality = self._judge(staged)
                logger.info("%s bytes: %s drops by %.4f", staged.size_bytes, quality.criterion, quality.drop)
                if search.tell(quality.drop):
                    if best is None or staged.size_bytes < best[0].size_bytes:
                        best = staged, self._result(plan, made, quality, self.output, staged.size_bytes)
                elif nearest is None or quality.drop < nearest[0]:
                    nearest = quality.drop, staged.size_bytes
                if plan.keeps_all:
                    break
            if best is None:  # the original itself drops by nothing
                made, plan = self._quantize(planner, lambda: [planner.within(planner.original_bytes)])
                staged = stack.enter_context(self._staged(made, plan))
                best = staged, self._result(plan, made, self._judge(staged), self.output, staged.size_bytes)
                if nearest is not None:
                    drop, size = nearest
                    self.notes.append(f"the nearest smaller file, {size} bytes, drops by {drop:.2%}")
            staged, result = best
            staged.commit()
        return replace(result, seconds=time.monotonic() - self.started, notes=self.notes)

    # -- layers ------------------------------------------------------------------------------------------------------

    def _quantize(self, planner: Planner, plans: Callable[[], list[Plan]]) -> tuple[Made, Plan]:
        """All layers of the best of some plans; a form that turns out impossible is planned around."""
        while True:
            try:
                return self._best([(self._quantize_once(plan), plan) for plan in plans()])
            except ImpossibleForm as found:
                self.notes.append(f"{found.name} cannot be stored as {form_text(found.form)}: {found.reason}")
                planner.exclude(found.name, found.form)

    def _best(self, rivals: Sequence[tuple[Made, Plan]]) -> tuple[Made, Plan]:
        """The one whose layers together change the outputs least, on samples that no fit has used."""
        meter = self._meter(MAX_JUDGES) if len(rivals) > 1 else None
        if meter is None:
            return rivals[0]
        layers = {layer.name: layer for layer in self.layers}
        damages = [
            meter.measure(
                (layers[name], stored.decode(), stored.bias if layers[name].has_bias else None)
                for name, (stored, _) in made.items()
            )
            for made, _ in rivals
        ]
        logger.info("damage of rival plans: %s", ", ".join(f"{damage:.4f}" for damage in damages))
        return rivals[int(np.argmin(damages))]

    def _quantize_once(self, plan: Plan) -> Made:
        changed = [layer for layer in self.layers if plan.forms[layer.name] != "keep"]
        if not changed:
            return {}
        self.report(Progress("quantizing", "", 0, len(changed)))
        wishes = self._calibration_wishes()
        cuts = cuts_for(sample_count(self.samples.all))
        with Calibration(
            self.graph, changed, self.samples.all, runtime=self.runtime, cuts=cuts, **wishes
        ) as calibration:
            return quantize_layers(
                plan,
                self.layers,
                calibration,
                self.workers,
                self.checkpoint,
                method=self.options.method,
                seed=self.options.seed,
                shared=self._shared_codebooks(plan),
                done=self._counted("quantizing", len(changed)),
            )

    def _counted(self, step: str, total: int) -> Callable[[Layer], None]:
        """Reports each layer that is done."""
        done = 0

        def finished(layer: Layer) -> None:
            nonlocal done
            done += 1
            self.report(Progress(step, layer.name, done, total))

        return finished

    def _shared_codebooks(self, plan: Plan) -> dict[str, SharedCodebook]:
        importance = {name: item.importance for name, item in plan.items.items()}
        wishes = {**self._calibration_wishes(), "runtime": self.runtime}
        return fit_pools(self.graph, self.layers, plan.forms, importance, self.samples.fit[:MENU_BATCHES], **wishes)

    def _staged(self, made: Made, plan: Plan) -> StagedFile:
        """Write the file beside its place, with what was made in it."""
        assert self.output is not None
        self.report(Progress("writing"))
        graph = load(self.base)
        if made:
            for layer in find_layers(graph)[0]:
                if layer.name in made:
                    encode(graph, layer, _without_idle_bias(layer, made[layer.name][0]))
            if self.options.tune != "none":
                self._tune(graph, plan)
            finish(graph, plan.shaving)
        return StagedFile(graph, self.output)

    def _tune(self, graph: Graph, plan: Plan) -> None:
        tuner = _tuner()
        self.report(Progress("tuning"))

        def step(state: Any) -> None:
            self.report(Progress("tuning", "", state.step, state.total))

        # Those that the report is about decide only where there are no others.
        more = self.samples.more
        count = min(len(more) // TUNING_JUDGES, MAX_JUDGES // max(1, batch_size(self.samples.all[0])))
        deciding, others = more[:count], more[count:]
        fit, judged = [*self.samples.fit, *others], deciding or self.samples.held_out
        identity = {"plan": plan.digest, "tune": self.options.tune, "steps": self.options.tune_steps}
        folder = self.checkpoint.folder
        done = tuner.tune(
            graph,
            fit,
            judged,
            reference_model=self.base,
            mode=self.options.tune,
            settings=tuner.TuneSettings(steps=self.options.tune_steps),
            checkpoint=None if folder is None else tuner.Checkpoint(folder / f"tuning-{plan.digest}", identity),
            progress=step,
        )
        self.notes.append(
            f"tuned for {done.steps} steps on {sample_count(fit)} samples: relative error {done.before:.4f} -> "
            f"{done.after:.4f} on {sample_count(judged)} others; errors of layers are those before"
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
        made: Made | None,
        quality: Quality | None,
        output: Path | None,
        size_bytes: int,
    ) -> QuantizeResult:
        rows = [layer_row(layer, plan.items[layer.name], made) for layer in self.layers]
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
            calibration_samples=sample_count(self.samples.fit),
            held_out_samples=sample_count(self.samples.held_out),
            seconds=time.monotonic() - self.started,
            notes=self.notes,
        )


def _tuner() -> ModuleType:
    try:
        from onnxcompress.train import codebook_finetune
    except ImportError as error:
        raise RecipeError("--tune needs torch: pip install onnxcompress[train]") from error
    return codebook_finetune


def _without_idle_bias(layer: Layer, stored: Stored) -> Stored:
    """Leave a bias alone that has no place, or is what it was."""
    before = layer.bias()
    same = stored.bias is not None and before is not None and np.array_equal(stored.bias, before)
    return replace(stored, bias=None) if same or not layer.has_bias else stored


def _checks(path: Path) -> bool:
    """Whether the original passes the ONNX checker itself."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError):
        return False
    return True
