"""Weights from files into a module: safetensors, or torch files that hold nothing but tensors and plain containers.

A torch file is read with ``weights_only=True``: one that would run code is refused. What training programs wrap around
a state_dict is taken off: ``{"state_dict": ...}`` and its like, ``module.`` of DistributedDataParallel, ``_orig_mod.``
of ``torch.compile``.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onnxcompress.errors import ModelError, RecipeError

# Where training programs put the state_dict; the first that is there is taken.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
OPTIONAL = ("num_batches_tracked",)  # counted for a momentum that is never used here
SHOWN = 3
RESAVE = "load it where it was made and save the weights alone: torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class Loaded:
    """What was read from a checkpoint.

    Attributes:
        tensors: How many were put into the module.
        key: Under which keys of the file they were, joined by dots; "" for the outermost.
        prefix: What was taken off their names.
    """

    tensors: int
    key: str = ""
    prefix: str = ""


def load_checkpoint(module: nn.Module, path: str | os.PathLike[str], *, key: str | None = None) -> Loaded:
    """Put the weights of a file into a module.

    Args:
        module: Takes the values; its types stay.
        path: ``.safetensors``, or a file of torch.
        key: Where in the file the state_dict is, keys joined by dots; None looks for it.

    Raises:
        ModelError: The file is missing, damaged, not of weights alone, or does not fit the module.
        RecipeError: There is no such key, or a package is missing.
    """
    path = Path(path)
    state, found = _state_dict(read_checkpoint(path), key, path)
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    state, prefix = _without_prefix(state, set(own))
    _check(own, state, path)
    try:
        module.load_state_dict({name: state.get(name, own[name]) for name in own}, strict=False)
    except Exception as error:  # modules may do anything when they are loaded
        raise ModelError(f"{path} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return Loaded(sum(name in state for name in own), found, prefix)


def read_checkpoint(path: Path) -> Any:
    """The content of a file, on the CPU.

    Raises:
        ModelError: It is missing, damaged, or not of weights alone.
        RecipeError: safetensors is not installed.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a checkpoint")
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    if not start:
        raise ModelError(f"{path} is empty, not a checkpoint")
    if path.suffix == ".safetensors" or start[8:10] in (b'{"', b"{}"):
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        text = str(error)
        if "TorchScript archive" in text:
            raise ModelError(f"{path} is a TorchScript archive; {RESAVE}") from error
        if "Weights only load failed" in text:
            foreign = re.search(r"GLOBAL ([\w.]+)", text)
            what = f" ({foreign[1]})" if foreign else ""
            raise ModelError(f"{path} holds more than weights{what}, or is damaged; {RESAVE}") from error
        raise ModelError(
            f"{path} is not a checkpoint, or it is damaged: {path.stat().st_size} bytes could not be read"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        safetensors: Any = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise RecipeError(f"{path} needs safetensors: pip install onnxcompress[train]") from error
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path, device="cpu")
    except Exception as error:  # SafetensorError, or whatever its types bring
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is not a safetensors file, or it is damaged: {reason}") from error
    return tensors


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(isinstance(name, str) for name in value)
    )


def _state_dict(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict in a file, and under which keys it was."""
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                there = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
                raise RecipeError(f"{path} has no key {key!r}; there is {_clip(there)}")
            content = content[part]
    keys = [] if key is None else [key]
    while isinstance(content, Mapping):
        inner = next((n for n in (*WRAPPERS, *AVERAGED) if isinstance(content.get(n), Mapping)), None)
        if inner is None:
            break
        keys.append(inner)
        content = content[inner]
    if not _is_state_dict(content):
        there = ", ".join(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ModelError(
            f"{path} holds no state_dict, but {_clip(there or 'nothing')}; name its place: --checkpoint-key"
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, ".".join(keys)


def _without_prefix(state: dict[str, Tensor], own: set[str]) -> tuple[dict[str, Tensor], str]:
    """Names as the module has them: what wraps a module puts its own name in front, ``torch.compile`` also inside."""
    prefix = ""
    if not any("_orig_mod." in name for name in own):
        bare = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
        prefix, state = ("_orig_mod." if bare.keys() != state.keys() else ""), bare
    for _ in range(len(PREFIXES)):
        for start in PREFIXES:
            cut = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            if len(own & cut.keys()) > len(own & state.keys()):
                rest = {name: value for name, value in state.items() if not name.startswith(start)}
                rest.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
                prefix, state = start + prefix, {**rest, **cut}
                break
        else:
            break
    return state, prefix


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in own if name not in state and not name.endswith(OPTIONAL)]
    unexpected = [name for name in state if name not in own and not name.endswith(OPTIONAL)]
    shapes = [
        f"{name} {_sizes(state[name])} for {_sizes(own[name])}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({_few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not fit the module's {len(own)} tensors: {', '.join(problems)}")


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], "..."] if len(names) > SHOWN else names)


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _clip(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
