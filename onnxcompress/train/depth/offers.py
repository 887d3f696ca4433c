"""What may be pruned, what each block would save, and what is to be reached: count, measured latency or MACs.

Latency is measured block by block, before and after merging, in turns on onnxruntime; the sum over blocks is an
estimate, so a choice is measured once more as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from onnxcompress.errors import OnnxCompressError, RecipeError
from onnxcompress.graph import Graph
from onnxcompress.model_io import to_proto
from onnxcompress.runtime import DEPLOYED, Runtime
from onnxcompress.train.depth.blocks import Block, Refusal, find_blocks, without_overlaps
from onnxcompress.train.depth.costs import block_costs, extract_block, merge
from onnxcompress.train.depth.search import Budget
from onnxcompress.train.depth.supernet import Flows

GoalKind = Literal["blocks", "latency", "macs"]


class BudgetError(OnnxCompressError):
    """What was asked for cannot be reached by pruning blocks."""

    exit_code = 1


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Args:
        kind: Blocks to prune, or latency or MACs to stay within.
        amount: Blocks, milliseconds, multiply-accumulates, or a share of the original's.
        relative: Whether it is such a share.
    """

    kind: GoalKind
    amount: float
    relative: bool = False

    @property
    def text(self) -> str:
        if self.kind == "blocks":
            return f"{self.amount:.0f} blocks"
        unit = "x" if self.relative else " ms" if self.kind == "latency" else " MACs"
        return f"{self.kind} {self.amount:g}{unit}"


def parse_goal(kind: GoalKind, text: str) -> Goal:
    """Read ``0.7x``, ``3.5ms``, ``300M`` or a number of blocks.

    Raises:
        RecipeError: It is none.
    """
    examples = {"blocks": "a number of blocks", "latency": "0.7x or 3.5ms", "macs": "0.5x or 300M"}[kind]
    bad = RecipeError(f"{kind} {text!r}: expected {examples}")
    plain = text.strip().lower()
    relative = plain.endswith("x") and kind != "blocks"
    units = {"blocks": {"": 1.0}, "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3}, "macs": {"k": 1e3, "m": 1e6, "g": 1e9}}
    number, factor = (plain[:-1], 1.0) if relative else (plain, 1.0)
    if not relative:
        for unit, value in sorted(units[kind].items(), key=lambda pair: -len(pair[0])):
            if plain.endswith(unit) and unit:
                number, factor = plain[: -len(unit)], value
                break
        else:
            if kind == "latency":
                raise bad
    try:
        amount = float(number) * factor
    except ValueError:
        raise bad from None
    if not 0 < amount < float("inf") or (relative and amount >= 1) or (kind == "blocks" and amount != int(amount)):
        limit = ", below 1x" if relative else ", 1 or more" if kind == "blocks" else ", more than 0"
        raise RecipeError(f"{kind} {text!r}: expected {examples}{limit}")
    return Goal(kind, amount, relative)


@dataclass(frozen=True)
class Offer:
    """A block, and what pruning it changes.

    Args:
        block: As the supernet takes it; of kind "residual" where it is to be deleted.
        found_as: Its kind as it was found.
        macs: Before and after merging.
        weight_bytes: Likewise.
        nodes: Likewise.
        operators: What it becomes.
        latency_ms: Likewise, measured; None when it was not asked for.
        speedup: Before over after; None without a measurement, or where nothing is left.
        is_slower: Whether the merged form is slower beyond doubt of the measurement.
    """

    block: Block
    found_as: str
    macs: tuple[int, int]
    weight_bytes: tuple[int, int]
    nodes: tuple[int, int]
    operators: tuple[str, ...]
    latency_ms: tuple[float, float] | None
    speedup: float | None
    is_slower: bool

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def is_deletion(self) -> bool:
        return self.block.kind == "residual"

    def saving(self, kind: GoalKind) -> float:
        """What it adds to reaching a goal; 0 or less where it has no place there."""
        if kind == "blocks":
            return 1.0
        if kind == "macs":
            return float(self.macs[0] - self.macs[1])
        assert self.latency_ms is not None
        return 0.0 if self.is_slower else self.latency_ms[0] - self.latency_ms[1]

    def as_dict(self) -> dict[str, Any]:
        place = self.block.add or self.name
        return {
            **asdict(self),
            "block": self.name,
            "place": place,
            "kind": self.block.kind,
            "deletable": self.block.deletable,
        }


def choose_blocks(
    graph: Graph,
    *,
    named_runs: Sequence[tuple[str, str]] = (),
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    delete: Sequence[str] = (),
) -> tuple[list[Block], list[Refusal]]:
    """The blocks that the user lets be pruned, one for each place.

    Args:
        graph: Prepared.
        named_runs: First and last node of runs that the user names.
        only: Patterns of names or kinds; no others are offered.
        skip: Patterns of names or kinds that are not offered.
        delete: Patterns of those that are to be deleted and not merged.

    Raises:
        RecipeError: A pattern fits no block, a block cannot be deleted, or there is none to prune.
    """
    found, refusals = find_blocks(graph, named_runs=named_runs)

    def fits(block: Block, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(text, pattern) for pattern in patterns for text in (block.name, block.kind))

    for pattern in (*only, *skip, *delete):
        if not any(fits(block, [pattern]) for block in found):
            kinds = ", ".join(dict.fromkeys(block.kind for block in found)) or "none"
            raise RecipeError(f"{pattern!r} is the name or kind of no block; there are {len(found)}, of kind {kinds}")
    wanted = without_overlaps([b for b in found if (not only or fits(b, only)) and not fits(b, skip)])
    blocks = []
    for block in wanted:
        if fits(block, delete) and block.kind != "residual":
            if not block.deletable:
                if not any(block.name == pattern for pattern in delete):
                    continue  # a pattern means those that can be
                raise RecipeError(f"block {block.name!r} cannot be deleted: its input and output have different shapes")
            block = replace(block, kind="residual")
        blocks.append(block)
    if not blocks:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refusals[:3])
        why = f" ({reasons})" if reasons else ""
        raise RecipeError(f"there is no block to prune{why}; --block FIRST:LAST names a run of nodes")
    return blocks, refusals


