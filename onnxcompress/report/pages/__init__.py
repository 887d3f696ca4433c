"""A page for each verb, made of the dictionary that its run gives."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from onnxcompress.report.page import Content, Page

VERBS = (
    "bench",
    "compress",
    "deploy",
    "export",
    "finetune",
    "inspect",
    "optimize",
    "prune-depth",
    "prune-scale",
    "prune-width",
    "quantize",
    "validate",
    "view",
)


def build(content: Mapping[str, Any], verb: str) -> Page:
    """The page of a run; one of a verb that is not known shows all that there is as tables."""
    name = verb.replace("-", "_") if verb in VERBS else "plain"
    page: Page = importlib.import_module(f"onnxcompress.report.pages.{name}").page(Content(content))
    return page
