"""`onnxcompress export`: an nn.Module as an ONNX file, checked against torch."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.options import LARGEST_SIZE, FilePath, Number
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

FORM = "[NAME:]1x3x224x224[:DTYPE[:BOUND]]"
TYPES = {
    **{name: name for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")},
    "uint8": "uint8",
    "bool": "bool",
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "int": "int32",
    "long": "int64",
}
INTEGER_BOUND = 2  # 0 and 1 are valid indices, masks and token types; a vocabulary's size is the user's to tell


@dataclass(frozen=True)
class Input:
    """One input: ``name`` or None, sizes, torch's name of its type, and what integers stay below."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    bound: int


class InputForm(click.ParamType[Input]):
    """``1x3x224x224``, ``image:1,3,224,224``, ``tokens:1x128:int64:30522``; a scalar is ``NAME::DTYPE``."""

    name = "input"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Input:
        if isinstance(value, Input):
            return value
        text = str(value).strip()
        types = "|".join(TYPES)
        form = rf"(?:(?P<name>.+?):)??(?P<dims>\d+(?:[x,]\d+)*)?(?::(?P<dtype>{types})(?::(?P<bound>\d+))?)?"
        found = re.fullmatch(form, text)
        if not text or found is None or (found["dims"] is None and found["dtype"] is None):
            self.fail(
                f"{value!r}: expected {FORM} with sizes as numbers and DTYPE one of {', '.join(TYPES)}", param, ctx
            )
        shape = tuple(int(size) for size in re.split("[x,]", found["dims"] or "") if size)
        if any(not 1 <= size <= LARGEST_SIZE for size in shape):
            self.fail(f"{value!r}: sizes are from 1 to {LARGEST_SIZE}", param, ctx)
        dtype, bound = TYPES[found["dtype"] or "float32"], int(found["bound"] or INTEGER_BOUND)
        if found["bound"] is not None and (not dtype.lstrip("u").startswith("int") or bound < 1):
            self.fail(f"{value!r}: a bound of at least 1 goes with an integer type", param, ctx)
        return Input(found["name"], shape, dtype, bound)


