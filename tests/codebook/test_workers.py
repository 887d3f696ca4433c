"""Layers quantized on a Dask cluster: the same bytes as in processes of this machine."""

import numpy as np
import pytest

from onnxcompress.codebook.quantizer import quantize
from onnxcompress.codebook.workers import Workers
from onnxcompress.errors import QuantizationError
from onnxcompress.testing import model


@pytest.fixture(scope="module")
def address():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def _scaled(array, factor):
    if factor < 0:
        raise QuantizationError(f"factor {factor}")
    return array * factor


@pytest.mark.slow
def test_tasks_run_on_the_cluster(address):
    large = np.ones((1 << 20) + 1)
    with Workers(dask=address) as workers:
        assert workers.jobs == 2
        found = workers.map(_scaled, [(large, 2), (np.ones(3), 3), (np.ones(2), 4)])
        assert [array[0] for array in found] == [2, 3, 4]
        with pytest.raises(QuantizationError, match="factor -1"):
            workers.map(_scaled, [(np.ones(2), -1)])


@pytest.mark.slow
def test_a_cluster_changes_no_byte(address, tmp_path):
    rng = np.random.default_rng(0)
    text = """g (float[N,48] x) => (float[N,10] y) {
        a = Gemm<transB = 1>(x, W0, b0)  r = Relu(a)  c = Gemm<transB = 1>(r, W1, b1)  s = Relu(c)
        y = Gemm<transB = 1>(s, W2, b2)
    }"""
    weights = {f"W{i}": rng.normal(size=(n, 48)).astype(np.float32) / 5 for i, n in enumerate((48, 48, 10))}
    weights |= {f"b{i}": rng.normal(size=n).astype(np.float32) for i, n in enumerate((48, 48, 10))}
    (tmp_path / "m.onnx").write_bytes(model(text, **weights).SerializeToString())
    np.savez(tmp_path / "x.npz", x=rng.normal(size=(96, 48)).astype(np.float32))
    for name, wishes in (("here", {"jobs": 1}), ("there", {"dask": address})):
        quantize(tmp_path / "m.onnx", tmp_path / f"{name}.onnx", data=str(tmp_path / "x.npz"), ratio=4, **wishes)
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "there.onnx").read_bytes()
