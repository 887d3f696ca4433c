"""Find the blocks of a graph that depth pruning can make one operator, or delete.

A block is an Add whose two inputs meet again at one tensor; what lies between decides the kind. A run is a part of a
chain of convolutions that would be faster as one. Everything is read from the graph, so that a file from anywhere will
do, with BatchNormalization in it or folded. ``preparation.prepare`` first: it brings other spellings into these forms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from onnxcompress.cost import MacsAndBytes, node_macs
from onnxcompress.errors import RecipeError
from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op
from onnxcompress.linear import ConvOp
from onnxcompress.linear.chain import ChainGeometry
from onnxcompress.linear.nodes import conv_spec_at, spatial_sizes
from onnxcompress.merging.partition import SegmentPrice, fastest_partition
from onnxcompress.merging.paths import nominal_shape
from onnxcompress.train.depth.kinds import Kind, kind_of, rings, why_not_capped, why_not_rings
from onnxcompress.train.depth.steps import Branch, Step, StepKind, activation_to, read_branch, step_to

SHORTCUT_STEPS: tuple[StepKind, ...] = ("conv", "scale")
RUN_STEPS: tuple[StepKind, ...] = ("conv", "scale", "activation")
LONGEST_RUN = 4
NEAR_TENSORS = 64
RUN_GAIN = 0.03  # of the estimated time; less is not worth a place in the search


@dataclass(frozen=True)
class Block:
    """A place that can be pruned.

    Attributes:
        name: Unique; that of the Add, or FIRST:LAST of a run.
        kind: What it is; "residual" can only be deleted.
        source: Tensor that the block reads.
        output: Tensor that it makes.
        nodes: Names of its nodes in order of execution, without the shortcut's.
        add: Name of the Add; "" for a run.
        shortcut: Names of the nodes on the other way from source to Add; empty where that is the source itself.
        end: The activation that follows the output already; "" where there is none.
        source_shape: As far as known: numbers, names, or None.
        output_shape: Likewise.
        macs: Multiply-accumulates at batch 1, shortcut included.
        deletable: Whether the source can stand for the output.
    """

    name: str
    kind: Kind
    source: str
    output: str
    nodes: tuple[str, ...]
    add: str = ""
    shortcut: tuple[str, ...] = ()
    end: str = ""
    source_shape: tuple[int | str | None, ...] | None = None
    output_shape: tuple[int | str | None, ...] | None = None
    macs: int = 0
    deletable: bool = False


@dataclass(frozen=True)
class Refusal:
    """A place that looked like a block and is none, or only one to delete, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Site:
    """A block in the graph at hand: its branch, and the Add with the place of the branch in it."""

    branch: Branch
    output: Tensor
    add: Node | None = None
    shortcut: Branch | None = None
    dead: tuple[Node, ...] = field(default=())  # of a residual: what goes with the branch

    @property
    def source(self) -> Tensor:
        return self.branch.source


def find_blocks(graph: Graph, *, named_runs: Sequence[tuple[str, str]] = ()) -> tuple[list[Block], list[Refusal]]:
    """The blocks of a graph in order of execution, and the places that are none.

    A place may be two blocks of different kind ("basic" and "basic-3x3"), of which a supernet takes one; the same
    node is in no other two blocks.

    Args:
        graph: With shapes inferred, as ``prepare`` leaves it; nodes have names, each its own.
        named_runs: First and last node of runs of convolutions that the user wants.

    Raises:
        RecipeError: A named run has no such node, is no chain, or lies across another block.
    """
    check_names(graph)
    blocks: list[Block] = []
    refusals: list[Refusal] = []
    taken: set[str] = set()
    for first, last in named_runs:
        block = named_run(graph, first, last)
        if taken.intersection(block.nodes):
            raise RecipeError(f"the runs that end in {last!r} and before it overlap: name one of them")
        taken.update(block.nodes)
        blocks.append(block)
    found = [at for node in graph.nodes if (at := blocks_at(graph, node)) is not None]
    # What can be merged first, then small before large: a skip around many blocks is no block.
    found.sort(
        key=lambda at: (not any(b.kind != "residual" for b in at[0]), min((len(b.nodes) for b in at[0]), default=0))
    )
    for here, refused in found:
        inside = {name for block in here for name in block.nodes}
        if not taken & inside:
            blocks += here
            taken |= inside | {name for block in here for name in block.shortcut}
            refusals += refused
    blocks += find_runs(graph, taken)
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    blocks.sort(key=lambda block: (order[block.nodes[0]], order[block.nodes[-1]]))
    return blocks, sorted(refusals, key=lambda refusal: order[refusal.name])


