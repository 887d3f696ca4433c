"""Fit the last linear operator of a pruned block to what the block gave before, by least squares.

A pruned block is one linear map, and what is left of the original when its activations are gone is seldom the best
one. With Z what the block's last Conv or matrix reads in the pruned network, and Y what it would have to make for the
block to give what it gave in the original,

    W' = W + (Z^T Z + r I)^-1 Z^T (Y - Z W),        r a small share of the mean diagonal,

for centred Z and Y; the means go into the bias, or into the BatchNormalization that follows. Blocks are fitted in
order of execution, each on what the fitted ones before it make, so that a later block repairs what an earlier one
loses. No labels are needed and no gradient.

For a search each block is fitted alone, and the supernet mixes its weights by lambda as it mixes the flows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.graph import Graph, Node, is_constant, is_op, rank
from onnxcompress.shapes import infer_shapes
from onnxcompress.train.batchnorm import Feeds
from onnxcompress.train.cached_runs import CachedRuns
from onnxcompress.train.depth.blocks import Block, find_blocks, locate, without_overlaps
from onnxcompress.train.depth.edits import Mixer, centre, rewire
from onnxcompress.train.depth.kinds import is_pointwise
from onnxcompress.train.depth.preparation import copy_graph
from onnxcompress.train.depth.steps import Step, read_branch
from onnxcompress.train.depth.supernet import Supernet
from onnxcompress.train.depth.training import Lambdas
from onnxcompress.train.torch_graph import BatchNormNames, TorchGraph

RIDGE = 1e-3
LARGEST_GRAM = 4608  # rows: 512 channels of 3x3 taps


@dataclass(frozen=True)
class BlockFit:
    """What the fit of a block brought.

    Attributes:
        name: The block.
        before: ||Y - Y'|| / ||Y - mean|| of the block's output, in front of an activation at its end, on the samples
            that were fitted.
        after: Likewise with the fitted weights.
        reason: Why it was left as it is; empty where it was fitted.
    """

    name: str
    before: float
    after: float
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Place:
    """The last linear operator of a block in the supernet, and the names of the tensors around it."""

    step: Step
    node: Node
    reads: str
    makes: str
    weight: str
    transposed: bool  # a matrix as (out, in)
    norm: BatchNormNames | None  # the BatchNormalization behind it
    epsilon: float
    bias: str  # where the means go without one; "" for nowhere
    branch: str  # end of the branch
    skip: str  # what is added to it; "" for nothing
    wanted: str  # the block's output in the original
    axes: tuple[int, ...] | None  # from the layout of the block's output to that of ``makes``
    taps: tuple[int, ...] | None  # the one tap that counts


def fit_blocks(
    twin: TorchGraph,
    supernet: Supernet,
    original: TorchGraph,
    calibration: Sequence[Feeds],
    *,
    lambdas: Lambdas,
    settle: bool = True,
) -> list[BlockFit]:
    """Fit the blocks of a supernet's twin, in order of execution; all are pruned in the end.

    Behind the first of them every other block of the network is fitted as well, and so is the last linear operator in
    front of an output: they keep their form, and make up for what is missing by then.

    Args:
        twin: Of the supernet, with the original weights; the fitted ones are put into it.
        supernet: Its structure; every block is pruned.
        original: Runs the original graph.
        calibration: Feeds.
        lambdas: Of the twin.
        settle: Whether BatchNormalization is estimated anew, in front of each fit and in the end.

    Returns:
        Of the blocks that were pruned, and of all else behind them that was fitted.
    """
    runs = CachedRuns(twin.eval(), calibration, settle=settle)
    original_runs = CachedRuns(original, calibration)
    parts = _parts(supernet)
    first = min((i for i, part in enumerate(parts) if part.block in supernet.lambdas), default=len(parts))
    places = [_place(twin, part) for part in parts]
    fits: list[BlockFit] = []
    pruned: list[str] = []
    for index, (part, place) in enumerate(zip(parts, places, strict=True)):
        if index < first:
            continue
        if part.block in supernet.lambdas:
            pruned.append(part.block)
            lambdas.prune(pruned)
        if isinstance(place, str):
            fit = BlockFit(part.block, math.nan, math.nan, place)
        else:
            later = [name for block, name in supernet.lambdas.items() if block not in pruned]
            runs.keep([*later, *_fitted_names(places[index:])])
            original_runs.keep([other.wanted for other in places[index:] if isinstance(other, _Place)])
            fit = _fit(part.block, runs, original_runs, place)
        if part.block in supernet.lambdas or not fit.reason:
            fits.append(fit)
    runs.settle()
    return fits


def fit_outputs(runs: CachedRuns, original: CachedRuns) -> list[BlockFit]:
    """Fit the last linear operator in front of each output to what another network gives there.

    Args:
        runs: Of the twin whose numbers are changed; what they do not change is kept.
        original: Has outputs of the same names and shapes, and runs on the same samples.
    """
    places = _output_places(runs.network)
    runs.keep(_fitted_names(places.values()))
    return [
        BlockFit(name, math.nan, math.nan, place) if isinstance(place, str) else _fit(name, runs, original, place)
        for name, place in places.items()
    ]


def fitted_at_outputs(twin: TorchGraph) -> list[str]:
    """The initializers that ``fit_outputs`` changes."""
    return _fitted_names(_output_places(twin).values())


def fit_supernet(
    supernet: Supernet,
    original: TorchGraph,
    calibration: Sequence[Feeds],
    *,
    settle: bool = True,
    device: torch.device | None = None,
) -> tuple[Supernet, list[BlockFit]]:
    """A supernet whose pruned flows have fitted weights of their own: (1 - l) * W + l * W'.

    Args:
        supernet: With shared weights; not changed.
        original: Runs the original graph, on ``device``.
        calibration: Feeds, on ``device``.
        settle: Whether BatchNormalization is estimated anew in front of each fit.
        device: Where to compute.
    """
    twin = TorchGraph(supernet.graph).to(device or torch.device("cpu")).eval()
    lambdas = Lambdas(twin, supernet.lambdas)
    start = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    graph = copy_graph(supernet.graph)
    fits = []
    runs, original_runs = CachedRuns(twin, calibration, settle=settle), CachedRuns(original, calibration)
    places = [_place(twin, _part(supernet.original, block)) for block in supernet.blocks]
    for index, (block, place) in enumerate(zip(supernet.blocks, places, strict=True)):
        if isinstance(place, str):
            fits.append(BlockFit(block.name, math.nan, math.nan, place))
            continue
        lambdas.prune([])
        later = [supernet.lambdas[other.name] for other in supernet.blocks[index:]]
        runs.keep([*later, *_fitted_names(places[index:])])
        original_runs.keep([other.wanted for other in places[index:] if isinstance(other, _Place)])
        lambdas.prune([block.name])
        fit = _fit(block.name, runs, original_runs, place)
        fits.append(fit)
        if not fit.reason:
            names = {place.weight, *([place.norm.scale, place.norm.bias] if place.norm else [place.bias])} - {""}
            held = twin.state_dict()
            _mix(graph, supernet.lambdas[block.name], {name: held[name].cpu() for name in names})
        twin.load_state_dict(start)
    graph.sort()
    infer_shapes(graph)
    return replace(supernet, graph=graph), fits


def _mix(graph: Graph, lambda_name: str, fitted: Mapping[str, Tensor]) -> None:
    """Let the nodes that read these initializers read a mix of them and of the fitted numbers."""
    constants = {str(t.name): t for node in graph.nodes for t in node.inputs if is_constant(t)}
    pruned = constants[lambda_name]
    base = next(node.outputs[0] for node in pruned.outputs if node.op == "Sub")
    for name in sorted(fitted):
        own = constants[name]
        readers = list(own.outputs)
        other = graph.new_constant(f"{name}.fitted", fitted[name].numpy().astype(own.dtype))
        mixed = Mixer(base, pruned).mix(graph, own, other, before=readers[0], name=f"{name}.fitted")
        rewire(readers, own, mixed)


# -- where -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of the original graph that ends in a linear operator.

    Attributes:
        block: Name of the block; of the tensor where it is none.
        steps: As far back as they could be read.
        output: Tensor in the original that is to come out.
        add: The Add at its end, and the place of the branch among its inputs; None without a skip.
        reason: Why it cannot be fitted.
        capped: Whether the last kernel is kept to its centre.
    """

    block: str
    steps: tuple[Step, ...]
    output: str
    add: tuple[str, int] | None = None
    reason: str = ""
    capped: bool = False


