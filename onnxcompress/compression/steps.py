"""Run one verb on a file, through the function behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.compression.recipe import Step
from onnxcompress.compression.settings import WITH_TORCH, Shared, options_of
from onnxcompress.errors import RecipeError
from onnxcompress.runtime import Runtime

Say = Callable[[str], None]
NAMES_SHOWN = 6


@dataclass(frozen=True)
class Done:
    """What a verb did.

    Attributes:
        summary: In words.
        repeat: Settings that do the same again, without a search that measures.
    """

    summary: list[str] = field(default_factory=list)
    repeat: dict[str, Any] = field(default_factory=dict)


def has_torch() -> bool:
    """Whether the verbs that need torch can be planned."""
    return importlib.util.find_spec("torch") is not None


def needs_torch(step: Step) -> bool:
    return step.verb in WITH_TORCH or step.settings.get("tune", "none") != "none"


def run_step(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    """Do it.

    Raises:
        OnnxCompressError: As the verb does.
    """
    if needs_torch(step) and not has_torch():
        raise RecipeError(f"{step.text} needs torch: pip install onnxcompress[train]")
    verbs = {
        "optimize": _optimize,
        "quantize": _quantize,
        "prune-width": _prune_width,
        "prune-depth": _prune_depth,
        "prune-scale": _prune_scale,
        "finetune": _finetune,
    }
    return verbs[step.verb](step, source, output, shared, runtime, lambda line: say(f"{step.verb}: {line}"))


def _optimize(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.optimizer import optimize

    options = options_of("optimize", step.settings, shared)
    found = optimize(source, output, options=options, progress=say, runtime=runtime)
    lines = [f"{found.before.nodes} -> {found.after.nodes} nodes"]
    return Done(lines + [f"left out: {dropped.what}, {dropped.reason}" for dropped in found.dropped], {**step.settings})


def _quantize(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.codebook.quantizer import quantize

    def told(state: Any) -> None:
        count = f" {state.done}/{state.total}" if state.total else ""
        say(f"{state.step} {state.layer}{count}")

    options = options_of("quantize", step.settings, shared)
    found = quantize(source, output, options, progress=told, runtime=runtime)
    changed = [row for row in found.layers if row.form != "keep"]
    lines = [f"{len(changed)} of {len(found.layers)} layers in {len({row.form for row in changed})} forms"]
    return Done(lines + [note for note in found.notes if note.startswith("tuned")], {**step.settings})


def _prune_width(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.channels.pruning import prune_width

    options = options_of("prune-width", step.settings, shared)
    found = prune_width(source, output, options, say=say, runtime=runtime)
    gone = sum(row.channels - row.kept for row in found.groups)
    lines = [f"{gone} of {sum(row.channels for row in found.groups)} channels went"]
    repeat = {**step.settings}
    if "latency" in repeat:
        del repeat["latency"]
        repeat["macs"] = str(found.macs[1])
    return Done(lines, repeat)


def _prune_depth(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.train.depth.pruning import prune_depth

    options = options_of("prune-depth", step.settings, shared)
    found = prune_depth(source, output, options, say=say, progress=lambda now: say(f"step {now.step}/{now.total}"))
    names = ", ".join(found.pruned[:NAMES_SHOWN]) + (", ..." if len(found.pruned) > NAMES_SHOWN else "")
    lines = [f"{len(found.pruned)} blocks went, {len(found.deleted)} of them whole: {names}"]
    if found.training is not None:
        lines.append(f"trained on {found.learned_from}")
    return Done(lines, _blocks_by_name(step.settings, found))


def _blocks_by_name(settings: Mapping[str, Any], found: Any) -> dict[str, Any]:
    """The same blocks without a search that times them: named, all of them, those to delete again."""
    first: dict[str, str] = {}  # a block that may be merged or deleted is offered twice, first as it was found
    for offer in found.offers:
        first.setdefault(offer.block.add or offer.name, offer.name)
    places = {offer.name: first[offer.block.add or offer.name] for offer in found.offers}
    kept = {key: value for key, value in settings.items() if key not in ("latency", "macs", "blocks", "only", "delete")}
    kept["blocks"] = len(found.pruned)
    kept["only"] = [_literal(places[name]) for name in found.pruned]
    if found.deleted:
        kept["delete"] = [_literal(places[name]) for name in found.deleted]
    return kept


def _literal(name: str) -> str:
    """A pattern that only this name fits."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _prune_scale(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.train.scale.pruning import prune_scale

    def told(now: Any) -> None:
        say(f"{now.text} {now.done}/{now.total}" if now.total else now.text)

    found = prune_scale(
        source, output, options_of("prune-scale", step.settings, shared), progress=told,
        steps=lambda now: say(f"step {now.step}/{now.total}"),
    )  # fmt: skip
    lines = [f"{len(found.deleted)} blocks went, channels of {len(found.channels)} groups, {found.pixels[1]} pixels"]
    return Done(lines, {**step.settings})


def _finetune(step: Step, source: Path, output: Path, shared: Shared, runtime: Runtime, say: Say) -> Done:
    from onnxcompress.train.finetune import finetune

    found = finetune(
        source, output, options_of("finetune", step.settings, shared), say=say,
        progress=lambda now: say(f"step {now.step}/{now.total}"),
    )  # fmt: skip
    assert found is not None  # one process
    lines = [f"learned from {found.learned_from}, {len(found.changed)} tensors changed"]
    if found.metric is not None:
        lines.append(f"{found.metric} on the samples that decide: {found.before:.4g} -> {found.after:.4g}")
    return Done(lines, {**step.settings})