def check_names(graph: Graph) -> None:
    """RecipeError where a node has no name, or that of another."""
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name or node.name in seen:
            raise RecipeError(f"{node.op} node {node.name!r} has no name of its own: give the graph to prepare() first")
        seen.add(node.name)


def without_overlaps(blocks: Iterable[Block], prefer: Sequence[Kind] = ("basic-3x3",)) -> list[Block]:
    """One block for each place: of two kinds the preferred one, else the first."""
    chosen: list[Block] = []
    for block in sorted(blocks, key=lambda b: b.kind not in prefer):
        if not any(set(block.nodes).intersection(other.nodes) for other in chosen):
            chosen.append(block)
    return sorted(chosen, key=list(blocks).index)


# -- residual blocks -------------------------------------------------------------------------------------------------


def blocks_at(graph: Graph, add: Node) -> tuple[list[Block], list[Refusal]] | None:
    """The blocks that end in an Add; None where it is no residual connection."""
    if not is_op(add, "Add", "Sum") or len(add.inputs) != 2 or any(map(is_constant, add.inputs)):
        return None
    site = read_residual(graph, add)
    if isinstance(site, Site):
        kind = why_not_sum(site) or kind_of(site.branch)
        blocks, reason = (site_blocks(graph, site, kind), "") if kind in _RESIDUAL_KINDS else ([], kind)
        if not reason:
            reason = why_not_rings(site.branch)
            blocks = [block for block in blocks if not reason or block.kind == "basic-3x3"]
        refused = [Refusal(add.name, reason)] if reason else []
        if blocks:
            return blocks, refused
    else:
        refused = [Refusal(add.name, site)]
    skip = deletion(graph, add)
    if skip is None:
        return ([], refused) if isinstance(site, Site) or meets(graph, add) else None
    return [make_block(graph, skip, "residual")], refused


_RESIDUAL_KINDS = frozenset({"inverted-residual", "convnext", "ffn", "basic", "bottleneck", "run"})


