"""Arithmetic, comparison, logic and casts, element by element, with ONNX's broadcasting (NumPy's).

Integers and shapes live on the CPU, activations where the twin lives; an operator that gets both moves the former.
UINT16, UINT32 and UINT64 can be stored, compared for equality and selected, but torch computes little else with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function

BinaryFunction = Callable[[Tensor, Tensor], Tensor]


def identity(x: Any) -> Any:
    return x


def unary(function: Callable[[Tensor], Tensor]) -> Builder:
    """The builder of an operator without attributes that torch has as a function of one tensor."""
    return lambda call: function


def together(*tensors: Tensor) -> list[Tensor]:
    """The tensors on one device: on the accelerator where one of them is."""
    device = next((tensor.device for tensor in tensors if not tensor.is_cpu), tensors[0].device)
    return [tensor.to(device) for tensor in tensors]


def on_one_device(function: BinaryFunction) -> BinaryFunction:
    def run(a: Tensor, b: Tensor) -> Tensor:
        if a.is_cpu is b.is_cpu:
            return function(a, b)
        return function(*together(a, b))

    return run


def binary(function: BinaryFunction) -> Builder:
    """The builder of a broadcasting operator of two tensors, before operator set 7 with ``broadcast`` and ``axis``."""

    def build(call: Call) -> Function:
        return aligned(call, on_one_device(function))

    return build


def aligned(call: Call, run: BinaryFunction) -> BinaryFunction:
    """``run``, with the second input moved to ``axis`` of the first where the node is of the old form."""
    axis = call.attribute("axis")
    if call.opset >= 7 or not call.attribute("broadcast", 0) or axis is None:
        return run

    def run_aligned(a: Tensor, b: Tensor) -> Tensor:
        trailing = a.ndim - axis % max(a.ndim, 1) - b.ndim
        return run(a, b.reshape(*b.shape, *(1,) * trailing))

    return run_aligned


def variadic(function: BinaryFunction) -> Builder:
    """The builder of an operator that folds any number of tensors with ``function``."""

    def build(call: Call) -> Function:
        if len(call.inputs) == 1:
            return identity
        pair = on_one_device(function)
        if len(call.inputs) == 2:
            return pair
        return lambda *tensors: functools.reduce(pair, tensors)

    return build


def mean(call: Call) -> Function:
    count, pair = len(call.inputs), on_one_device(torch.add)
    return lambda *tensors: functools.reduce(pair, tensors) / count


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    """The result has the type of the base: an integer base with a float exponent is truncated."""
    if x.dtype is exponent.dtype or (x.is_floating_point() and not exponent.is_floating_point()):
        return torch.pow(x, exponent)
    if x.is_floating_point() or not exponent.is_floating_point():
        return torch.pow(x, exponent.to(x.dtype))
    return torch.pow(x.to(torch.float64), exponent.to(torch.float64)).to(x.dtype)


def power(call: Call) -> Function:
    run = aligned(call, on_one_device(_power))
    exponent = call.constants.get(1)
    if exponent is None or exponent.numel() != 1:
        return run
    number, rank = exponent.item(), exponent.ndim  # torch has short cuts for 2, 0.5 and the like

    def run_number(x: Tensor, given: Tensor) -> Tensor:
        if x.is_floating_point() and x.ndim >= rank:
            return torch.pow(x, number)
        return run(x, given)

    return run_number


def modulo(call: Call) -> Function:
    """fmod = 0 takes the sign of the divisor, fmod = 1 that of the dividend."""
    return on_one_device(torch.fmod if call.attribute("fmod", 0) else torch.remainder)


def bit_shift(call: Call) -> Function:
    left = call.attribute("direction") == "LEFT"
    return on_one_device(torch.bitwise_left_shift if left else torch.bitwise_right_shift)


def is_infinite(call: Call) -> Function:
    negative, positive = bool(call.attribute("detect_negative", 1)), bool(call.attribute("detect_positive", 1))
    functions: dict[tuple[bool, bool], Function] = {
        (True, True): torch.isinf,
        (True, False): torch.isneginf,
        (False, True): torch.isposinf,
        (False, False): lambda x: torch.zeros_like(x, dtype=torch.bool),
    }
    return functions[negative, positive]


def where(call: Call) -> Function:
    def run(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if condition.is_cpu is x.is_cpu is y.is_cpu:
            return torch.where(condition, x, y)
        condition, x, y = together(condition, x, y)
        return torch.where(condition, x, y)

    return run


def clip(call: Call) -> Function:
    """Bounds are attributes before operator set 11, then inputs.

    Between two constant bounds it is torch's hardtanh (ReLU6), whose gradient is 0 on a bound; torch.clamp's is 1.
    """
    if call.opset < 11:
        # The default bounds are those of float32, which clip nothing.
        bounds = [call.attribute("min"), call.attribute("max")]
        widest = float(np.finfo(np.float32).max)
        low, high = (None if bound is None or abs(bound) >= widest else bound for bound in bounds)
        return _clip_to_numbers(low, high)
    given = [position for position in (1, 2) if call.has(position)]
    if all(position in call.constants for position in given):
        low, high = (call.constants[position].item() if position in given else None for position in (1, 2))
        return _clip_to_numbers(low, high)

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        return torch.clamp(x, *(None if bound is None else bound.to(x.device) for bound in (low, high)))

    return run


def _clip_to_numbers(low: float | None, high: float | None) -> Function:
    if low is None and high is None:
        return lambda x, *_: x
    if low is None or high is None or low >= high:
        return lambda x, *_: torch.clamp(x, low, high)

    def run(x: Tensor, *_: Tensor | None) -> Tensor:
        return F.hardtanh(x, low, high) if x.is_floating_point() else torch.clamp(x, low, high)

    return run


def cast(call: Call) -> Function:
    """To half precision it is the identity: what the twin computes in is rounded on writing back."""
    target = call.attribute("to")
    if not isinstance(target, int):
        target = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(target))
    dtype = call.torch_type(target)
    if target == onnx.TensorProto.UINT4:
        return lambda x: x.to(torch.int64).to(dtype) & 15
    if target == onnx.TensorProto.INT4:
        return lambda x: (x.to(torch.int64).to(dtype) << 4) >> 4
    return lambda x: x.to(dtype)


def cast_like(call: Call) -> Function:
    return lambda x, like: x.to(like.dtype)


def dropout(call: Call) -> Function:
    """The identity, unless the node has an input ``training_mode`` that is true: then a mask from torch's generator."""
    read_mask = len(call.outputs) > 1 and call.outputs[1]
    keeps_type = call.opset < 10  # of the mask, which is BOOL from then on

    def all_kept(x: Tensor) -> Any:
        return (x, torch.ones_like(x, dtype=None if keeps_type else torch.bool)) if read_mask else x

    training = call.constants.get(2)
    if call.opset < 12 or not call.has(2) or (training is not None and not bool(training)):
        return lambda x, *_: all_kept(x)

    def run(x: Tensor, ratio: Tensor | None, training_mode: Tensor) -> Any:
        rate = 0.5 if ratio is None else float(ratio)
        if rate == 0.0 or not bool(training_mode):
            return all_kept(x)
        mask = torch.rand_like(x) >= rate
        return x * mask / (1.0 - rate), mask

    return run