def _parts(supernet: Supernet) -> list[_Part]:
    """The blocks of a supernet, the other blocks of its original, and its outputs, in order of execution."""
    graph, pruned = supernet.original, list(supernet.blocks)
    inside = {name for block in pruned for name in block.nodes}
    others = [block for block in without_overlaps(find_blocks(graph)[0]) if not inside.intersection(block.nodes)]
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    blocks = sorted(
        [*pruned, *others], key=lambda block: max(order[name] for name in (*block.nodes, block.add) if name)
    )
    parts = [_part(graph, block, kept=block in others) for block in blocks]
    for output in graph.outputs:
        if all(part.output != output.name for part in parts):
            parts.append(_Part(str(output.name), read_branch(graph, output, None).steps, str(output.name)))
    return parts


def _part(graph: Graph, block: Block, *, kept: bool = False) -> _Part:
    if block.kind == "residual" and not kept:
        return _Part(block.name, (), block.output, reason="nothing is left of it")
    site = locate(graph, block)
    if site.add is None:
        return _Part(block.name, site.branch.steps, block.output)
    steps, end = site.branch.steps, site.branch.output
    if block.kind == "residual":
        end = next(tensor for tensor in site.add.inputs if tensor is not site.source)
        steps = read_branch(graph, end, [site.add]).steps
    index = next(i for i, tensor in enumerate(site.add.inputs) if tensor is end)
    capped = block.kind == "basic-3x3" and not kept
    return _Part(block.name, steps, block.output, (site.add.name, index), capped=capped)


