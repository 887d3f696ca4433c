"""Every option of the verbs that train has an effect: none is read and forgotten."""

from __future__ import annotations

import importlib

import pytest

# What the command itself takes, and what it prints.
OF_THE_COMMAND = {"source", "output", "report", "as_json", "quiet", "help", "dry_run", "list_blocks"}


class Recorded(dict):
    """Remembers what was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __getitem__(self, name):
        self.asked.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("verb", ["finetune", "prune_depth", "prune_scale"])
@pytest.mark.parametrize("goal", ["macs", "latency"])
def test_every_option_is_read(verb, goal):
    module = importlib.import_module(f"onnxcompress.cli.{verb}")
    arguments = ["in.onnx", "-o", "out.onnx", "--data", "x.npz", "--val", "x.npz"]
    arguments += [] if verb == "finetune" else [f"--{goal}", "0.5x"]
    wishes = Recorded(module.command.make_context(verb, arguments).params)
    module._options(wishes)
    left = set(wishes) - wishes.asked - OF_THE_COMMAND
    assert left <= {"macs", "latency"} - {goal}, f"{verb} forgets {left}"
