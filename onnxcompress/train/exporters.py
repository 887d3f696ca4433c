"""torch's two exporters behind one call: quiet, and with failures that name the operator and the way out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from onnxcompress.errors import ModelError, OutputError, RecipeError

OPSETS = {"torchscript": 17, "dynamo": 18}  # by default
LOWEST = {"torchscript": 9, "dynamo": 18}  # below 9 torch writes IR 3, where every weight is an input
OTHER = {"torchscript": "dynamo", "dynamo": "torchscript"}
BATCH = "batch"
INLINE_LIMIT_BYTES = 1 << 30  # of parameters; beyond it dynamo's weights go to a file of their own
MESSAGE_LIMIT = 240
# How the exporters name an operator that has no ONNX form.
_UNSUPPORTED = (
    re.compile(r"operator '([\w.:]+)' to ONNX opset version (\d+)"),
    re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'"),
    re.compile(r"unrecognized namespace ([\w:]+\w)"),
)


def opset_of(exporter: str, opset: int | None) -> int:
    """The opset to write: the exporter's default where none is asked for.

    Raises:
        RecipeError: There is no such exporter, or it does not write that opset.
    """
    if exporter not in OPSETS:
        raise RecipeError(f"there is no exporter {exporter!r}; expected {' or '.join(OPSETS)}")
    if opset is None:
        return OPSETS[exporter]
    from torch.onnx import _constants as limits

    lowest, highest = LOWEST[exporter], int(limits.ONNX_MAX_OPSET)
    if exporter == "torchscript":
        highest = int(getattr(limits, "ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET", highest))
    if not lowest <= opset <= highest:
        raise RecipeError(f"opset {opset}: the {exporter} exporter writes {lowest} to {highest}")
    return opset


def write_model(
    module: nn.Module,
    arguments: Sequence[Tensor],
    path: Path,
    *,
    exporter: str,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str],
    batched: Sequence[bool] | None,
) -> list[str]:
    """Write the exporter's own file, neither folded nor fused.

    Args:
        module: In evaluation mode; its forward takes ``arguments`` and returns a tuple of tensors.
        arguments: What it is traced with.
        path: A file in a folder of its own: weights may come as files beside it.
        exporter: A key of ``OPSETS``.
        opset: As ``opset_of`` gives it.
        input_names: One per argument.
        output_names: One per output.
        batched: Per argument, whether its first axis is the batch; None for fixed shapes.

    Returns:
        What torch warned of while tracing, a line each.

    Raises:
        ModelError: The exporter failed.
        OutputError: The disk is full.
    """
    write = _write_torchscript if exporter == "torchscript" else _write_dynamo
    with quiet() as caught, _silent_native_code(), _plain_attention():
        try:
            write(module, tuple(arguments), path, opset, list(input_names), list(output_names), batched)
        except ImportError as error:
            raise RecipeError(
                f"the {exporter} exporter needs {error.name}, which is not installed: pip install onnxcompress[train]"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write into {path.parent.parent}: {error.strerror or error}") from error
        except Exception as error:  # whatever torch or the module's own code may raise
            raise ModelError(_failure(module, exporter, error)) from error
    traced = [w for w in caught if issubclass(w.category, TracerWarning)]
    return list(dict.fromkeys(f"{w.filename}:{w.lineno}: {_short(str(w.message).split('. ')[0])}" for w in traced))


def _write_torchscript(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    opset: int,
    input_names: list[str],
    output_names: list[str],
    batched: Sequence[bool] | None,
) -> None:
    axes = {} if batched is None else {n: {0: BATCH} for n, open_ in zip(input_names, batched, strict=True) if open_}
    torch.onnx.export(
        module,
        arguments,
        str(path),
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fuse BatchNormalization into the Conv before it
        do_constant_folding=False,
        opset_version=opset,
        input_names=input_names,
        output_names=output_names,
        dynamic_axes=axes,
    )


def _write_dynamo(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    opset: int,
    input_names: list[str],
    output_names: list[str],
    batched: Sequence[bool] | None,
) -> None:
    shapes = None
    if batched is not None:
        batch = torch.export.Dim(BATCH)
        shapes = tuple({0: batch} if is_batched else None for is_batched in batched)
    program: Any = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        optimize=False,  # its optimizer fuses BatchNormalization into the Conv before it
        opset_version=opset,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=shapes,
        verbose=False,
    )
    size_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    program.save(str(path), external_data=size_bytes > INLINE_LIMIT_BYTES)


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what torch prints, logs and warns of from the terminal; gives the warnings."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)
        try:
            yield caught
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _silent_native_code() -> Iterator[None]:
    """Send what C++ prints on a failure, the whole graph, to nowhere. For the whole process, so for short."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept: dict[int, int] = {}
    try:
        with open(os.devnull, "wb") as nowhere:
            for number in (1, 2):
                with contextlib.suppress(OSError):  # closed: nothing can be said there
                    kept[number] = os.dup(number)
                    os.dup2(nowhere.fileno(), number)
            yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of torch's attention layers: TorchScript has no ONNX form of it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _failure(module: nn.Module, exporter: str, error: BaseException) -> str:
    other = f"the {OTHER[exporter]} exporter may (--exporter {OTHER[exporter]})"
    chain = _chain(error)
    for one in chain:
        for pattern in _UNSUPPORTED:
            found = pattern.search(str(one))
            if found is not None:
                name = found[1].replace("::", ".")
                return f"{type(module).__name__}: the {exporter} exporter has no ONNX form of {name}; {other}"
    cause = next((one for one in reversed(chain) if str(one).strip()), error)
    reason = f"{type(cause).__name__}: {_short(str(cause))}"
    return f"{type(module).__name__}: the {exporter} exporter cannot take it, {other}: {reason}"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the first cause last."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else ""
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 3] + "..."