def read_residual(graph: Graph, add: Node) -> Site | str:
    """The branch and the shortcut that meet in an Add, or the reason why they cannot be read."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    reasons: list[tuple[int, int, str]] = []
    for index in (1, 0):
        straight, branch_end = add.inputs[1 - index], add.inputs[index]
        way = read_branch(graph, straight, [add], kinds=SHORTCUT_STEPS)
        sources = {straight: 0} | {step.source: i for i, step in enumerate(reversed(way.steps), 1)}
        branch = read_branch(graph, branch_end, [add], sources)
        if branch.source in sources and branch.steps:
            count = sources[branch.source]
            shortcut = Branch(branch.source, straight, way.steps[len(way.steps) - count :])
            return Site(branch, add.outputs[0], add, shortcut if count else None)
        # The branch is the input that is made last.
        maker = graph.producer(branch_end)
        reasons.append((len(branch.steps), -1 if maker is None else position[maker], branch.stopped))
    return max(reasons)[2]


def why_not_sum(site: Site) -> str:
    """The reason why the two inputs of the Add are not known to have its shape; else empty."""
    assert site.add is not None
    for tensor in site.add.inputs:
        if not may_stand_for(tensor, site.output):
            shapes = [None if t.shape is None else list(t.shape) for t in (tensor, site.output)]
            return f"Add {site.add.name!r} makes {shapes[1]} of {tensor.name!r}, which has shape {shapes[0]}"
    return ""


def site_blocks(graph: Graph, site: Site, kind: Kind | str) -> list[Block]:
    """The block, and for a basic one its capped form."""
    blocks = [make_block(graph, site, kind)]  # type: ignore[arg-type]  # asked for by kind_of
    if kind == "basic" and not why_not_capped(site.branch):
        blocks.append(make_block(graph, site, "basic-3x3"))
    return blocks


def make_block(graph: Graph, site: Site, kind: Kind) -> Block:
    """The description of a site."""
    nodes = site.dead or site.branch.nodes
    along = () if site.shortcut is None else site.shortcut.nodes
    last = [] if site.add is None else [site.add]
    name = site.add.name if site.add is not None else f"{nodes[0].name}:{nodes[-1].name}"
    return Block(
        name=f"{name}/3x3" if kind == "basic-3x3" else name,
        kind=kind,
        source=site.source.name,
        output=site.output.name,
        nodes=tuple(node.name for node in [*nodes, *last]),
        add="" if site.add is None else site.add.name,
        shortcut=tuple(node.name for node in along),
        end=following_activation(graph, site.output),
        source_shape=None if site.source.shape is None else tuple(site.source.shape),
        output_shape=None if site.output.shape is None else tuple(site.output.shape),
        macs=sum(node_macs(node)[0] for node in [*nodes, *along]),
        deletable=site.shortcut is None and may_stand_for(site.source, site.output),
    )


def may_stand_for(source: Tensor, output: Tensor) -> bool:
    """Whether two tensors have one shape: the same numbers, and a name where the other has one."""
    if source.shape is None or output.shape is None or len(source.shape) != len(output.shape):
        return False
    # Names differ behind a Reshape to (-1, ...) although the sizes do not.
    pairs = zip(source.shape, output.shape, strict=True)
    return all(a == b or not (isinstance(a, int) or isinstance(b, int)) for a, b in pairs)


def following_activation(graph: Graph, tensor: Tensor) -> str:
    """The activation that alone reads a tensor."""
    readers = list(dict.fromkeys(tensor.outputs))
    if not readers or graph.is_output(tensor):
        return ""
    position = {node: i for i, node in enumerate(graph.nodes)}
    ahead = sorted((node for node in readers if node in position), key=position.__getitem__)
    for _ in range(6):  # nodes of the longest spelling of GELU
        for node in ahead:
            if node.outputs:
                found = activation_to(graph, node.outputs[0], node)
                if isinstance(found, Step) and found.source is tensor and set(readers) <= set(found.nodes):
                    return found.what
        ahead = list(dict.fromkeys(r for n in ahead for t in n.outputs for r in t.outputs if r.graph is graph))[:8]
    return ""


def deletion(graph: Graph, add: Node) -> Site | None:
    """What goes when one input of the Add stands for its output; None where neither can."""
    for index in (1, 0):
        skip, end = add.inputs[1 - index], add.inputs[index]
        dead = exclusive_nodes(graph, end, add)
        if dead and may_stand_for(skip, add.outputs[0]) and any(skip is t for node in dead for t in node.inputs):
            return Site(Branch(skip, end, ()), add.outputs[0], add, dead=dead)
    return None


def meets(graph: Graph, add: Node) -> bool:
    """Whether one input is made, not far behind, from the other."""
    for index in (1, 0):
        skip, seen = add.inputs[1 - index], {add.inputs[index]}
        work = list(seen)
        while work and len(seen) < NEAR_TENSORS:
            node = graph.producer(work.pop(0))
            fresh = [] if node is None else [t for t in node.inputs if t not in seen and not is_constant(t)]
            if any(skip is tensor for tensor in fresh):
                return True
            seen.update(fresh)
            work += fresh
    return False


def exclusive_nodes(graph: Graph, tensor: Tensor, reader: Node) -> tuple[Node, ...]:
    """The nodes that would be dead if ``reader`` did not read ``tensor``, in order of execution."""
    dead: set[Node] = set()
    work = [graph.producer(tensor)] if list(tensor.outputs) == [reader] else []
    while work:
        node = work.pop()
        if node is None or node in dead or any(graph.is_output(t) for t in node.outputs):
            continue
        if any(r not in dead and not (r is reader and t is tensor) for t in node.outputs for r in t.outputs):
            continue
        dead.add(node)
        work += [graph.producer(t) for t in node.inputs]
    return tuple(node for node in graph.nodes if node in dead)


# -- runs ------------------------------------------------------------------------------------------------------------


def named_run(graph: Graph, first: str, last: str) -> Block:
    """The run from one node to another.

    Raises:
        RecipeError: There is no such node, or what lies between is no chain of convolutions.
    """
    by_name = {node.name: node for node in graph.nodes}
    for name in (first, last):
        if name not in by_name:
            raise RecipeError(f"there is no node {name!r} for the run {first}:{last}; inspect shows the names")
    site = read_run(graph, by_name[first], by_name[last])
    if isinstance(site, str):
        raise RecipeError(f"{first}:{last} is no run of convolutions: {site}")
    return make_block(graph, site, "run")


def read_run(graph: Graph, first: Node, last: Node) -> Site | str:
    """The steps between two nodes, an activation at the end left out, or the reason why it is no run."""
    output = last.outputs[0]
    branch = read_branch(graph, output, None, [first.inputs[0]], kinds=RUN_STEPS)
    if branch.source is not first.inputs[0] or first not in branch.nodes:
        return branch.stopped or f"{first.name!r} is not reached from {last.name!r}"
    while branch.steps and branch.steps[-1].kind == "activation":
        branch = Branch(branch.source, branch.steps[-1].source, branch.steps[:-1])
    kind = kind_of(branch)
    reason = why_not_rings(branch) if kind in _RESIDUAL_KINDS else kind
    return reason or Site(branch, branch.output)


def find_runs(graph: Graph, taken: Collection[str]) -> list[Block]:
    """Runs outside of all blocks that would be faster as one convolution, by estimate."""
    blocks: list[Block] = []
    seen = set(taken)
    for node in reversed(graph.nodes):
        if not is_op(node, "Conv") or node.name in seen:
            continue
        output = last_scale(graph, node)
        whole = read_branch(graph, output, None, kinds=RUN_STEPS)
        steps = list(whole.steps)
        for cut in range(len(steps), 0, -1):
            if {n.name for n in steps[cut - 1].nodes} & seen:
                steps = steps[cut:]
                break
        while steps and steps[0].kind != "conv":
            del steps[0]
        seen |= {n.name for step in steps for n in step.nodes}
        blocks += paying_runs(graph, steps)
    return blocks


def last_scale(graph: Graph, conv: Node) -> Tensor:
    """The output of the last BatchNormalization or scale that follows a Conv."""
    output: Tensor = conv.outputs[0]
    while (reader := graph.only_reader(output)) is not None and len(reader.outputs) > 0:
        step = step_to(graph, reader.outputs[0])
        if isinstance(step, str) or step.kind != "scale" or step.source is not output:
            break
        output = step.output
    return output


def paying_runs(graph: Graph, steps: Sequence[Step]) -> list[Block]:
    """The segments of a chain that pay as one convolution, with the padding moved to the first."""
    places = [i for i, step in enumerate(steps) if step.kind == "conv"]
    if len(places) < 2:
        return []

    def branch(start: int, stop: int) -> Branch:
        last = places[stop - 1]
        while last + 1 < len(steps) and steps[last + 1].kind == "scale":
            last += 1
        part = tuple(steps[places[start] : last + 1])
        return Branch(part[0].source, part[-1].output, part)

    def price(start: int, stop: int) -> SegmentPrice | None:
        convs = [steps[i].conv for i in places[start:stop]]
        source = steps[places[start]].source
        latency_ms = merged_ms([conv for conv in convs if conv is not None], source)
        if stop - start == 1:
            return None if latency_ms is None else SegmentPrice(latency_ms, 0)
        apart = [merged_ms([steps[i].conv], steps[i].source) for i in places[start:stop]]  # type: ignore[list-item]
        if latency_ms is None or None in apart or latency_ms > sum(map(float, apart)) * (1 - RUN_GAIN):  # type: ignore[arg-type]
            return None
        part = branch(start, stop)
        return SegmentPrice(latency_ms, 0) if kind_of(part) in _RESIDUAL_KINDS and not why_not_rings(part) else None

    if any(price(i, i + 1) is None for i in range(len(places))):
        return []
    best = fastest_partition(len(places), price, growth_bytes=0, longest=LONGEST_RUN)
    sites = [Site(part, part.output) for part in (branch(start, stop) for start, stop in best.merged)]
    return [make_block(graph, site, "run") for site in sites]


def merged_ms(convs: Sequence[ConvOp], source: Tensor) -> float | None:
    """Estimated time of convolutions in a row as one, with all padding at the first; None where they do not merge."""
    sizes = spatial_sizes(source, convs[0])
    at = nominal_shape(source, convs[0].spatial_rank)
    if len(convs) == 1:
        return MacsAndBytes().price([conv_spec_at(convs[0], at)]).latency_ms
    plan = _plan(pads_at_first(convs), sizes)
    return None if plan is None else MacsAndBytes().price([conv_spec_at(plan, at)]).latency_ms


def _plan(convs: Sequence[ConvOp], sizes: Sequence[int | None]) -> ConvOp | None:
    try:
        plan = ChainGeometry(convs, sizes).plan(0, len(convs))
    except ValueError:
        return None  # a kernel that does not fit the size
    return None if isinstance(plan, str) else plan.conv


def pads_at_first(convs: Sequence[ConvOp]) -> list[ConvOp]:
    """The chain with all its padding at the first convolution."""
    begin, end = rings(convs)[0]
    none = (0,) * convs[0].spatial_rank
    return [replace(conv, pads_begin=none if i else begin, pads_end=none if i else end) for i, conv in enumerate(convs)]


# -- a block in a graph ----------------------------------------------------------------------------------------------


def after_deletions(graph: Graph, block: Block) -> Block:
    """A block that can be deleted, as it is known in a graph that others were deleted from: its source may be theirs.

    Raises:
        RecipeError: It is not there.
    """
    add = next((node for node in graph.nodes if node.name == block.add), None)
    site = None if add is None else deletion(graph, add)
    if site is None:
        raise RecipeError(f"block {block.name!r} is not in this graph: {block.add!r} is no Add that can be left out")
    return replace(block, source=str(site.source.name), output=str(site.output.name))


def locate(graph: Graph, block: Block) -> Site:
    """The block in this graph, or in a copy of the one that it was found in.

    Raises:
        RecipeError: It is not there.
    """
    by_name = {node.name: node for node in graph.nodes}
    missing = [name for name in block.nodes if name not in by_name]
    if missing:
        raise RecipeError(f"block {block.name!r} is not in this graph: there is no node {missing[0]!r}")
    site: Site | str | None
    if block.kind == "residual":
        site = deletion(graph, by_name[block.add])
    elif block.add:
        site = read_residual(graph, by_name[block.add])
    else:
        site = read_run(graph, by_name[block.nodes[0]], by_name[block.nodes[-1]])
    if not isinstance(site, Site) or (site.source.name, site.output.name) != (block.source, block.output):
        raise RecipeError(
            f"block {block.name!r} is not in this graph: {site if isinstance(site, str) else 'it has changed'}"
        )
    return site
