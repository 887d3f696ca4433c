"""Frames: what goes through the pipe comes out the same."""

import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcompress.runtime_frames import ELEMENT_BITS, ELEMENT_NAMES, array, decode, encode, pack, receive, send, unpack

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TEXTS = st.text(max_size=3)


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@st.composite
def tensors(draw):
    number = draw(st.sampled_from(sorted(ELEMENT_NAMES)))
    dtype, shape = dtype_of(ELEMENT_NAMES[number]), draw(SHAPES)
    limit = 2 ** ELEMENT_BITS.get(number, 8) if ELEMENT_NAMES[number] != "bool" else 2
    size = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.lists(st.integers(0, limit - 1), min_size=size, max_size=size))
    return np.array(raw, np.uint8).view(dtype).reshape(shape)


STRINGS = hnp.arrays(object, SHAPES, elements=TEXTS)
MAPS = st.dictionaries(st.integers(-9, 9) | TEXTS, st.floats(allow_nan=False) | TEXTS, max_size=3)
VALUES = st.recursive(tensors() | STRINGS | MAPS | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def same(a, b):
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, np.ndarray):
        return type(a) is type(b) and a == b
    if a.dtype == object:
        return b.dtype == object and a.shape == b.shape and a.tolist() == b.tolist()
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(max_examples=80, deadline=None)
@given(st.lists(VALUES, max_size=3))
def test_values_survive(values):
    buffers, pipe = [], io.BytesIO()
    send(pipe, {"values": [encode(value, buffers) for value in values]}, buffers)
    pipe.seek(0)
    header, data = receive(pipe)
    assert same(values, [decode(node, data, array) for node in header["values"]])
    assert pipe.read() == b""


@given(st.sampled_from([2, 4]), st.binary(max_size=9))
def test_packing_is_undone(bits, data):
    elements = np.frombuffer(data, np.uint8) & (2**bits - 1)
    packed = pack(elements, bits)
    assert len(packed) == -(-len(data) * bits // 8)
    assert np.array_equal(unpack(packed, bits, len(data)), elements)


def test_low_bits_come_first():
    assert pack(np.array([1, 2, 15], np.uint8), 4) == bytes([0x21, 0x0F])
    assert pack(np.array([0, 1, 2, 3, 1], np.uint8), 2) == bytes([0b11100100, 0b01])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.arange(4, dtype=">f4"), np.arange(4, dtype="f4")),
        (np.arange(6, dtype="i8").reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
        (np.float32(2.5), np.array(2.5, "f4")),
        (np.array(["a", "é"]), np.array(["a", "é"], object)),
        (np.array([b"a", "é".encode()]), np.array(["a", "é"], object)),
    ],
)
def test_what_onnxruntime_would_misread_is_set_right(given, expected):
    buffers = []
    node = encode(given, buffers)
    assert same(decode(node, [bytes(buffer) for buffer in buffers], array), expected)


@pytest.mark.parametrize("value", [np.array([1, 2.5], object), np.zeros(2, "M8[s]"), object(), {1, 2}])
def test_what_has_no_onnx_type_is_refused(value):
    with pytest.raises(TypeError, match=r"ONNX|strings"):
        encode(value, [])


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_a_cut_frame_is_an_end_of_file(kept):
    pipe = io.BytesIO()
    send(pipe, {"do": "run"}, [b"abc"])
    with pytest.raises(EOFError):
        receive(io.BytesIO(pipe.getvalue()[:kept]))
