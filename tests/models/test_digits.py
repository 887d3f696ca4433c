"""The embedded digits model: accuracy, the structures it is there for, and how the models package is imported."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress import models
from onnxcompress.data import InputSpec, load_data
from onnxcompress.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
SPEC = InputSpec("image", np.dtype(np.float32), ("batch", 1, 8, 8))
HELD_OUT_ACCURACY = 0.993322  # 595 of 599, printed by tools/train_digits.py


@pytest.fixture(scope="module")
def model():
    return onnx.load(models.path("digits"))


@pytest.fixture(scope="module")
def session():
    return ort.InferenceSession(models.path("digits"), providers=["CPUExecutionProvider"])


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def test_accuracy_on_the_held_out_part(session):
    pytest.importorskip("sklearn")
    batches = load_data("sklearn:digits", inputs=[SPEC]).batches(100)
    correct = [session.run(["logits"], feeds)[0].argmax(1) == labels for feeds, labels in batches]
    assert np.concatenate(correct).mean() >= HELD_OUT_ACCURACY - 0.001


def test_file_and_interface(model, session):
    onnx.checker.check_model(model, full_check=True)
    assert models.path("digits").stat().st_size < 500_000  # measured 439,846
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 1, 8, 8]),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 10])]
    for batch in (1, 3):
        assert session.run(None, {"image": np.zeros((batch, 1, 8, 8), np.float32)})[0].shape == (batch, 10)


def test_batchnormalization_is_kept_and_trained(model):
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert len(nodes) == 11
    for node in nodes:
        training = [a.i for a in node.attribute if a.name == "training_mode"]
        assert training == [0]
        assert len(node.output) == 1
        scale, mean, var = (weights[node.input[k]] for k in (1, 3, 4))
        # Not the identity: dropping the node would change the outputs.
        assert min(np.ptp(scale), np.ptp(mean), np.ptp(var)) > 0


def test_linear_structures(model):
    made_by = producers(model)

    def source(node, index=0):
        return made_by.get(node.input[index])

    def ops(nodes):
        return sorted("None" if node is None else node.op_type for node in nodes)

    def under_norm(node):
        """The tensor that a branch reads, and the kernel of its convolution."""
        conv = source(node)
        if conv is None or conv.op_type != "Conv":
            return node.input[0], None
        return conv.input[0], next(tuple(a.ints) for a in conv.attribute if a.name == "kernel_shape")

    adds = [node for node in model.graph.node if node.op_type == "Add"]
    parallel = [
        [under_norm(source(add, k)) for k in (0, 1)]
        for add in adds
        if ops([source(add, 0), source(add, 1)]) == ["BatchNormalization"] * 2
    ]
    assert [[kernel for _, kernel in branches] for branches in parallel] == [[(3, 3), (1, 1)]] * 2
    assert all(first[0] == second[0] for first, second in parallel)
    inner = [add for add in adds if ops([source(add, 0), source(add, 1)]) == ["Add", "BatchNormalization"]]
    assert [under_norm(source(add, 1))[0] for add in inner] == [parallel[0][0][0]]  # the identity branch

    (concat,) = (node for node in model.graph.node if node.op_type == "Concat")
    branches = [source(concat, k) for k in range(3)]
    assert ops(branches) == ["Conv"] * 3
    assert len({node.input[0] for node in branches}) == 1

    readers = {name: node for node in model.graph.node for name in node.input}
    chains = Counter()
    for node in model.graph.node:
        chains[node.op_type, readers[node.output[0]].op_type if node.output[0] in readers else "output"] += 1
    assert chains["Concat", "Conv"] == 1
    assert chains["Conv", "Conv"] == 1
    assert chains["BatchNormalization", "Conv"] == 2  # in the chain, and before the activation
    assert chains["GlobalAveragePool", "Flatten"] == 1
    assert chains["Gemm", "Gemm"] == 1


def test_chain_pads_at_its_first_convolution(model):
    pads = {
        node.input[1]: (list(attribute["kernel_shape"]), list(attribute["pads"]))
        for node in model.graph.node
        if node.op_type == "Conv"
        for attribute in [{a.name: a.ints for a in node.attribute}]
    }
    chain = [pads[f"features.4.{name}.weight"] for name in ("widen", "spatial.0", "narrow.0")]
    assert chain == [([1, 1], [1] * 4), ([3, 3], [0] * 4), ([1, 1], [0] * 4)]


def test_file_is_the_architecture_with_its_weights(model, session):
    torch = pytest.importorskip("torch")
    from onnxcompress.models.digits import Digits

    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    # The exporter writes equal initializers once; an Identity gives the other name.
    weights |= {n.output[0]: weights[n.input[0]] for n in model.graph.node if n.op_type == "Identity"}
    net = Digits()
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = np.random.default_rng(0).random((16, 1, 8, 8), np.float32)
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(images)).numpy()
    (logits,) = session.run(None, {"image": images})
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 2e-6  # measured 2.8e-7


def test_unknown_model():
    with pytest.raises(ModelError, match="no model 'letters' comes with onnxcompress; there is digits"):
        models.path("letters")


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_the_package_loads_no_torch():
    code = "import sys, onnxcompress.models as m; m.path('digits'); print('torch' in sys.modules, m.__name__)"
    assert python(code).stdout == "False onnxcompress.models\n"


@pytest.mark.parametrize("statement", ["import models", "import models.digits"])
def test_the_package_has_one_name(statement):
    stderr = python(statement).stderr
    assert "ImportError: import it as onnxcompress.models, not as models" in stderr