def _place(twin: TorchGraph, part: _Part) -> _Place | str:
    """Where to fit, or the reason why there is no such place."""
    steps = part.steps
    if part.reason or not any(step.kind in ("conv", "matrix") for step in steps):
        return part.reason or "no linear operator was found at its end"
    index = max(i for i, step in enumerate(steps) if step.kind in ("conv", "matrix"))
    step, after = steps[index], steps[index + 1 :]
    if any(later.kind not in ("scale", "transpose") for later in after):
        return "its last linear operator is not at its end"
    nodes = {node.name: node for node in twin.graph.nodes}
    node, last = nodes[step.nodes[0].name], nodes[steps[-1].nodes[-1].name]
    capped = part.capped
    holder = nodes[f"{part.block}.cap"] if capped else node
    weights = [tensor for tensor in holder.inputs[:2] if is_constant(tensor)]
    if len(weights) != 1 or len(weights[0].outputs) != 1 or str(weights[0].name) not in twin.state_dict():
        return "the weight of its last linear operator is no parameter of its own"
    reason = _why_not_matrix(node) if step.conv is None else _why_not_conv(step, capped)
    if reason:
        return reason
    following = [nodes[later.nodes[0].name] for later in after]
    norm = next((other for other in following if is_op(other, "BatchNormalization")), None)
    names = None if norm is None else next(n for n in twin.batch_normalizations if n.node == norm.name)
    if names is not None and not all((names.scale, names.bias, names.mean, names.variance)):
        return "a number of the BatchNormalization behind its last linear operator is no constant"
    branch, skip = last.outputs[0], ""
    if part.add is not None:
        add, index = nodes[part.add[0]], part.add[1]
        branch, skip = add.inputs[index], str(add.inputs[1 - index].name)
    axes: tuple[int, ...] | None = None
    for other in reversed(following):
        if other.op == "Transpose":
            inverse = tuple(sorted(range(len(other.attrs["perm"])), key=other.attrs["perm"].__getitem__))
            axes = inverse if axes is None else tuple(axes[i] for i in inverse)
    return _Place(
        step,
        node,
        str(node.inputs[0].name),
        str(node.outputs[0].name),
        str(weights[0].name),
        bool(node.attrs.get("transB", 0)),
        names,
        float(norm.attrs.get("epsilon", 1e-5)) if norm is not None else 0.0,
        _bias(twin, node, following),
        str(branch.name),
        skip,
        part.output,
        axes,
        tuple(centre(step.conv)) if capped and step.conv is not None else None,
    )


