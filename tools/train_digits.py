"""Train the embedded digits model and write models/digits.onnx: `python tools/train_digits.py` (about a minute).

Needs the package installed with its extras `train` and `data`. Seeded, on one CPU thread, with deterministic kernels:
the same machine writes the same bytes every time. Only the training part of `sklearn:digits` is trained on; the
held-out part is looked at once, at the end, for the printed accuracy.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional

from onnxcompress.data import InputSpec, load_data
from onnxcompress.models.digits import Digits

MODEL = Path(__file__).resolve().parent.parent / "models" / "digits.onnx"
SPEC = InputSpec("image", np.dtype(np.float32), ("batch", 1, 8, 8))

EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY = 60, 64, 5e-3, 0.05
MIN_ACCURACY = 0.975
MAX_RELATIVE_ERROR = 5e-6  # torch against onnxruntime; measured 5.2e-7
MAX_BYTES = 500_000


def images_and_labels(source: str) -> tuple[Tensor, Tensor]:
    data = load_data(source, inputs=[SPEC])
    ((feeds, labels),) = data.batches(len(data))
    return torch.from_numpy(feeds["image"]), torch.from_numpy(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 12 % and move by up to 0.8 pixels, each image by its own amount."""
    count = len(images)
    turn, scale, dx, dy = 2 * torch.rand(4, count, generator=generator) - 1
    turn, scale = turn * torch.pi / 15, 1 + 0.12 * scale
    shift = 0.8 / 4  # half the image is 4 pixels, or 1 in grid units
    rows = [scale * turn.cos(), -scale * turn.sin(), shift * dx, scale * turn.sin(), scale * turn.cos(), shift * dy]
    grid = functional.affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Digits()
    steps = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, epochs=EPOCHS, steps_per_epoch=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(augment(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {total / len(images):.4f}", flush=True)
    return model.eval()


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write ONNX with every BatchNormalization kept: evaluation mode, yet nothing folded."""
    torch.onnx.export(
        model,
        (example,),
        str(path),
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)

    start = time.perf_counter()
    model = train(*images_and_labels("sklearn:digits:train"), arguments.seed)
    print(f"trained in {time.perf_counter() - start:.0f} s, {sum(p.numel() for p in model.parameters())} parameters")

    images, labels = images_and_labels("sklearn:digits")
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        draft = Path(folder) / arguments.output.name
        export(model, images[:2], draft)
        (logits,) = ort.InferenceSession(draft, providers=["CPUExecutionProvider"]).run(None, {"image": images.numpy()})
        with torch.no_grad():
            reference = model(images).numpy()
        error = float(np.abs(logits - reference).max() / np.abs(reference).max())
        accuracy, size_bytes = float((logits.argmax(1) == labels.numpy()).mean()), draft.stat().st_size
        print(f"held out: {accuracy:.4%} of {len(labels)}; onnxruntime against torch: max|d| / max|y| = {error:.1e}")
        if not (accuracy >= MIN_ACCURACY and error <= MAX_RELATIVE_ERROR and size_bytes <= MAX_BYTES):
            limits = f"accuracy {MIN_ACCURACY}, error {MAX_RELATIVE_ERROR}, bytes {MAX_BYTES}"
            raise SystemExit(f"{arguments.output} is not written: {size_bytes} bytes; the limits are {limits}")
        os.replace(draft, arguments.output)
    print(f"{arguments.output}: {size_bytes} bytes")


if __name__ == "__main__":
    main()
