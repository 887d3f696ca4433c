"""Normalizations: by the statistics of a batch, or of each sample.

ONNX's momentum m is what stays: running = running * m + batch * (1 - m). The running variance takes the unbiased
variance of the batch, as torch's own modules do: ONNX defines training_mode with the biased one, but most files come
out of torch, and training that goes on from there should be what torch would have done. A node with
training_mode = 1, whose running statistics are outputs, follows ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxcompress.errors import DataError
from onnxcompress.train.ops.call import Builder, Call, Function
from onnxcompress.train.ops.pooling import root


def batch_normalization(call: Call) -> Function:
    """By the running statistics, or by those of the batch where ``call.mode`` says so."""
    if call.opset >= 14 and call.attribute("training_mode", 0):
        return _training_form(call)
    if any(call.outputs[1:]):
        raise call.refuse("an output of running statistics without training_mode = 1")
    mode, epsilon, keep = call.mode, call.attribute("epsilon", 1e-5), call.attribute("momentum", 0.9)
    update = 1.0 - keep
    cudnn = torch.backends.cudnn.enabled

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if not mode.batch_statistics:
            if mean.requires_grad or var.requires_grad:  # torch's own takes them for constants
                return _normalized(x, mean, var, scale, bias, epsilon)
            return torch.batch_norm(x, scale, bias, mean, var, False, update, epsilon, cudnn)
        if mode.synchronize and _processes() > 1:
            batch_mean, batch_var, count = _global_statistics(x)
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), update)
                var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), update)
            return _normalized(x, batch_mean, batch_var, scale, bias, epsilon)
        _check_count(call, x)
        return torch.batch_norm(x, scale, bias, mean, var, True, update, epsilon, cudnn)

    if call.opset >= 9 or call.attribute("spatial", 1):
        return run

    def run_per_element(x: Tensor, *parameters: Tensor) -> Tensor:
        """spatial = 0: each element of a sample has its own statistics over the batch."""
        return run(x.flatten(1), *(parameter.view(-1) for parameter in parameters)).reshape(x.shape)

    return run_per_element


def _check_count(call: Call, x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise DataError(
            f"BatchNormalization {call.name!r}: a batch of shape {list(x.shape)} has 1 value per channel, its variance "
            f"needs 2; use a larger batch"
        )


def _training_form(call: Call) -> Function:
    """training_mode = 1: the batch's statistics in any mode; the running ones are outputs, no input is changed."""
    mode, epsilon, keep = call.mode, call.attribute("epsilon", 1e-5), call.attribute("momentum", 0.9)
    wanted = any(call.outputs[1:])

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
        if mode.synchronize and _processes() > 1:
            batch_mean, batch_var, _ = _global_statistics(x)
            y = _normalized(x, batch_mean, batch_var, scale, bias, epsilon)
        else:
            y = torch.batch_norm(x, scale, bias, None, None, True, 0.0, epsilon, torch.backends.cudnn.enabled)
            if not wanted:
                return y
            batch_var, batch_mean = torch.var_mean(x, _batch_axes(x), correction=0)
        return y, torch.lerp(batch_mean, mean, keep), torch.lerp(batch_var, var, keep)

    return run


def _batch_axes(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """Each process's tensor has a part in the sum of every process: the gradient is a sum over them as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel over all processes, whose batches may differ in size.

    Two rounds: the sum of squares around the mean, unlike that around 0, loses nothing where the mean is large.
    """
    add_up: Callable[[Tensor], Tensor] = _SumOverProcesses.apply
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = x.new_tensor([x.numel() // x.shape[1]])
    sums = add_up(torch.cat([x.sum(_batch_axes(x)), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    var = add_up((x - _per_channel(mean, x)).square().sum(_batch_axes(x))) / total
    return mean, var, total


def _normalized(x: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    factor = scale * torch.rsqrt(var + epsilon)
    return torch.addcmul(_per_channel(bias, x), x - _per_channel(mean, x), _per_channel(factor, x)).to(x.dtype)


def layer_normalization(call: Call) -> Function:
    """Over all axes from ``axis`` on. stash_type, the precision of the statistics, is that of the twin."""
    axis, epsilon = call.attribute("axis", -1), call.attribute("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return torch.layer_norm(x, shape, scale, bias, epsilon)
        y = torch.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias

    if not any(call.outputs[1:]):
        return run

    def run_with_statistics(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        axes = tuple(range(axis % x.ndim, x.ndim))
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return run(x, scale, bias), mean, torch.rsqrt(var + epsilon)

    return run_with_statistics


def rms_normalization(call: Call) -> Function:
    axis, epsilon = call.attribute("axis", -1), call.attribute("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape:
            return torch.rms_norm(x, shape, scale, epsilon)
        return torch.rms_norm(x, shape, None, epsilon) * scale

    return run


def instance_normalization(call: Call) -> Function:
    epsilon = call.attribute("epsilon", 1e-5)
    cudnn = torch.backends.cudnn.enabled
    return lambda x, scale, bias: torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, cudnn)


def group_normalization(call: Call) -> Function:
    """Scale and bias are one per group in operator sets 18 to 20, one per channel from then on."""
    groups, epsilon = call.attribute("num_groups"), call.attribute("epsilon", 1e-5)
    if call.opset >= 21:
        return lambda x, scale, bias: torch.group_norm(x, groups, scale, bias, epsilon)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        each = x.shape[1] // groups
        return torch.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)

    return run


def lp_normalization(call: Call) -> Function:
    """A vector of norm 0 stays 0."""
    axis, degree = call.attribute("axis", -1), call.attribute("p", 2)

    def run(x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, degree, axis, True)
        return x / torch.where(norm == 0, 1, norm)

    return run


def mean_variance_normalization(call: Call) -> Function:
    axes = tuple(call.attribute("axes") or (0, 2, 3))

    def run(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (root(var, 2) + 1e-9)

    return run


def local_response_normalization(call: Call) -> Function:
    """x / (bias + alpha * mean of the squares of ``size`` neighbouring channels) ** beta."""
    size, alpha = call.attribute("size"), call.attribute("alpha", 1e-4)
    beta, bias = call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    pads = [0, 0, (size - 1) // 2, size // 2]

    def run(x: Tensor) -> Tensor:
        squares = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
        means = F.avg_pool2d(F.pad(squares, pads), (size, 1), 1)
        scale: Tensor = (means * alpha + bias).pow(beta)
        return x / scale.reshape(x.shape)

    return run


OPERATORS: dict[str, Builder] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response_normalization,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
}