OPERATORS: dict[str, Builder] = {
    "Abs": unary(torch.abs),
    "Acos": unary(torch.acos),
    "Acosh": unary(torch.acosh),
    "Add": binary(torch.add),
    "And": binary(torch.logical_and),
    "Asin": unary(torch.asin),
    "Asinh": unary(torch.asinh),
    "Atan": unary(torch.atan),
    "Atanh": unary(torch.atanh),
    "BitShift": bit_shift,
    "BitwiseAnd": binary(torch.bitwise_and),
    "BitwiseNot": unary(torch.bitwise_not),
    "BitwiseOr": binary(torch.bitwise_or),
    "BitwiseXor": binary(torch.bitwise_xor),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": unary(torch.ceil),
    "Clip": clip,
    "Cos": unary(torch.cos),
    "Cosh": unary(torch.cosh),
    "Div": binary(_divide),
    "Dropout": dropout,
    "Equal": binary(torch.eq),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Greater": binary(torch.gt),
    "GreaterOrEqual": binary(torch.ge),
    "Identity": unary(identity),
    "IsInf": is_infinite,
    "IsNaN": unary(torch.isnan),
    "Less": binary(torch.lt),
    "LessOrEqual": binary(torch.le),
    "Log": unary(torch.log),
    "Max": variadic(torch.maximum),
    "Mean": mean,
    "Min": variadic(torch.minimum),
    "Mod": modulo,
    "Mul": binary(torch.mul),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": binary(torch.logical_or),
    "Pow": power,
    "Reciprocal": unary(torch.reciprocal),
    "Round": unary(torch.round),  # half to even, in both
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Sinh": unary(torch.sinh),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(torch.sub),
    "Sum": variadic(torch.add),
    "Tan": unary(torch.tan),
    "Tanh": unary(torch.tanh),
    "Where": where,
    "Xor": binary(torch.logical_xor),
}