def _output_places(twin: TorchGraph) -> dict[str, _Place | str]:
    graph = twin.graph
    parts = [_Part(str(out.name), read_branch(graph, out, None).steps, str(out.name)) for out in graph.outputs]
    return {part.block: _place(twin, part) for part in parts}


def _fitted_names(places: Iterable[_Place | str]) -> list[str]:
    """The initializers that fits change."""
    found: list[str] = []
    for place in places:
        if isinstance(place, _Place):
            norm = place.norm
            found += [place.weight, *([norm.scale, norm.bias, norm.mean, norm.variance] if norm else [place.bias])]
    return [name for name in found if name]


def _why_not_matrix(node: Node) -> str:
    if is_constant(node.inputs[0]):
        return "its last matrix stands on the left"
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("transA", 0):
        return "its last Gemm scales or transposes what it reads"
    return ""


def _why_not_conv(step: Step, capped: bool) -> str:
    conv = step.conv
    assert conv is not None
    if conv.group != 1:
        return f"its last Conv has {conv.group} groups"
    if not (is_pointwise(step) or capped) and conv.spatial_rank != 2:
        return f"its last Conv has {conv.spatial_rank} spatial axes"
    rows = conv.in_channels * (1 if capped else math.prod(conv.kernel))
    return f"its last Conv reads {rows} numbers at a time, more than {LARGEST_GRAM}" if rows > LARGEST_GRAM else ""


def _bias(twin: TorchGraph, node: Node, following: Sequence[Node]) -> str:
    """The parameter that adds to what the operator makes, before anything scales it; "" for none of its own."""
    candidates = list(node.inputs[2:3]) if node.attrs.get("beta", 1.0) == 1.0 else []
    if following and is_op(following[0], "Add"):
        candidates += [tensor for tensor in following[0].inputs if is_constant(tensor)]
    own = dict(twin.named_parameters())
    for tensor in candidates:
        if is_constant(tensor) and len(tensor.outputs) == 1 and str(tensor.name) in own and rank(tensor) == 1:
            return str(tensor.name)
    return ""


# -- numbers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fit(name: str, runs: CachedRuns, original: CachedRuns, place: _Place) -> BlockFit:
    twin = runs.network
    sums, slope = _Sums(), torch.empty(0)
    read = [place.reads, place.makes, place.branch, *([place.skip] if place.skip else [])]
    runs.settle(read)
    for found, (wanted,) in zip(runs(read), (each.values() for each in original([place.wanted])), strict=True):
        slope = slope if slope.numel() else _slope(twin, place, found[place.makes], found[place.branch])
        missing = wanted - found[place.branch]
        if place.skip:
            missing = missing - found[place.skip]
        sums.add(_rows(place, found[place.reads]), _columns(place, missing) / slope, _columns(place, wanted))
    centred = place.norm is not None or bool(place.bias)
    change, intercept = sums.solve(centred=centred)
    before, after = sums.errors(slope, change, centred=centred)
    if not after < before:
        return BlockFit(name, before, before, "the fit is no better than what is there")
    weight = _change_weight(twin, place, change)
    if place.norm is not None:
        _renormalize(twin, place.norm, place.epsilon, intercept, *sums.statistics(weight))
    elif place.bias:
        twin.get_parameter(place.bias).add_(intercept.to(twin.float_type))
    return BlockFit(name, before, after)


