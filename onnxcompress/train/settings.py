"""How to train: optimizer, schedule, precision, and how often things are done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from onnxcompress.errors import RecipeError
from onnxcompress.train import schedules

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

_RATES = {"adamw": 5e-4, "sgd": 1e-2}
_DECAYS = {"adamw": 1e-2, "sgd": 1e-4}


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        epochs: Passes over the data; ``steps`` wins.
        steps: Steps of the optimizer.
        batch: Samples in a step, over all processes.
        accumulate: Backward passes in a step, each with its part of the samples, which is all that
            BatchNormalization sees at once.
        optimizer: "adamw", or "sgd" with Nesterov momentum.
        learning_rate: Highest rate; None is 5e-4 for adamw and 1e-2 for sgd.
        weight_decay: None is 1e-2 for adamw and 1e-4 for sgd; vectors (biases, scales) have none.
        momentum: Of sgd.
        schedule: A name from ``schedules``.
        warmup: Share of the steps over which the rate climbs.
        clip_norm: Largest L2 norm of all gradients together.
        ema_decay: Weight of the past in the moving average of the weights that is validated and kept in their place;
            smaller in the first steps: min(decay, (1 + step) / (10 + step)).
        freeze_statistics: BatchNormalization keeps its running statistics, and uses them.
        seed: Same seed, same run.
        eval_every: Steps between two validations; None is an epoch.
        patience: Validations in a row without a new best after which the run ends.
        checkpoint_every: Steps between two checkpoints; None writes one about every 30 seconds.
        precision: Of the operators that gain by it: "float32", "bfloat16", "float16"; "auto" is float32 on a CPU and
            bfloat16 on a GPU that has it, else float16. Weights and validation stay in float32.
        device: "auto" is a GPU where there is one.
        channels_last: Memory format of images and kernels; None is True unless the precision is float32.
    """

    epochs: float = 10
    steps: int | None = None
    batch: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = None
    ema_decay: float | None = None
    freeze_statistics: bool = False
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    precision: str = "auto"
    device: str = "auto"
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, schedules.NAMES),
            ("precision", self.precision, PRECISIONS),
            ("device", self.device, DEVICES),
        ):
            if value not in known:
                raise RecipeError(f"{name} {value!r} is unknown: choose {', '.join(known)}")
        for name in ("batch", "accumulate", "steps", "eval_every", "patience", "checkpoint_every"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise RecipeError(f"{name.replace('_', ' ')} {number}: expected at least 1")
        for name in ("epochs", "learning_rate", "clip_norm"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise RecipeError(f"{name.replace('_', ' ')} {number:g}: expected more than 0")
        for name in ("momentum", "ema_decay", "warmup"):
            number = getattr(self, name)
            if number is not None and not 0 <= number < 1:
                raise RecipeError(f"{name.replace('_', ' ')} {number:g}: expected 0 or more and below 1")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight decay {self.weight_decay:g}: expected 0 or more")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate if self.learning_rate is not None else _RATES[self.optimizer]

    @property
    def decay(self) -> float:
        """The weight decay of what has any."""
        return self.weight_decay if self.weight_decay is not None else _DECAYS[self.optimizer]

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or max(1, round(self.epochs * steps_per_epoch))

    def torch_device(self) -> torch.device:
        """Where the run takes place.

        Raises:
            RecipeError: A GPU is asked for, and torch finds none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("device cuda: torch finds no GPU here; leave --device out, or say cpu")
        kind = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def element_type(self, device: torch.device) -> torch.dtype:
        """What operators that gain by it compute in.

        Raises:
            RecipeError: float16 on a CPU, where small gradients vanish and no operator gains.
        """
        if self.precision == "float16" and device.type == "cpu":
            raise RecipeError("precision float16 is for GPUs: take bfloat16 or float32 on a CPU")
        if self.precision != "auto":
            found: torch.dtype = getattr(torch, self.precision)
            return found
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
