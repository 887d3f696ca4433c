"""What a pass is: ``match`` decides and touches nothing, ``rewrite`` acts and never declines.

    class FuseXIntoY(RewritePass[Site]):
        name = "fuse-x-into-y"
        ops = ("X",)

        def match(self, graph, node) -> Site | Miss | None: ...
        def rewrite(self, graph, site) -> None: ...

A pass from outside is a class with this contract, announced in the entry point group ``onnxcompress.passes``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from onnxcompress.cost import CostModel, MacsAndBytes
from onnxcompress.errors import OnnxCompressError, PassError
from onnxcompress.graph import STANDARD_DOMAINS, Graph, Node
from onnxcompress.linear import Exactness
from onnxcompress.shapes import infer_shapes

logger = logging.getLogger(__name__)

S = TypeVar("S")


@dataclass(frozen=True)
class Miss:
    """A place that looked right and must stay, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that was done: where, in which exactness class, and a detail worth reporting."""

    node: str
    exactness: Exactness = Exactness.EXACT
    detail: str = ""


@dataclass
class PassResult:
    """What one pass did."""

    name: str
    is_merge: bool = False
    done: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    @property
    def rewrites(self) -> int:
        return len(self.done)


@dataclass
class Allowance:
    """How many approximate rewrites (class 4) may still be done; every one that is done takes from it."""

    left: int = 0


@dataclass(frozen=True)
class Settings:
    """What passes may know of the user's wishes.

    Args:
        max_constant_bytes: Constant folding may not make a tensor larger than this, nor grow the file by more.
        cost: Prices candidate operators; a merge that does not pay is not done.
        approximate: How many rewrites of class 4 may be done; their error is measured on the whole model afterwards.
        evaluate: Runs a single-node model on given inputs; constant folding uses it. None leaves such nodes alone.
    """

    max_constant_bytes: int = 1 << 20
    cost: CostModel = field(default_factory=MacsAndBytes)
    approximate: Allowance = field(default_factory=Allowance)
    evaluate: Callable[[Any, dict[str, Any]], list[Any]] | None = None


class RewritePass(Generic[S]):
    """Base of every pass.

    Attributes:
        name: Starts with a verb; the file, the class and the test have the same name in their own spelling.
        ops: Operator types at which ``match`` is asked; empty for all.
        domains: Domains of those operators.
    """

    name: ClassVar[str]
    ops: ClassVar[tuple[str, ...]] = ()
    domains: ClassVar[frozenset[str | None]] = STANDARD_DOMAINS
    # Whether the pass trades one form of a linear operator for another by cost; such passes can be dropped together.
    is_merge: ClassVar[bool] = False
    # Rounds of whole-graph sweeps before the pass is declared not to come to rest.
    MAX_SWEEPS: ClassVar[int] = 1000

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def match(self, graph: Graph, node: Node) -> S | Miss | None:
        """The site at ``node``; a Miss when it looked right and must stay; None when it is another thing."""
        raise NotImplementedError

    def rewrite(self, graph: Graph, site: S) -> None:
        """Do it."""
        raise NotImplementedError

    def exactness(self, site: S) -> Exactness:
        """The exactness class of the rewrite at this site."""
        return Exactness.EXACT

    def detail(self, site: S) -> str:
        """One line about this site for the report."""
        return ""

    def apply(self, graph: Graph) -> PassResult:
        """Run to the pass's own fixed point over the graph and every graph nested in it.

        Raises:
            PassError: The pass failed, or it still rewrites after ``MAX_SWEEPS`` sweeps.
        """
        result = PassResult(self.name, self.is_merge)
        previous = graph.scope.pass_name
        graph.scope.pass_name = self.name
        try:
            for _ in range(self.MAX_SWEEPS):
                before = result.rewrites
                result.misses.clear()
                for inner in list(graph.walk()):
                    self.sweep(inner, result)
                if result.rewrites == before:
                    return result
                # Shapes of new tensors are needed by the next sweep, and order by everyone.
                for inner in graph.walk():
                    inner.sort()
                infer_shapes(graph)
            raise PassError(
                f"pass {self.name} does not come to rest: {result.rewrites} rewrites in {self.MAX_SWEEPS} sweeps"
            )
        finally:
            graph.scope.pass_name = previous

    def sweep(self, graph: Graph, result: PassResult) -> None:
        """One walk over the nodes of one graph."""
        for node in list(graph.nodes):
            if node.graph is not graph or (self.ops and node.op not in self.ops) or node.domain not in self.domains:
                continue
            label = node.name or node.op
            try:
                site = self.match(graph, node)
                if isinstance(site, Miss):
                    result.misses.append(site)
                    continue
                if site is None:
                    continue
                done = Rewrite(label, self.exactness(site), self.detail(site))
                self.rewrite(graph, site)
            except OnnxCompressError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise PassError(f"pass {self.name} failed at node {label!r}: {what}") from error
            logger.debug("%s: %s", self.name, label)
            result.done.append(done)


def remove_if_unread(graph: Graph, nodes: Iterable[Node]) -> None:
    """Remove those nodes whose outputs nothing reads any more; called at the end of a rewrite, readers first."""
    for node in nodes:
        if node.graph is graph and not any(t.outputs or graph.is_output(t) for t in node.outputs):
            graph.remove(node)
