"""onnxcompress: smaller, faster ``.onnx`` files for stock onnxruntime, with the proof of what changed.

    import onnxcompress

    result = onnxcompress.optimize("model.onnx", "smaller.onnx")
    print(result.before.nodes, result.after.nodes, result.comparison.message())

The names below are loaded when they are first used, so that importing the package takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcompress.model_io import load, save
    from onnxcompress.optimizer import OptimizeOptions, Result, optimize
    from onnxcompress.rewrite import Miss, PassResult, RewritePass
    from onnxcompress.validation.judge import validate

_HOMES = {
    "Miss": "rewrite",
    "OptimizeOptions": "optimizer",
    "PassResult": "rewrite",
    "Result": "optimizer",
    "RewritePass": "rewrite",
    "load": "model_io",
    "optimize": "optimizer",
    "save": "model_io",
    "validate": "validation.judge",
}

__all__ = ["Miss", "OptimizeOptions", "PassResult", "Result", "RewritePass", "load", "optimize", "save", "validate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"onnxcompress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'onnxcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