def with_deletions(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, and behind each that can be deleted the same to be deleted: a search takes one of the two."""
    found = []
    for block in blocks:
        found.append(block)
        if block.deletable and block.kind != "residual":
            found.append(replace(block, kind="residual", name=f"{block.add}/delete"))
    return found


def largest(offers: Sequence[Offer], kind: GoalKind) -> list[Block]:
    """Of each place the block that saves most, where one saves anything."""
    best: dict[str, Offer] = {}
    for offer in offers:
        place = offer.block.add or offer.name
        if offer.saving(kind) > (best[place].saving(kind) if place in best else 0.0):
            best[place] = offer
    return [offer.block for offer in best.values()]


def measure_offers(
    graph: Graph,
    blocks: Sequence[Block],
    runtime: Runtime,
    *,
    timed: bool,
    flows: Flows | None = None,
    threads: int = 1,
    budget_s: float = 0.5,
    say: Callable[[str], None] = lambda line: None,
) -> list[Offer]:
    """What each block would save."""
    offers = []
    for number, block in enumerate(blocks, 1):
        say(f"block {number} of {len(blocks)}: {block.name}")
        cost = block_costs(
            graph, block, runtime=runtime if timed else None, flows=flows, threads=threads, budget_s=budget_s
        )
        latency, speedup, slower = None, None, False
        if cost.latency is not None:
            latency = (cost.latency.original_ms, cost.latency.result_ms)
            speedup, slower = cost.latency.ratio, cost.latency.high < 1.0
        elif timed:
            latency = (_alone_ms(graph, block, runtime, threads, budget_s), 0.0)
        offers.append(
            Offer(block, block.kind, cost.macs, cost.weight_bytes, cost.nodes, cost.operators, latency, speedup, slower)
        )
    return offers


def _alone_ms(graph: Graph, block: Block, runtime: Runtime, threads: int, budget_s: float) -> float:
    """How long a block that is to be deleted takes, less what a call of onnxruntime takes by itself."""
    alone = merge(extract_block(graph, block), runtime=runtime)
    feed = {str(t.name): np.zeros(t.shape, t.dtype) for t in alone.inputs}
    model = to_proto(alone).SerializeToString()
    options = replace(DEPLOYED, threads=threads)
    times = runtime.latency([model, _call_alone(alone)], feed, options=options, budget_s=budget_s)
    return max(0.0, float(np.median(times[0]) - np.median(times[1])))


def _call_alone(graph: Graph) -> bytes:
    """A model with the same inputs that gives one of them back."""
    from onnx import helper

    proto = to_proto(graph)
    source = proto.graph.input[0].name
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.output[:], proto.graph.value_info[:]
    proto.graph.node.append(helper.make_node("Identity", [source], [f"{source}/given"]))
    output = proto.graph.output.add()
    output.CopyFrom(proto.graph.input[0])
    output.name = f"{source}/given"
    return bytes(proto.SerializeToString())


@dataclass(frozen=True)
class Base:
    """The whole network before anything is pruned.

    Args:
        macs: Of the original, what a relative goal refers to.
        merged_macs: Of the original after the ordinary passes.
        latency_ms: Of the original; None when it was not asked for.
        merged_ms: Likewise, after the ordinary passes.
        pruned_ms: Likewise, with every block pruned that saves time by itself. Blocks timed one by one may promise less
            than they bring, or more.
    """

    macs: int
    merged_macs: int
    latency_ms: float | None = None
    merged_ms: float | None = None
    pruned_ms: float | None = None

    def limit(self, goal: Goal) -> float:
        """Milliseconds or multiply-accumulates that a goal allows."""
        if not goal.relative:
            return goal.amount
        whole = self.macs if goal.kind == "macs" else self.latency_ms
        assert whole is not None
        return goal.amount * whole

    def expected(self, kind: GoalKind, saved: float) -> float:
        whole = self.merged_macs if kind == "macs" else self.merged_ms
        assert whole is not None
        return whole - saved


def make_budget(goal: Goal, offers: Sequence[Offer], base: Base) -> Budget:
    """The budget of a search; what it needs is infinite where all blocks together bring nothing.

    Raises:
        RecipeError: More blocks are asked for than there are.
    """
    savings = tuple(offer.saving(goal.kind) for offer in offers)
    names = [offer.block.add or offer.name for offer in offers]
    places = None if len(set(names)) == len(names) else tuple(map(names.index, names))
    if goal.kind == "blocks":
        if goal.amount > len(offers):
            raise RecipeError(f"{goal.text} are to be pruned, and {len(offers)} are offered")
        return Budget(savings, goal.amount, places)
    need = max(0.0, base.expected(goal.kind, 0.0) - base.limit(goal))
    if goal.kind == "latency" and base.pruned_ms is not None and base.merged_ms is not None:
        brought = base.merged_ms - base.pruned_ms
        # What the blocks save one by one, in the measure of what they save together.
        need = need / brought * Budget(savings, 0.0, places).most if brought > 0 else math.inf
    return Budget(savings, need, places)
