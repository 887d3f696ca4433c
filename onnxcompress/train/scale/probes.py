"""How much each residual block adds to what a linear probe can read from the features (Wang et al. 2019).

Behind a block the features are averaged over space, or over tokens, and a logistic regression is fitted on them. The
importance of a block is the accuracy of that probe on held-out samples minus that of the probe on what the block reads.
The graph runs once, on onnxruntime, with the means as further outputs; no gradient is needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcompress.data import Dataset
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph import Graph, Node, Tensor, is_op, rank
from onnxcompress.model_io import to_proto
from onnxcompress.runtime import Runtime

if TYPE_CHECKING:
    from onnxcompress.train.depth.blocks import Block

logger = logging.getLogger(__name__)

MAX_SAMPLES = 4096  # a probe on more takes longer and ranks alike
BATCH = 64
MAX_ITERATIONS = 300
CHANNELS_FIRST = ("BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "InstanceNormalization")
CHANNELS_LAST = ("LayerNormalization", "MatMul")


def rank_by_probes(
    graph: Graph,
    blocks: Sequence[Block],
    samples: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray | None = None,
    *,
    held_out: float = 0.25,
    seed: int = 0,
    limit: int = MAX_SAMPLES,
    runtime: Runtime | None = None,
) -> dict[str, float]:
    """The importance of blocks; that with the lowest goes first.

    Args:
        graph: The network, as ``depth.preparation.prepare`` leaves it.
        blocks: Of this graph.
        samples: Values by input name, without the batch axis.
        labels: (n,) class of each sample; the class that the network itself gives when None.
        held_out: Share of the samples on which probes are judged.
        seed: Chooses the samples; same seed, same result.
        limit: Most samples that are used, drawn evenly.
        runtime: Where the graph runs; one of its own when None.

    Returns:
        By name of the block: accuracy behind it minus accuracy before it, from -1 to 1.

    Raises:
        DataError: Too few samples, or they have one class; scikit-learn is not installed.
        ModelError: A feature that is no tensor of known rank, or no class to read where there are no labels.
    """
    _logistic_regression()
    names = list(dict.fromkeys(name for block in blocks for name in (block.source, block.output)))
    chosen = _chosen(len(samples), limit, seed)
    features, found = probe_features(graph, names, [samples[i] for i in chosen], labels is None, runtime)
    classes = found if labels is None else np.asarray(labels)[chosen]
    if classes is None or classes.ndim != 1 or classes.dtype.kind not in "iub":
        raise DataError("probes need one class for each sample")
    fitted, judged = _parts(classes, held_out)
    accuracy = {name: probe_accuracy(features[name], classes, fitted, judged) for name in names}
    for name, value in accuracy.items():
        logger.info("probe on %s: %.4f", name, value)
    return {block.name: accuracy[block.output] - accuracy[block.source] for block in blocks}


def _chosen(count: int, limit: int, seed: int) -> list[int]:
    """Which samples are used, in the order in which they are shared out."""
    order = np.random.PCG64(seed).random_raw(count).argsort(kind="stable")
    return [int(i) for i in order[:limit]]


def _parts(classes: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples to fit on and to judge by."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out {held_out}: must be between 0 and 1")
    border = round(len(classes) * (1 - held_out))
    fitted, judged = np.arange(border), np.arange(border, len(classes))
    if not len(judged) or len(np.unique(classes[fitted])) < 2:
        raise DataError(
            f"probes are fitted on {len(fitted)} samples and judged by {len(judged)}: some of two classes are needed"
        )
    return fitted, judged


def probe_accuracy(features: np.ndarray, classes: np.ndarray, fitted: np.ndarray, judged: np.ndarray) -> float:
    """Accuracy of a logistic regression on standardized features.

    Args:
        features: (n, d) float.
        classes: (n,).
        fitted: Rows to fit on.
        judged: Rows to judge by.
    """
    model = _logistic_regression()(max_iter=MAX_ITERATIONS)
    mean, spread = features[fitted].mean(0), features[fitted].std(0)
    standard = (features - mean) / np.where(spread > 0, spread, 1.0)
    with warnings.catch_warnings():
        # A probe that has not converged ranks as well: all have the same number of steps.
        warnings.simplefilter("ignore")
        model.fit(standard[fitted], classes[fitted])
    return float((model.predict(standard[judged]) == classes[judged]).mean())


def _logistic_regression() -> type:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise DataError("probes need scikit-learn, which is not installed: pip install onnxcompress[data]") from error
    found: type = LogisticRegression
    return found


# -- features --------------------------------------------------------------------------------------------------------


def probe_features(
    graph: Graph,
    names: Sequence[str],
    samples: Sequence[Mapping[str, np.ndarray]],
    with_classes: bool = False,
    runtime: Runtime | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Means over space or tokens of tensors.

    Args:
        graph: The network.
        names: Of tensors.
        samples: Values by input name, without the batch axis.
        with_classes: Also tell the class that the network gives, by its first output.
        runtime: Where the graph runs; one of its own when None.

    Returns:
        By name (n, channels) float64, and (n,) classes or None.

    Raises:
        ModelError: There is no such tensor, its rank is not known, or the first output has no classes.
    """
    proto, outputs = _tapped(graph, names)
    if with_classes:
        if rank(graph.outputs[0]) != 2:
            raise ModelError(f"output {graph.outputs[0].name!r} has no class for each sample: give labels")
        outputs = [*outputs, graph.outputs[0].name]
    own = Runtime() if runtime is None else None
    used = runtime or own
    assert used is not None
    try:
        runs = used.run(proto.SerializeToString(), _feeds(proto, samples), outputs=outputs)
    finally:
        if own is not None:
            own.close()
    columns = [np.concatenate([np.asarray(run[i]) for run in runs]) for i in range(len(outputs))]
    features = {name: column.astype(np.float64) for name, column in zip(names, columns, strict=False)}
    return features, columns[-1].argmax(1) if with_classes else None


