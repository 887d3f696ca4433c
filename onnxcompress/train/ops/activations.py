"""Activations and softmax, each as the torch function that a network written by hand would call."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.train.ops.call import Builder, Call, Function
from onnxcompress.train.ops.elementwise import unary

_FLOAT32 = 1e-6  # relative: an attribute of single precision means the number that torch holds in double


def _is(value: float, constant: float) -> bool:
    return math.isclose(value, constant, rel_tol=_FLOAT32)


def leaky_relu(call: Call) -> Function:
    alpha = call.attribute("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


def prelu(call: Call) -> Function:
    """The slope broadcasts to x; before operator set 7 it is one per channel, or one for all."""
    if call.opset < 7:
        return lambda x, slope: torch.prelu(x, slope.reshape(-1))

    def run(x: Tensor, slope: Tensor) -> Tensor:
        count = slope.numel()
        if count == 1 or (x.ndim - slope.ndim <= 1 < x.ndim and count == x.shape[1] == slope.shape[1 - x.ndim]):
            return torch.prelu(x, slope.reshape(-1))
        return torch.where(x >= 0, x, x * slope)

    return run


def elu(call: Call) -> Function:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def selu(call: Call) -> Function:
    old = call.opset < 6
    alpha = call.attribute("alpha", 1.6732 if old else 1.67326319217681884765625)
    gamma = call.attribute("gamma", 1.0507 if old else 1.05070102214813232421875)
    if _is(alpha, 1.67326319217681884765625) and _is(gamma, 1.05070102214813232421875):
        known: Function = torch.selu
        return known
    return lambda x: gamma * F.elu(x, alpha)


def celu(call: Call) -> Function:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def thresholded_relu(call: Call) -> Function:
    alpha = call.attribute("alpha", 1.0)
    return lambda x: F.threshold(x, alpha, 0.0)


def hard_sigmoid(call: Call) -> Function:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if _is(alpha, 1 / 6) and beta == 0.5:
        known: Function = F.hardsigmoid
        return known
    return lambda x: F.hardtanh(x * alpha + beta, 0.0, 1.0)


def swish(call: Call) -> Function:
    alpha = call.attribute("alpha", 1.0)
    if alpha == 1.0:
        known: Function = F.silu
        return known
    return lambda x: x * torch.sigmoid(alpha * x)


def gelu(call: Call) -> Function:
    approximate = call.attribute("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise call.refuse(f"approximate = {approximate!r}")
    return lambda x: F.gelu(x, approximate=approximate)


def shrink(call: Call) -> Function:
    bias, threshold = call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    if threshold < 0:  # then both branches of the definition claim the middle, and the lower one wins
        return lambda x: torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, 0))

    def run(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, 0)).to(x.dtype)
        kept = F.hardshrink(x, threshold)
        return kept if bias == 0.0 else kept - bias * torch.sign(kept)

    return run


def along_axis(function: Callable[[Tensor, int], Tensor]) -> Builder:
    """The builder of softmax and its kin: along ``axis``, before operator set 13 over all axes from it on."""

    def build(call: Call) -> Function:
        if call.opset >= 13:
            axis = call.attribute("axis", -1)
            return lambda x: function(x, axis)
        axis = call.attribute("axis", 1)

        def run(x: Tensor) -> Tensor:
            start = axis % max(x.ndim, 1) if axis < x.ndim else x.ndim
            if start == x.ndim - 1:
                return function(x, -1)
            rows = x.flatten(start) if start < x.ndim else x.unsqueeze(-1)
            return function(rows, -1).reshape(x.shape)

        return run

    return build


def _softmax(x: Tensor, axis: int) -> Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: Tensor, axis: int) -> Tensor:
    return torch.log_softmax(x, axis)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter_(axis, x.argmax(axis, keepdim=True), 1)


OPERATORS: dict[str, Builder] = {
    "Celu": celu,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Hardmax": along_axis(_hardmax),
    "LeakyRelu": leaky_relu,
    "LogSoftmax": along_axis(_log_softmax),
    "Mish": unary(F.mish),
    "PRelu": prelu,
    "Relu": unary(torch.relu),
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": unary(torch.sigmoid),
    "Softmax": along_axis(_softmax),
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Swish": swish,
    "ThresholdedRelu": thresholded_relu,
}
