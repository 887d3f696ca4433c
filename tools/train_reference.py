"""Train the small reference networks and write models/NAME_DATA.onnx and the table in models/README.md.

    python tools/train_reference.py --data digits                     all of them on scikit-learn's digits
    python tools/train_reference.py resnet20 --data fashion-mnist     one of them on Fashion-MNIST

Needs the package installed with its extras `train` and `data`, and for Fashion-MNIST the Debian package
dataset-fashion-mnist. The validation part is looked at after each epoch, the test part once, at the end. Seeded;
Fashion-MNIST is trained in bfloat16, evaluated and exported in float32.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare_fashion_mnist import load_splits, val_indices
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from train_digits import augment as turn_scale_and_move

from onnxcompress.data import InputSpec, load_data
from onnxcompress.inspection import inspect_model
from onnxcompress.models import convnext, deit, densenet, mobilenetv2, resnet
from onnxcompress.train.export import METADATA_PREFIX, export_module

MODELS = Path(__file__).resolve().parent.parent / "models"
DATA = {"digits": "scikit-learn's digits, 8x8", "fashion-mnist": "Fashion-MNIST, 28x28"}
PADDING = 2  # pixels by which a Fashion-MNIST image may move

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Args:
        rate: Peak of the one-cycle schedule.
        clip: Gradient norm allowed.
        committed: Whether its file lies in models/; without a name only those are trained.
    """

    build: Callable[..., nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 60
    batch: int = 64
    optimizer: str = "adamw"
    rate: float = 4e-3
    weight_decay: float = 0.05
    clip: float = 5.0
    label_smoothing: float = 0.05
    committed: bool = True


RESNET = Recipe(resnet.resnet20, {"channels": 1}, epochs=18, batch=128, optimizer="sgd", rate=0.2, weight_decay=5e-4)
RECIPES = {
    "digits": {
        "resnet20": Recipe(resnet.resnet20, {"channels": 1, "widths": (8, 16, 16)}),
        "mobilenetv2_mini": Recipe(
            mobilenetv2.mobilenetv2_mini,
            {
                "settings": ((1, 8, 1, 1), (6, 8, 2, 1), (6, 12, 3, 2), (6, 16, 2, 1)),
                "stem_width": 8,
                "stem_stride": 1,
                "head_width": 64,
            },
            epochs=100,
        ),
        "convnext_mini": Recipe(
            convnext.convnext_mini, {"depths": (3, 3), "widths": (16, 24), "patch_size": 1}, clip=1.0
        ),
        "deit_mini": Recipe(
            deit.deit_mini,
            {"image_size": 8, "patch_size": 2, "dim": 24, "depth": 4, "heads": 2, "mlp_ratio": 2},
            epochs=150,
            clip=1.0,
        ),
        "densenet_mini": Recipe(densenet.densenet_mini, {"depths": (4, 4), "growth": 8, "stem_width": 16}),
    },
    "fashion-mnist": {
        "resnet20": RESNET,
        "resnet56": replace(RESNET, build=resnet.resnet56, epochs=8, committed=False),
        "mobilenetv2_mini": Recipe(mobilenetv2.mobilenetv2_mini, epochs=15, batch=128, weight_decay=0.02),
        "convnext_mini": Recipe(convnext.convnext_mini, epochs=30, batch=128, clip=1.0),
        "deit_mini": Recipe(deit.deit_mini, epochs=50, batch=128, rate=2e-3, clip=1.0),
        "densenet_mini": Recipe(densenet.densenet_mini, {"stem_stride": 2}, epochs=15, batch=128, weight_decay=0.02),
    },
}


def as_tensors(images: np.ndarray, labels: np.ndarray) -> Split:
    return torch.from_numpy(images), torch.from_numpy(labels)


def load_digits() -> dict[str, Split]:
    """The training part of `sklearn:digits` less 12 of each class for validation; the held-out part as test."""
    spec = InputSpec("image", np.dtype(np.float32), ("batch", 1, 8, 8))
    splits = {}
    for name, source in (("train", "sklearn:digits:train"), ("test", "sklearn:digits")):
        data = load_data(source, inputs=[spec])
        ((feeds, labels),) = data.batches(len(data))
        assert labels is not None
        splits[name] = feeds["image"], labels
    images, labels = splits["train"]
    val = np.zeros(len(labels), bool)
    val[val_indices(labels, 12, seed=8)] = True
    splits |= {"train": (images[~val], labels[~val]), "val": (images[val], labels[val])}
    return {name: as_tensors(*split) for name, split in splits.items()}


def flip_and_move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror every second image and move each by up to PADDING pixels, filling with black."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (PADDING,) * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32.

    For depthwise ones with a stride: oneDNN's gradient in bfloat16 took 89 ms where float32 took 3 (torch 2.13, 128
    images of 144x14x14, one Zen 5 core).
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay is for matrices and kernels: not for biases, norms, tokens or layer scales."""
    decayed = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, recipe.rate)


def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    with torch.no_grad():
        right = [
            (model(images).argmax(1) == labels).float()
            for images, labels in zip(split[0].split(500), split[1].split(500), strict=True)
        ]
    return float(torch.cat(right).mean())


def train(
    recipe: Recipe, splits: Mapping[str, Split], augment: Callable[..., Tensor], seed: int, fast: bool
) -> dict[str, Tensor]:
    """Return the trained weights; ``fast`` computes in bfloat16 with channels last."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = recipe.build(**recipe.settings)
    if fast:
        model = model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1 and module.stride != (1, 1):
                module.__class__ = Float32Conv2d
    images, labels = splits["train"]
    steps = -(-len(images) // recipe.batch)
    optimizer = make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.epochs * steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(recipe.batch):
            inputs = augment(images[chosen], generator)
            if fast:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = model(inputs)
            loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        seconds = time.perf_counter() - start
        left = seconds / epoch * (recipe.epochs - epoch)
        val = accuracy(model, splits["val"])
        print(
            f"  epoch {epoch}/{recipe.epochs}: loss {total / len(images):.4f}, val {val:.4f}, "
            f"{seconds:.0f} s, {left:.0f} s left",
            flush=True,
        )
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def export(model: nn.Module, splits: Mapping[str, Split], path: Path, command: str) -> None:
    """Write the file with its accuracy and the command that remakes it among its properties."""
    images, labels = splits["test"]
    reached = accuracy(model, splits["test"])
    exported = export_module(
        model,
        images[:2],
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_batch=True,
        metadata={"test_accuracy": f"{reached:.4f}", "test_samples": str(len(labels)), "command": command},
    )
    print(
        f"{path.name}: test {reached:.4f}, {exported.size_bytes} bytes, "
        f"onnxruntime against torch: max|d| / max|y| = {exported.relative_error:.1e}",
        flush=True,
    )


def table(folder: Path) -> str:
    """The text of models/README.md, from the files themselves."""
    lines = [
        "# Trained reference networks",
        "",
        "Written by `tools/train_reference.py`. Accuracy is top-1 on the test part; parameters (with the statistics of",
        "BatchNormalization) and MACs are those of `onnxcompress inspect`. Input `image` (batch, 1, H, W) float32 in",
        "[0, 1], output `logits` (batch, 10). `digits.onnx` is the work of `tools/train_digits.py`.",
    ]
    for data, words in DATA.items():
        files = sorted(folder.glob(f"*_{data.replace('-', '_')}.onnx"))
        if not files:
            continue
        lines += ["", f"## {words}", ""]
        lines += ["| file | parameters | MACs | bytes | test accuracy | made by |", "|---|--:|--:|--:|--:|---|"]
        for file in files:
            found = inspect_model(file, download=False)
            kept = ("test_accuracy", "test_samples", "command")
            reached, samples, command = (found["metadata"][METADATA_PREFIX + key] for key in kept)
            percent = f"{100 * float(reached):.2f} % of {int(samples):,}"
            numbers = f"{found['parameters']:,} | {found['macs']:,} | {found['size_bytes']:,}"
            lines.append(f"| `{file.name}` | {numbers} | {percent} | `{command}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES['digits'])}; default all")
    parser.add_argument("--data", choices=sorted(RECIPES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=MODELS, help="folder of the .onnx files and the table")
    parser.add_argument("--weights", type=Path, help="keep the trained weights there, as .safetensors")
    parser.add_argument("--export-only", action="store_true", help="take the weights from there, do not train")
    arguments = parser.parse_args()
    recipes = RECIPES[arguments.data]
    unknown = sorted(set(arguments.names) - set(recipes))
    if unknown:
        parser.error(f"no network {', '.join(unknown)}; there is {', '.join(recipes)}")
    if arguments.export_only and arguments.weights is None:
        parser.error("--export-only needs --weights")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    fast = arguments.data == "fashion-mnist"
    splits = {n: as_tensors(*split) for n, split in load_splits().items()} if fast else load_digits()

    for name in arguments.names or [name for name, recipe in recipes.items() if recipe.committed]:
        recipe, stem = recipes[name], f"{name}_{arguments.data.replace('-', '_')}"
        kept = arguments.weights / f"{stem}.safetensors" if arguments.weights else None
        model = recipe.build(**recipe.settings)
        if arguments.export_only:
            weights = load_file(kept)
        else:
            print(f"{stem}: {sum(p.numel() for p in model.parameters()):,} parameters")
            weights = train(recipe, splits, flip_and_move if fast else turn_scale_and_move, arguments.seed, fast)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                save_file(weights, kept)
        model.load_state_dict(weights)
        command = f"python tools/train_reference.py {name} --data {arguments.data}"
        if arguments.seed:
            command += f" --seed {arguments.seed}"
        export(model, splits, arguments.output / f"{stem}.onnx", command)
    (arguments.output / "README.md").write_text(table(arguments.output))


if __name__ == "__main__":
    main()
