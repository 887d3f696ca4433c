"""The page of ``validate``: whether one model can stand in for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcompress.report.page import Block, Card, Content, Lines, Page, Section
from onnxcompress.report.pages.sections import base_name, before_after, closing, metric_card, metric_row, output_table


def page(content: Content) -> Page:
    passed = bool(content["within_tolerance"]) and not content["interface"]
    equivalence, metric = content["equivalence"], content["metric"]
    answer = "can" if passed else "cannot"
    return Page(
        verb="validate",
        title=f"{base_name(content['output'])} against {base_name(content['input'])}",
        summary=f"{content['output']} {answer} stand in for {content['input']}.",
        verdict=f"Both ran on onnxruntime: {content['summary']}",
        verdict_tone="good" if passed else "bad",
        cards=_cards(equivalence, metric),
        sections=[*_interface(content), *_outputs(content, equivalence), *_metric(metric), *closing(content)],
        content=content.data,
    )


def _cards(equivalence: Mapping[str, Any], metric: Mapping[str, Any] | None) -> list[Card]:
    cards = []
    if metric is not None:
        cards.append(metric_card(metric["name"], *metric["as_deployed"]))
    outputs = equivalence["outputs"]
    if outputs:
        worst = max(max(output["relative"], output["mismatches"]) for output in outputs)
        cards.append(Card("largest difference", f"{worst:.1e}", note="max|d| / max|y|"))
        agreements = [output["agreement"] for output in outputs if output["agreement"] is not None]
        if agreements:
            cards.append(Card("same top-1 class", f"{100 * min(agreements):.2f} %"))
    return [*cards, Card("inputs compared", f"{equivalence['feeds']:,}")]


def _interface(content: Content) -> list[Section]:
    if not content["interface"]:
        return []
    return [Section("Interface", [Lines(content["interface"])], "Inputs and outputs that are not the same.")]


def _outputs(content: Content, equivalence: Mapping[str, Any]) -> list[Section]:
    blocks: list[Block] = [Lines(content["inputs"])] if content["inputs"] else []
    blocks.append(Lines([equivalence["failure"] or equivalence["summary"]]))
    if equivalence["outputs"]:
        blocks.append(output_table(equivalence["outputs"]))
    note = f"Allowed: {content['tolerance']:.2g}. A limit that is wider comes from the model's own sensitivity."
    return [Section("Outputs", blocks, note)]


def _metric(metric: Mapping[str, Any] | None) -> list[Section]:
    if metric is None:
        return []
    name = metric["name"]
    rows = [
        metric_row(f"{name}, optimizations off", *metric["optimizations_off"]),
        metric_row(f"{name}, as deployed", *metric["as_deployed"]),
    ]
    labels = "with labels" if metric["labelled"] else "without labels: the first model's outputs are what is expected"
    drop = "" if metric["drop"] is None else f" The larger drop of both is {metric['drop']:.2g}."
    return [Section("Metric", [before_after(rows)], f"{metric['samples']:,} samples, {labels}.{drop}")]