@click.command("export")
@click.argument("factory", metavar="PACKAGE.MODULE:FACTORY")
@click.option("-o", "--output", type=FilePath(), required=True, help="Where to write.")
@click.option(
    "--input",
    "inputs",
    type=InputForm(),
    multiple=True,
    required=True,
    metavar=FORM,
    help="Shape of an input, once for each. Names are those of forward's parameters unless given; integers are drawn "
    f"below BOUND, {INTEGER_BOUND} by default.",
)
@click.option("--checkpoint", type=FilePath(), metavar="F", help="Weights: .safetensors, or a file of torch.save.")
@click.option("--checkpoint-key", metavar="KEY", help="Where in it the state_dict is; by default looked for.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An argument for FACTORY: classes=10.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the first axis of inputs and outputs open.")
@click.option(
    "--exporter",
    type=click.Choice(["torchscript", "dynamo"]),
    default="torchscript",
    show_default=True,
    help="torch's.",
)
@click.option("--opset", type=click.IntRange(min=1), help="By default 17, with dynamo 18.")
@click.option("--input-names", metavar="A,B", help="Names of all inputs, in order.")
@click.option("--output-names", metavar="A,B", help="Names of all outputs, in order.")
@click.option("--tolerance", type=Number(min=0), help="Largest max|d| / max|y| of an output.")
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Of the check's inputs, and of the weights where there is no checkpoint.",
)
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    factory: str,
    output: Path,
    inputs: tuple[Input, ...],
    checkpoint: Path | None,
    checkpoint_key: str | None,
    settings: tuple[str, ...],
    dynamic_batch: bool,
    exporter: str,
    opset: int | None,
    input_names: str | None,
    output_names: str | None,
    tolerance: float | None,
    seed: int,
    report: Path | None,
    as_json: bool,
) -> None:
    """Write an nn.Module as ONNX, BatchNormalization kept, and check it against torch on onnxruntime.

    FACTORY is a function or a class that gives the module, or the module itself; it is looked for from the working
    directory first. It is exported in evaluation mode.
    """
    if importlib.util.find_spec("torch") is None:
        raise RecipeError("export needs torch: pip install onnxcompress[train]")
    started = time.monotonic()
    check_report(report)
    from onnxcompress.optimizer import check_target
    from onnxcompress.runtime import Runtime

    check_target(output)
    if checkpoint_key is not None and checkpoint is None:
        raise RecipeError("--checkpoint-key needs --checkpoint")
    names = _input_names(inputs, input_names)
    with Runtime(timeout_s=300.0) as runtime:  # its imports run beside torch's
        from onnxcompress.train.checkpoints import load_checkpoint
        from onnxcompress.train.export import export_module
        from onnxcompress.train.factories import make_module, parse_settings

        module = make_module(factory, parse_settings(settings), seed=seed)
        metadata = {"factory": factory}
        weights = f"seeded initialization (seed {seed}): no checkpoint is given"
        if checkpoint is None:
            metadata["seed"] = str(seed)
        else:
            loaded = load_checkpoint(module, checkpoint, key=checkpoint_key)
            metadata["checkpoint"] = checkpoint.name
            place = f", key {loaded.key}" if loaded.key else ""
            place += f", without {loaded.prefix!r} in front" if loaded.prefix else ""
            weights = f"{loaded.tensors} tensors of {checkpoint}{place}"
        exported = export_module(
            module,
            _examples(inputs, seed),
            output,
            input_names=names,
            output_names=None if output_names is None else _split(output_names),
            dynamic_batch=dynamic_batch,
            exporter=exporter,
            opset=opset,
            metadata=metadata,
            seed=seed,
            runtime=runtime,
            **({} if tolerance is None else {"tolerance": tolerance}),
        )
    found = _as_dict(exported, factory, weights, time.monotonic() - started)
    if report is not None:
        write_report(report, with_weight_bytes(found, None, exported.path), "export", exported.path)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _show(exported, factory, weights)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def _input_names(inputs: tuple[Input, ...], given: str | None) -> list[str] | None:
    named = [one.name for one in inputs if one.name is not None]
    if given is not None:
        if named:
            raise RecipeError("inputs are named by --input NAME:... or by --input-names, not by both")
        return _split(given)
    if named and len(named) < len(inputs):
        raise RecipeError(f"{len(named)} of {len(inputs)} inputs have a name: name all, or none")
    return named or None


def _examples(inputs: tuple[Input, ...], seed: int) -> list[Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    examples = []
    for one in inputs:
        dtype = getattr(torch, one.dtype)
        if dtype.is_floating_point:
            examples.append(torch.randn(one.shape, generator=generator).to(dtype))
        else:
            examples.append(torch.randint(0, min(one.bound, LARGEST_SIZE), one.shape, generator=generator).to(dtype))
    return examples


def _as_dict(exported: Any, factory: str, weights: str, seconds: float) -> dict[str, Any]:
    from dataclasses import asdict

    found = {**asdict(exported), "path": str(exported.path), "factory": factory, "weights": weights}
    for side in ("inputs", "outputs"):
        found[side] = [{"name": name, "shape": list(shape)} for name, shape in found[side]]
    return {**found, "seconds": round(seconds, 3)}


def _show(exported: Any, factory: str, weights: str) -> None:
    from onnxcompress import report as reports

    click.echo(
        f"{factory} -> {exported.path}: {reports.bytes_text(exported.size_bytes)}"
        f"{' with the weights in a file of their own' if exported.external_data else ''}, {exported.nodes} nodes, "
        f"opset {exported.opset}, {exported.exporter}"
    )
    click.echo(f"weights {weights}")
    for side in ("inputs", "outputs"):
        for name, shape in getattr(exported, side):
            click.echo(f"{side[:-1]:7} {name}: [{', '.join(map(str, shape))}]")
    sizes = f" at batch {', '.join(map(str, exported.batch_sizes))}" if exported.batch_sizes else ""
    click.echo(
        f"parity  max|d| / max|y| = {exported.relative_error:.1e} over {exported.feeds} inputs{sizes}, "
        f"onnxruntime against torch, allowed {exported.tolerance:.0e}"
    )
    for note in exported.notes:
        click.echo(f"note    {note}")