def _feeds(proto: onnx.ModelProto, samples: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The samples in batches; one by one where the model says so."""
    first = proto.graph.input[0].type.tensor_type.shape.dim
    fixed = int(first[0].dim_value) if len(first) and first[0].HasField("dim_value") else None
    if fixed is not None and fixed > 1:
        raise ModelError(f"the model takes {fixed} samples at a time: probes need a batch of 1, or an open one")
    for feed, _ in Dataset(samples, batch=fixed).batches(BATCH):
        yield feed


def _tapped(graph: Graph, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """The model with means of tensors as further outputs, and their names."""
    tensors: dict[str, Tensor] = {t.name: t for node in graph.nodes for t in (*node.inputs, *node.outputs)}
    proto = onnx.ModelProto()
    proto.CopyFrom(to_proto(graph))
    outputs = []
    for name in names:
        axes = _mean_axes(tensors.get(name), name)
        tap = graph.scope.fresh(f"{name}/mean")
        if axes and graph.opset >= 18:
            given = numpy_helper.from_array(np.array(axes, np.int64), graph.scope.fresh(f"{tap}_axes"))
            proto.graph.initializer.append(given)
            node = helper.make_node("ReduceMean", [name, given.name], [tap], keepdims=0)
        elif axes:
            node = helper.make_node("ReduceMean", [name], [tap], axes=axes, keepdims=0)
        else:
            node = helper.make_node("Identity", [name], [tap])
        proto.graph.node.append(node)
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensors[name].dtype or np.float32))
        proto.graph.output.append(helper.make_tensor_value_info(tap, dtype, None))
        outputs.append(tap)
    return proto, outputs


def _mean_axes(tensor: Tensor | None, name: str) -> list[int]:
    """The axes of space or tokens: all but the first and that of the channels."""
    axes = rank(tensor)
    if tensor is None or axes is None or axes < 2:
        raise ModelError(
            f"{name!r} is no tensor whose channels a probe can read (shape {getattr(tensor, 'shape', None)})"
        )
    channels = 1 if axes != 3 else 2
    for reader in tensor.outputs:
        found = _channel_axis(reader, axes)
        if found is not None:
            channels = found
            break
    return [axis for axis in range(1, axes) if axis != channels]


def _channel_axis(reader: Node, axes: int) -> int | None:
    """Where a node that reads a tensor has its channels."""
    if is_op(reader, *CHANNELS_FIRST):
        return 1
    if is_op(reader, *CHANNELS_LAST):
        return axes - 1
    if is_op(reader, "Transpose") and axes == 4 and list(reader.attrs.get("perm") or ()) == [0, 3, 1, 2]:
        return axes - 1
    return None
