"""The order in which passes run, each place with its reason, and the loop that runs them to a common fixed point.

A round is one walk through the order. Rounds repeat until one rewrites nothing, at most ``MAX_ROUNDS`` times: a pass
that undoes another's work would otherwise run for ever.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from onnxcompress import passes
from onnxcompress.errors import RecipeError
from onnxcompress.graph import Graph
from onnxcompress.rewrite import PassResult, RewritePass, Settings
from onnxcompress.shapes import infer_shapes

logger = logging.getLogger(__name__)

MAX_ROUNDS = 12
ENTRY_POINT_GROUP = "onnxcompress.passes"

PassClass = type[RewritePass[Any]]


@dataclass(frozen=True)
class Stage:
    """A run of passes that repeats until none of them rewrites."""

    name: str
    passes: tuple[PassClass, ...]


ORDER: tuple[Stage, ...] = (
    # Small and simple first: what the later patterns look for is only visible once constants are initializers.
    Stage("cleanup", passes.CLEANUP),
    # Decomposed normalizations and activations, before folding takes pieces out of them.
    Stage("fusion", passes.FUSION),
    # BatchNormalization and per-channel constants into their neighbours: they stand between linear operators.
    Stage("folding", passes.FOLDING),
    # Last, because each merge is priced against what stands there after everything else.
    Stage("merging", passes.MERGING),
)


@dataclass
class PipelineResult:
    """What all passes did, one entry per pass in the order of its first run."""

    results: dict[str, PassResult] = field(default_factory=dict)
    rounds: int = 0

    @property
    def rewrites(self) -> int:
        return sum(result.rewrites for result in self.results.values())

    def record(self, result: PassResult) -> None:
        """Add one run of a pass: rewrites pile up, refusals are those of the last run."""
        known = self.results.setdefault(result.name, PassResult(result.name, result.is_merge))
        known.done += result.done
        known.misses = list(result.misses)


def all_passes() -> list[PassClass]:
    """Every pass in its order, those from outside last.

    Raises:
        RecipeError: An entry point names something that is not a pass, or a name that is taken.
    """
    own = [cls for stage in ORDER for cls in stage.passes]
    return own + list(_foreign({cls.name for cls in own}))


def _foreign(taken: set[str]) -> Iterable[PassClass]:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            cls = entry.load()
        except Exception as error:  # whatever a foreign package raises on import, the user needs its name
            raise RecipeError(
                f"pass {entry.name!r} from entry point {entry.value!r} cannot be loaded: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, RewritePass) and hasattr(cls, "name")):
            raise RecipeError(f"entry point {entry.value!r} is not a RewritePass with a name")
        if cls.name in taken:
            raise RecipeError(f"entry point {entry.value!r}: the pass name {cls.name!r} is taken")
        taken.add(cls.name)
        yield cls


def select(only: Sequence[str] = (), skip: Sequence[str] = (), level: int = 3) -> set[str]:
    """Names of the passes to run.

    Args:
        only: These alone; all when empty.
        skip: Not these.
        level: Not those of the stages beyond it: 0 none, 1 cleanup, 2 fusion and folding, 3 merging and all else.

    Raises:
        RecipeError: A name that no pass has.
    """
    names = [cls.name for cls in all_passes()]
    stages = {0: 0, 1: 1, 2: 3}.get(level)
    beyond = [] if stages is None else names[sum(len(stage.passes) for stage in ORDER[:stages]) :]
    for name in [*only, *skip]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; --list-passes shows them"
            raise RecipeError(f"there is no pass {name!r}{hint}")
    return {name for name in (only or names) if name not in {*skip, *beyond}}


def run(
    graph: Graph,
    selected: set[str],
    settings: Settings,
    *,
    after_pass: Callable[[str, Graph], None] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> PipelineResult:
    """Run the selected passes over ``graph`` until none of them rewrites.

    Args:
        graph: Rewritten in place.
        selected: Pass names, see ``select``.
        settings: Given to every pass.
        after_pass: Called with the pass's name and the graph after each run that rewrote something.
        progress: Called with the pass's name and the round before each run.
    """
    outcome = PipelineResult()
    infer_shapes(graph)
    own = {cls.name for stage in ORDER for cls in stage.passes}
    stages = [*(stage.passes for stage in ORDER), tuple(_foreign(own))]
    instances = [[cls(settings) for cls in stage if cls.name in selected] for stage in stages]
    for number in range(1, MAX_ROUNDS + 1):
        outcome.rounds = number
        before = outcome.rewrites
        for stage in instances:
            _run_stage(graph, stage, outcome, number, after_pass, progress)
        if outcome.rewrites == before:
            break
    else:
        logger.info("passes still rewrite after %s rounds", MAX_ROUNDS)
    return outcome


def _run_stage(
    graph: Graph,
    stage: Sequence[RewritePass[Any]],
    outcome: PipelineResult,
    number: int,
    after_pass: Callable[[str, Graph], None] | None,
    progress: Callable[[str, int], None] | None,
) -> None:
    for _ in range(MAX_ROUNDS):
        before = outcome.rewrites
        for one in stage:
            if progress is not None:
                progress(one.name, number)
            result = one.apply(graph)
            outcome.record(result)
            if result.rewrites:
                logger.info("%s: %s rewrites", one.name, result.rewrites)
                if after_pass is not None:
                    after_pass(one.name, graph)
        if outcome.rewrites == before:
            return
