"""Modules named on the command line: ``package.module:factory``."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from onnxcompress.data.files import one_line
from onnxcompress.errors import OnnxCompressError, RecipeError


def make_module(spec: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0) -> nn.Module:
    """Import a factory and call it.

    Args:
        spec: ``package.module:name``, found from the working directory first. The name, which may have dots, is that of
            a function or a class that gives an ``nn.Module``, or of a module instance.
        settings: Keyword arguments for the factory.
        seed: Of torch's random numbers while the factory runs; they are set back afterwards.

    Raises:
        RecipeError: It cannot be imported or called, or gives something else.
    """
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", spec):
        raise RecipeError(f"{spec!r} names no module: expected package.module:factory")
    module_name, _, name = spec.partition(":")
    with _working_directory_on_path(), torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(seed)
        try:
            made = importlib.import_module(module_name)
            for part in name.split("."):
                made = getattr(made, part)
            if not isinstance(made, nn.Module):
                if not callable(made):
                    raise RecipeError(
                        f"{spec} is a {type(made).__name__}: expected a function, a class or an nn.Module"
                    )
                made = made(**(settings or {}))
            elif settings:
                raise RecipeError(f"{spec} is a module already, it takes no settings ({', '.join(settings)})")
        except OnnxCompressError:
            raise
        except (Exception, SystemExit) as error:  # whatever the code may raise; a script ends itself on import
            raise RecipeError(f"{spec}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise RecipeError(f"{spec} gives a {type(made).__name__}: expected an nn.Module")
    if isinstance(made, torch.jit.ScriptModule):
        raise RecipeError(f"{spec} gives a ScriptModule: give the nn.Module that it was made from")
    return made


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Read ``classes=10``, ``widths=(8,16)``, ``name=small``: a Python literal, or else text.

    Raises:
        RecipeError: One has no name or no ``=``, or comes twice.
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier():
            raise RecipeError(f"setting {text!r}: expected NAME=VALUE")
        if name in settings:
            raise RecipeError(f"setting {name} is given twice")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before
