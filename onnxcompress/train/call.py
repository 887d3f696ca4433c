"""Calling a module the way a graph is called: tensors in, tensors out, each with a name, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from onnxcompress.errors import ModelError, RecipeError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def name_inputs(module: nn.Module, count: int, wanted: Sequence[str] | None) -> list[str]:
    """Names of the inputs: those wanted, or those of forward's parameters.

    Raises:
        RecipeError: There are not as many as inputs, or one is empty, given twice, or the name of a parameter.
    """
    if wanted is None:
        names = [p.name for p in _parameters(module) if p.kind in _BY_PLACE][:count]
        names += [f"input_{place}" for place in range(len(names), count)]
        stored = {*module.state_dict()}
        return [f"{name}_input" if name in stored else name for name in names]
    check_names(module, wanted, count, "input")
    return list(wanted)


def check_names(module: nn.Module, names: Sequence[str], count: int, side: str) -> None:
    """Refuse names that a graph cannot hold.

    Raises:
        RecipeError: Too many or too few, or one that is empty, given twice, or the name of a parameter.
    """
    if len(names) != count:
        raise RecipeError(f"{len(names)} {side} names ({', '.join(names)}) for {count} {side}s")
    stored = {*module.state_dict()}
    for name in names:
        if not name or names.count(name) > 1 or name in stored:
            problem = "empty" if not name else "given twice" if name not in stored else "the name of a parameter"
            raise RecipeError(f"{side} name {name!r} is {problem}")


@contextlib.contextmanager
def flat_forward(module: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Let ``module(*tensors)`` return a tuple of tensors; gives the names of those that it returned last.

    Where every one of ``names`` is a parameter of forward the tensors go there, in any order; otherwise by position.
    """
    original = module.forward
    known = {parameter.name for parameter in _parameters(module) if parameter.kind in _NAMED}
    by_name = set(names) <= known
    returned: list[str] = []

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        value = original(**dict(zip(names, tensors, strict=True))) if by_name else original(*tensors)
        pairs = flatten(value)
        returned[:] = [name for name, _ in pairs]
        # An output of its own for a tensor that comes twice, is an input or a parameter: dynamo mixes up their names.
        seen = {id(tensor) for tensor in (*tensors, *module.parameters(), *module.buffers())}
        outputs = []
        for _, tensor in pairs:
            outputs.append(tensor.clone() if id(tensor) in seen else tensor)
            seen.add(id(tensor))
        return tuple(outputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    places = [re.sub(r"\W", "_", name) for name in names]
    if len({*places}) < len(places) or not all(place.isidentifier() for place in places):
        places = [f"input_{place}" for place in range(len(names))]
    forward.__signature__ = inspect.Signature([inspect.Parameter(p, kind) for p in places])  # type: ignore[attr-defined]
    hidden = module.__dict__.get("forward")
    try:
        module.__dict__["forward"] = forward
        yield returned
    finally:
        if hidden is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = hidden


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # made in C, or by a wrapper that hides it
        return []


def flatten(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors in what a module returned, with names: keys, fields, or ``output_0``; None is left out.

    Raises:
        ModelError: It holds something that is no tensor.
    """
    if isinstance(value, Tensor):
        return [(name or "output", value)]
    if value is None:
        return []
    items: list[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(place) if name else f"output_{place}", item) for place, item in enumerate(value)]
        if len(items) == 1 and not name:
            items = [("output", value[0])]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        where = f" as {name}" if name else ""
        raise ModelError(f"forward returns {type(value).__name__}{where}; a graph returns tensors only")
    return [pair for key, item in items for pair in flatten(item, f"{name}.{key}" if name else key)]


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the module, its buffers and torch's random numbers are as before.

    Flags are set without ``eval()`` and ``train()``: a module may do more in these than can be undone.
    """
    modes = [(inner, inner.training) for inner in module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (inner, name, buffer, buffer.detach().clone())
        for inner in module.modules()
        for name, buffer in inner._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            for inner, _ in modes:
                inner.training = False
            yield
        finally:
            for inner, training in modes:
                inner.training = training
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            for inner, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                inner._buffers[name] = buffer


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor as NumPy's; bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    return np.asarray(tensor.numpy())
