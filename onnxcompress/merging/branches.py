"""Linear branches of one input that meet in a sum: Add, Sub and Sum nodes, nested ones taken as one sum.

``read_sum`` takes a tree of such nodes apart into signed terms, ``branch_groups`` finds the terms that are linear in
one tensor, ``plan_branches`` says what they become and whether that pays, ``merge_branches`` puts one Conv in their
place. ``BranchPass`` is the base of the passes that do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxcompress.cost import CostModel, OperatorSpec
from onnxcompress.graph import Graph, Node, Tensor, is_constant, is_op, static_shape
from onnxcompress.linear import ConvOp, Exactness, scale_output
from onnxcompress.linear.chain import Merged, Plan, plan_sum
from onnxcompress.linear.nodes import spatial_sizes
from onnxcompress.merging.paths import (
    Path,
    change_in_macs,
    insert_merged,
    kernel_text,
    nominal_shape,
    path_specs,
    path_to,
    plan_specs,
    read_path,
    why_not_merge,
)
from onnxcompress.rewrite import Miss, RewritePass

SUM_OPS = ("Add", "Sub", "Sum")
MAX_TERMS = 64


@dataclass(frozen=True, eq=False)
class Term:
    """A term of a sum.

    Attributes:
        tensor: Its value.
        reader: The node of the sum that reads it.
        sign: 1 or -1.
        side: Which input of the sum's last node it comes through.
    """

    tensor: Tensor
    reader: Node
    sign: int
    side: int


@dataclass(frozen=True, eq=False)
class TermSum:
    """A tree of Add, Sub and Sum nodes; all but the root are read by the tree alone."""

    nodes: tuple[Node, ...]  # readers first, so the root is the first
    terms: tuple[Term, ...]

    @property
    def root(self) -> Node:
        return self.nodes[0]


@dataclass(frozen=True, eq=False)
class Branch:
    """A term as linear operators on a source, last one signed."""

    term: Term
    path: Path
    ops: tuple[ConvOp, ...] = ()


@dataclass(frozen=True, eq=False)
class BranchMerge:
    """Some branches of a sum, what they become, and what both cost; ``merged`` once the weights are computed."""

    total: TermSum
    branches: tuple[Branch, ...]
    plan: Plan
    before: tuple[OperatorSpec, ...]
    after: tuple[OperatorSpec, ...]
    merged: Merged | None = None

    @property
    def replaced(self) -> list[Node]:
        """Nodes of the branches, readers first."""
        return [node for branch in self.branches for node in reversed(branch.path.nodes)]


def read_sum(graph: Graph, root: Node) -> TermSum:
    """The tree of sums that ends in ``root``."""
    nodes = [root]
    terms: list[Term] = []
    work = [(tensor, root, _sign(root, i), i) for i, tensor in reversed(list(enumerate(root.inputs)))]
    while work:
        tensor, reader, sign, side = work.pop()
        maker = graph.producer(tensor)
        inner = maker is not None and is_op(maker, *SUM_OPS) and graph.feeds_only(tensor, reader)
        if maker is None or not inner or shifts(maker) or len(terms) + len(work) + len(maker.inputs) > MAX_TERMS:
            terms.append(Term(tensor, reader, sign, side))
            continue
        nodes.append(maker)
        work += [(t, maker, sign * _sign(maker, i), side) for i, t in reversed(list(enumerate(maker.inputs)))]
    return TermSum(tuple(nodes), tuple(terms))


def shifts(node: Node) -> bool:
    """Whether the node adds a constant that varies along one axis at most: then it is a step of a branch."""
    if is_op(node, "Sum"):
        return False
    shapes = [static_shape(tensor) for tensor in node.inputs if is_constant(tensor)]
    return any(shape is not None and sum(size != 1 for size in shape) < 2 for shape in shapes)


def _sign(node: Node, index: int) -> int:
    return -1 if node.op == "Sub" and index == 1 else 1


def branch_groups(graph: Graph, total: TermSum) -> list[list[Branch]]:
    """Terms of a sum that are linear in the same tensor, one list per tensor.

    A group has a Conv or an AveragePool. It enters the root through two inputs: else it belongs to a smaller sum.
    """
    groups: dict[Tensor, list[Branch]] = {}
    for term in total.terms:
        if not is_constant(term.tensor):
            path = path_to(graph, term.tensor, term.reader)
            groups.setdefault(path.source, []).append(Branch(term, path))
    return [group for group in groups.values() if crosses_root(group) and not all(b.path.is_affine for b in group)]


def crosses_root(branches: Sequence[Branch]) -> bool:
    """Whether the branches come together in the root and no earlier."""
    return len({branch.term.side for branch in branches}) > 1


def read_branches(graph: Graph, group: Sequence[Branch]) -> tuple[list[Branch], str]:
    """The branches of a group whose numbers are known, those with a Conv first, and a reason for the last left out."""
    ready: list[Branch] = []
    reason = ""
    like: ConvOp | None = None
    for branch in sorted(group, key=lambda b: not b.path.has_conv):
        if like is None and not branch.path.has_conv:
            return [], reason or "no branch has a Conv"
        found = read_path(graph, branch.path, like)
        if isinstance(found, str):
            reason = found
            continue
        like = like or found[0]
        if branch.term.sign < 0:
            found[-1] = scale_output(found[-1], -1.0)
        ready.append(replace(branch, ops=tuple(found)))
    return ready, reason


class BranchPass(RewritePass[BranchMerge]):
    """Base of the passes that merge branches of a sum; a pass says which groups it wants, and which sets it tries."""

    ops = SUM_OPS
    is_merge = True

    def wants(self, group: Sequence[Branch]) -> bool:
        """Whether to look at a group, judged by the form of its branches."""
        raise NotImplementedError

    def candidates(self, branches: Sequence[Branch]) -> list[list[Branch]]:
        """Sets of two branches and more to try, of those whose numbers are known."""
        raise NotImplementedError

    def match(self, graph: Graph, node: Node) -> BranchMerge | Miss | None:
        total = read_sum(graph, node)
        refused: Miss | None = None
        for group in filter(self.wants, branch_groups(graph, total)):
            branches, reason = read_branches(graph, group)
            candidates = [found for found in self.candidates(branches) if crosses_root(found)]
            best = best_merge(self.settings.cost, total, candidates)
            if isinstance(best, BranchMerge):
                return best
            refused = Miss(node.name, best or reason)
        return refused

    def rewrite(self, graph: Graph, site: BranchMerge) -> None:
        merge_branches(graph, site)

    def exactness(self, site: BranchMerge) -> Exactness:
        return site.plan.exactness

    def detail(self, site: BranchMerge) -> str:
        terms = " + ".join(branch_text(branch) for branch in site.branches)
        bias = " with a bias map" if site.plan.has_map else ""
        return f"{terms} -> Conv {kernel_text(site.plan.conv)}{bias}, {change_in_macs(site.before, site.after)}"


def branch_text(branch: Branch) -> str:
    """``Conv 3x3``, ``AveragePool, Conv 1x1``, ``skip``."""
    shown = [
        f"{node.op} {kernel_text(op)}" if node.op == "Conv" else node.op
        for node, op in zip(branch.path.nodes, branch.ops, strict=False)
    ]
    return ", ".join(shown) or "skip"


def best_merge(cost: CostModel, total: TermSum, candidates: Sequence[Sequence[Branch]]) -> BranchMerge | str:
    """The set of branches that saves most as one convolution, or the reason why none does."""
    reason = ""
    priced: list[tuple[float, int, BranchMerge]] = []
    for index, branches in enumerate(candidates):
        merge = plan_branches(cost, total, branches)
        if isinstance(merge, str):
            reason = reason or merge
            continue
        saved = cost.price(merge.before).latency_ms - cost.price(merge.after).latency_ms
        priced.append((-saved, index, merge))
    for _, _, merge in sorted(priced, key=lambda entry: entry[:2]):
        try:
            return replace(merge, merged=merge.plan.merge())
        except OverflowError as error:
            reason = str(error)
    return reason


def plan_branches(cost: CostModel, total: TermSum, branches: Sequence[Branch]) -> BranchMerge | str:
    """These branches, read by ``read_branches``, as one convolution, or the reason why not."""
    source, first = branches[0].path.source, branches[0].ops[0]
    plan = plan_sum([branch.ops for branch in branches], spatial_sizes(source, first))
    if isinstance(plan, str):
        return plan
    shape = nominal_shape(source, first.spatial_rank)
    after = plan_specs(plan, shape)
    before = [spec for branch in branches for spec in path_specs(branch.path.nodes, branch.ops, shape)]
    out = after[-1].output_shape
    before += [OperatorSpec("Add", out, dtype=after[-1].dtype, live_shapes=(out,))] * (len(branches) - 1)
    merge = BranchMerge(total, tuple(branches), plan, tuple(before), tuple(after))
    return why_not_merge(cost, before, after, merge.replaced) or merge


def merge_branches(graph: Graph, merge: BranchMerge) -> None:
    """Put the merged convolution in the place of the branches; the other terms are added to it one by one."""
    assert merge.merged is not None, "best_merge computes it"
    root, name = merge.total.root, merge.total.root.name or "sum"
    taken = {branch.term for branch in merge.branches}
    rest = [term for term in merge.total.terms if term not in taken]
    source, output = merge.branches[0].path.source, root.outputs[0]
    value = insert_merged(graph, merge.merged, source, None if rest else [output], before=root, name=name)
    if rest:
        value.shape = merged_shape(merge)
    for index, term in enumerate(rest):
        last = [output] if index == len(rest) - 1 else None
        node = graph.insert("Sub" if term.sign < 0 else "Add", [value, term.tensor], last, before=root, name=name)
        value = node.outputs[0]
    graph.remove(*merge.total.nodes, *merge.replaced)


def merged_shape(merge: BranchMerge) -> list[int | str | None] | None:
    """Shape of what the branches make: that of the term with the most known of it."""
    shapes = [branch.term.tensor.shape for branch in merge.branches]
    known = [shape for shape in shapes if shape is not None]
    return max(known, key=lambda shape: sum(dim is not None for dim in shape), default=None)
