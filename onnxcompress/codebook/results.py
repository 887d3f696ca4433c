"""What a run of ``quantize`` says: where it stands, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.codebook.evaluation import Quality
from onnxcompress.codebook.layers import Layer, Refusal
from onnxcompress.codebook.layerwise import Made
from onnxcompress.codebook.offers import form_text
from onnxcompress.codebook.planning import Item


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: "estimating", "quantizing", "measuring", ...
        layer: What was done last; "" at the beginning.
        done: Layers done in this step.
        total: Layers of this step.
    """

    step: str
    layer: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class LayerRow:
    """One layer of the result.

    Attributes:
        name: Of the weight.
        kind: Operator that reads it.
        weights: How many numbers it holds.
        form: How it is stored, as text.
        bits_per_weight: All of its bytes, nodes included.
        size_bytes: The same in bytes.
        error: Relative error of its output on held-out samples against the float net, errors of the layers before it
            included; on the fitted samples where none are held out, on the weight without data; None where kept.
        predicted_damage: Its part of the outputs' predicted relative squared error.
    """

    name: str
    kind: str
    weights: int
    form: str
    bits_per_weight: float
    size_bytes: int
    error: float | None
    predicted_damage: float


@dataclass
class QuantizeResult:
    """What ``quantize`` did.

    Attributes:
        source: Name of the input.
        output: Where the result is; None after a dry run.
        before_bytes: Of the original, external data included.
        after_bytes: Of the result; predicted after a dry run.
        layers: What became of each layer.
        refusals: Weights that stay as they are, and why.
        quality: Measured with the file; None after a dry run.
        predicted_error: Relative error of the outputs as planned.
        calibration_samples: How many were used to fit; 0 without data.
        held_out_samples: How many were not, and judged.
        seconds: Wall time.
        notes: What the user should know, one line each.
    """

    source: str
    output: Path | None
    before_bytes: int
    after_bytes: int
    layers: list[LayerRow]
    refusals: list[Refusal]
    quality: Quality | None
    predicted_error: float
    calibration_samples: int
    held_out_samples: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Original bytes over the result's."""
        return self.before_bytes / self.after_bytes

    @property
    def unchanged(self) -> bool:
        """Whether the result is a copy."""
        return self.before_bytes == self.after_bytes and all(row.form == "keep" for row in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "input": self.source,
            "output": None if self.output is None else str(self.output),
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "ratio": round(self.ratio, 3),
            "unchanged": self.unchanged,
            "predicted_error": _finite(self.predicted_error),
            "quality": None if self.quality is None else self.quality.as_dict(),
            "calibration_samples": self.calibration_samples,
            "held_out_samples": self.held_out_samples,
            "seconds": round(self.seconds, 3),
            "layers": [{key: _finite(value) for key, value in asdict(row).items()} for row in self.layers],
            "refused": [asdict(refusal) for refusal in self.refusals],
            "notes": self.notes,
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_row(layer: Layer, item: Item, made: Made | None) -> LayerRow:
    """One layer of the result; ``made`` is None after a dry run."""
    weights = layer.outputs * layer.length
    error = None if item.form == "keep" else item.error
    if made is not None and layer.name in made:
        error = made[layer.name][1]
    return LayerRow(
        name=layer.name,
        kind=layer.kind,
        weights=weights,
        form=form_text(item.form),
        bits_per_weight=8 * item.size_bytes / weights,
        size_bytes=item.size_bytes,
        error=error,
        predicted_damage=item.damage,
    )