class _Sums:
    """Sums over rows, in float64: of z, of r (what is missing), and of y (what is wanted)."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: list[Tensor] = []

    def add(self, z: Tensor, r: Tensor, y: Tensor) -> None:
        z, r, y = z.double(), r.double(), y.double()
        parts = [z.T @ z, z.T @ r, z.sum(0), r.sum(0), (r * r).sum(0), y.sum(0), (y * y).sum(0)]
        self.parts = [a + b for a, b in zip(self.parts, parts, strict=True)] if self.parts else parts
        self.count += len(z)

    def _moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        zz, zr, z, r, rr, _, _ = self.parts
        if not centred:
            return zz, zr, rr
        return zz - z[:, None] * z / self.count, zr - z[:, None] * r / self.count, rr - r * r / self.count

    def solve(self, *, centred: bool) -> tuple[Tensor, Tensor]:
        """The change of the matrix, (inputs, outputs), and what is to be added to the outputs, (outputs,)."""
        zz, zr, _ = self._moments(centred)
        ridge = RIDGE * zz.diagonal().mean().clamp(min=torch.finfo(zz.dtype).tiny)
        change = torch.linalg.solve(zz + ridge * torch.eye(len(zz), dtype=zz.dtype, device=zz.device), zr)
        z, r = self.parts[2:4]
        return change, (r - z @ change) / self.count if centred else torch.zeros_like(r)

    def errors(self, slope: Tensor, change: Tensor, *, centred: bool) -> tuple[float, float]:
        """Relative errors of the block's output, without the change and with it."""
        zz, zr, rr = self._moments(centred)
        left = rr - 2 * (change * zr).sum(0) + (change * (zz @ change)).sum(0)
        y, yy = self.parts[5:]
        spread = (yy - y * y / self.count).sum().clamp(min=torch.finfo(yy.dtype).tiny)
        squares = slope.double().square()
        before, after = (((squares * e).sum() / spread).clamp(min=0).sqrt() for e in (self.parts[4], left))
        return float(before), float(after)

    def statistics(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``z @ weight``, (inputs, outputs)."""
        zz, _, _ = self._moments(True)
        return self.parts[2] @ weight / self.count, (weight * (zz @ weight)).sum(0).clamp(min=0) / self.count


def _rows(place: _Place, z: Tensor) -> Tensor:
    """What the operator reads for each of its outputs, (positions, numbers)."""
    conv = place.step.conv
    if conv is None:
        return z.reshape(-1, z.shape[-1])
    if place.taps is not None or math.prod(conv.kernel) == 1:
        every = (slice(None), slice(None), *(slice(None, None, stride) for stride in conv.strides))
        z = z[every]
        return z.movedim(1, -1).reshape(-1, z.shape[1])
    # The supernet may have moved them, and writes them out where it has; auto_pad is resolved in the step.
    top, left, bottom, right = place.node.attrs.get("pads") or conv.pads
    columns = F.unfold(F.pad(z, (left, right, top, bottom)), conv.kernel, conv.dilations, 0, conv.strides)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _columns(place: _Place, y: Tensor) -> Tensor:
    """A tensor with the layout of the block's output as (positions, channels), in the order of ``_rows``."""
    if place.axes is not None:
        y = y.permute(place.axes)
    return y.reshape(-1, y.shape[-1]) if place.step.conv is None else y.movedim(1, -1).reshape(-1, y.shape[1])


def _slope(twin: TorchGraph, place: _Place, made: Tensor, branch: Tensor) -> Tensor:
    """By how much each channel at the end of the branch grows with what the operator makes, (channels,)."""
    grown = twin({place.makes: made + 1.0}, [place.branch])[place.branch]
    slope = _columns(place, grown - branch).mean(0)
    # A channel that is as good as switched off asks for weights that are as good as infinite.
    dead = slope.abs() < 1e-4 * slope.abs().max()
    return torch.where(dead, torch.full_like(slope, torch.inf), slope)


def _change_weight(twin: TorchGraph, place: _Place, change: Tensor) -> Tensor:
    """Add the change to the weight; returns all of it as (inputs, outputs)."""
    weight: Tensor = twin.state_dict()[place.weight]
    if place.step.conv is None:
        matrix = weight.T if place.transposed else weight
    elif place.taps is not None:
        tap: tuple[slice | int, ...] = (slice(None), slice(None), *place.taps)
        matrix = weight[tap].T
    else:
        matrix = weight.reshape(len(weight), -1).T
    matrix.add_(change.to(matrix.dtype))  # a view
    return matrix.double()


def _renormalize(
    twin: TorchGraph, norm: BatchNormNames, epsilon: float, intercept: Tensor, mean: Tensor, variance: Tensor
) -> None:
    """New statistics, and scale and bias such that the same comes out, with the intercept added in front."""
    held = twin.state_dict()
    scale, bias, old_mean, old_variance = (held[name] for name in (norm.scale, norm.bias, norm.mean, norm.variance))
    slope = scale.double() / (old_variance.double() + epsilon).sqrt()
    bias.copy_(bias.double() + slope * (mean - old_mean.double() + intercept))
    scale.copy_(slope * (variance + epsilon).sqrt())
    old_mean.copy_(mean)
    old_variance.copy_(variance)
