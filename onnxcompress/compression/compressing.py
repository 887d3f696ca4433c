"""``compress``: reach a goal with what the other verbs do.

read       the model, the samples in three parts (``parts.py``): to fit with, to decide by, to judge by
try        steps in the order of ``strategy.py``, each measured against the original when it is done
write      the file of the last step that was kept; or, where the goal is out of reach, the nearest one if asked for

What was tried is kept in OUT.compress/ with its figures, and the checkpoints of steps beside it, until the run is done:
one that was stopped goes on with the same command.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcompress.codebook.resuming import Checkpoint, files_digest
from onnxcompress.compression.attempts import Attempt, Attempts
from onnxcompress.compression.meter import Meter
from onnxcompress.compression.options import CompressOptions, CompressResult
from onnxcompress.compression.parts import Parts, read_parts
from onnxcompress.compression.planning import Plan, make_plan
from onnxcompress.compression.point import reached
from onnxcompress.compression.recipe import Step, recipe_text
from onnxcompress.compression.script import Script, StepError
from onnxcompress.compression.settings import Shared
from onnxcompress.compression.steps import has_torch
from onnxcompress.compression.strategy import Means, Strategy
from onnxcompress.compression.wording import nearest_text
from onnxcompress.cost import NOMINAL_SIZE
from onnxcompress.errors import DataError, ModelError, RecipeError
from onnxcompress.model_io import StagedFile, external_files, load, read_proto
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import Runtime

Say = Callable[[str], None]
WITHOUT_DATA = (
    "without data: exact rewrites and data-free quantization alone; nothing was pruned, no drop can be measured, and "
    "quantizing loses several times what it does with some dozens of samples"
)
WITHOUT_TORCH = "without torch: no blocks are pruned, nothing is tuned or trained (pip install onnxcompress[train])"


def state_folder(output: Path) -> Path:
    """Where a run keeps what it has done."""
    return output.with_name(f"{output.name}.compress")


def compress(
    model: str | Path,
    output: str | Path,
    options: CompressOptions | None = None,
    *,
    say: Say | None = None,
    done: Callable[[Attempt], None] | None = None,
    runtime: Runtime | None = None,
    **wishes: Any,
) -> CompressResult:
    """Make a model file smaller or faster, as far as a goal says and no further.

    Args:
        model: Path of the model.
        output: Where to write; it appears only when complete and measured, and not at all where the goal is out of
            reach, unless ``nearest`` asks for it.
        options: The wishes; ``wishes`` are the same by keyword.
        say: Told what is being done.
        done: Called with each step that was tried.
        runtime: Where models run; one of its own when None.

    Returns:
        Figures before and after, all that was tried, and a recipe that repeats it; ``met`` is false where the goal was
        not reached.

    Raises:
        ModelError: The model is missing, damaged, or not to be run.
        DataError: The samples are missing or do not fit.
        RecipeError: The wishes conflict, or the folder of a stopped run is of another one.
        OutputError: The output cannot be written.
    """
    chosen = options or CompressOptions(**wishes)
    with _running(runtime) as running:
        return _Job(Path(model), Path(output), chosen, running, say or (lambda line: None), done).run()


def plan_compression(
    model: str | Path, options: CompressOptions, *, say: Say | None = None, runtime: Runtime | None = None
) -> Plan:
    """What ``compress`` would do; nothing is written."""
    path, told = Path(model), say or (lambda line: None)
    with _running(runtime) as running, tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        told("reading")
        parts = _parts(path, options)
        parts.write(Path(folder))
        shared = _shared(path, options, parts)
        plan = make_plan(path, options, _means(options, parts), shared, running, told)
    return replace(plan, notes=[*_notes(options, parts), *plan.notes])


@contextlib.contextmanager
def _running(runtime: Runtime | None) -> Iterator[Runtime]:
    if runtime is not None:
        yield runtime
        return
    with Runtime(timeout_s=600.0) as own:
        yield own


def _parts(path: Path, options: CompressOptions) -> Parts:
    return read_parts(
        read_proto(path),
        options.data,
        options.val,
        limit=options.limit,
        preprocess=options.preprocess,
        seed=options.seed,
    )


def _shared(path: Path, options: CompressOptions, parts: Parts) -> Shared:
    return Shared(
        parts.fitting, parts.deciding, path, options.metric if parts.labelled else None, options.seed, options.threads,
        options.jobs, options.custom_ops, parts.labelled,
    )  # fmt: skip


def _means(options: CompressOptions, parts: Parts) -> Means:
    return Means(options.data != "none", has_torch(), options.train, parts.fitted, parts.labelled)


def _notes(options: CompressOptions, parts: Parts) -> list[str]:
    notes = list(parts.notes)
    drop = None if options.goal is None else options.goal.drop
    if parts.judging is not None and drop is not None and 0 < drop < 1 / len(parts.judging):
        notes.append(
            f"{len(parts.judging)} samples judge, and one of them is {1 / len(parts.judging):.1%}: to tell a drop of "
            f"{drop:.1%} from none takes more"
        )
    if options.data == "none":
        notes.append(WITHOUT_DATA)
    if not has_torch():
        notes.append(WITHOUT_TORCH)
    if options.data != "none" and options.val is None:
        assert parts.judging is not None
        notes.append(f"{len(parts.judging)} samples of --data were kept back to judge by: --val gives others")
    return notes


class _Job:
    """One model on its way."""

    def __init__(
        self,
        path: Path,
        output: Path,
        options: CompressOptions,
        runtime: Runtime,
        say: Say,
        done: Callable[[Attempt], None] | None,
    ) -> None:
        self.started = time.monotonic()
        self.path, self.output, self.options, self.runtime = path, output, options, runtime
        self.say, self.done = say, done
        say("reading")
        proto = read_proto(path)
        sources = list(external_files(proto, path.parent))
        check_target(output, sources)
        self.parts = _parts(path, options)
        self.checkpoint = Checkpoint(
            state_folder(output),
            {"model": files_digest([path, *sources]), "samples": self.parts.digest, **self._identity()},
            resume=options.resume,
        )

    def _identity(self) -> dict[str, Any]:
        """The wishes that say what is tried."""
        chosen = self.options
        return {
            "goal": "" if chosen.goal is None else chosen.goal.text,
            "settings": {verb: {**settings} for verb, settings in chosen.settings.items()},
            "steps": [[step.verb, {**step.settings}] for step in chosen.steps],
            "metric": chosen.metric,
            "training": chosen.train,
            "torch": has_torch(),
            "threads": chosen.threads,
            "seed": chosen.seed,
        }

    def run(self) -> CompressResult:
        """Do it all; what was kept is of no use where the wishes have to change."""
        try:
            result = self._run()
        except (DataError, ModelError, RecipeError, StepError):
            self.checkpoint.remove()
            raise
        self.checkpoint.remove()
        return result

    def _run(self) -> CompressResult:
        options, goal = self.options, self.options.goal
        self._begin()
        if options.steps or goal is None:
            last = Script(self.attempts, goal, options.steps).run()
        else:
            last = Strategy(self.attempts, goal, _means(options, self.parts), options.settings).run()
        met = goal is None or reached(goal, last.found, self.attempts.original.found)
        for attempt in last.chain:
            attempt.kept = True
            attempt.verdict = attempt.verdict if attempt.failure else "kept"
        written = met or options.nearest
        if written:
            assert last.path is not None
            with StagedFile(load(last.path), self.output) as staged:
                staged.commit()
        return self._result(last, met, written)

    def _begin(self) -> None:
        """Samples to their places, and the original measured."""
        options = self.options
        assert self.checkpoint.folder is not None
        self.parts.write(self.checkpoint.folder)
        self.shared = _shared(self.path, options, self.parts)
        meter = Meter(
            self.path,
            self.parts,
            self.runtime,
            metric=options.metric,
            latency=None if options.goal is None else options.goal.latency,
            threads=options.threads,
            custom_ops=options.custom_ops,
            seed=options.seed,
        )
        self.attempts = Attempts(self.path, self.shared, meter, self.checkpoint, self.runtime, self.say, self.done)

    def _assumed(self) -> list[str]:
        point = self.attempts.original.found
        if point.macs_exact or self.options.goal is None or self.options.goal.macs is None:
            return []
        return [f"MACs are counted with {NOMINAL_SIZE} for sizes that the model leaves open, and 1 for the batch"]

    def _result(self, last: Attempt, met: bool, written: bool) -> CompressResult:
        options, original = self.options, self.attempts.original.found
        chain = last.chain
        steps = [Step(attempt.step.verb, attempt.repeat) for attempt in chain]
        recipe = replace(options.recipe, settings={}, steps=steps) if steps else options.recipe
        standing = "" if options.goal is None else nearest_text(options.goal, last.found, original)
        return CompressResult(
            source=str(self.path),
            output=self.output if written else None,
            goal="" if options.goal is None else options.goal.text,
            met=met,
            standing=standing,
            original=original,
            result=last.found,
            attempts=self.attempts.tried,
            chain=chain,
            samples=0 if self.parts.judging is None else len(self.parts.judging),
            recipe=recipe_text(recipe),
            seconds=time.monotonic() - self.started,
            notes=[*_notes(options, self.parts), *self._assumed()],
        )
