"""LSTM, GRU and RNN.

ONNX stacks the gates as i, o, f, c and z, r, h where torch has i, f, c, o and r, z, h; the weights are put into torch's
order on the way, so that gradients reach them as they are stored. What torch's fused kernels do not know (peepholes,
clipping, other activations, sequences of different lengths, a GRU that resets before its matrix) runs step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.train.ops.call import Builder, Call, Function, integers
from onnxcompress.train.ops.indexing import reversed_in_time

Activation = Callable[[Tensor], Tensor]

DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Number of parameters, with their defaults.
PARAMETERS: dict[str, tuple[float, ...]] = {
    "affine": (1.0, 0.0),
    "elu": (1.0,),
    "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01,),
    "scaledtanh": (1.0, 1.0),
    "thresholdedrelu": (1.0,),
}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softsign": functional.softsign,
    "softplus": functional.softplus,
    "affine": lambda x, alpha, beta: alpha * x + beta,
    "elu": lambda x, alpha: functional.elu(x, alpha),
    "hardsigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "leakyrelu": lambda x, alpha: functional.leaky_relu(x, alpha),
    "scaledtanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "thresholdedrelu": lambda x, alpha: torch.where(x > alpha, x, 0.0),
}


@dataclass(frozen=True)
class Cell:
    """Attributes of the node.

    Args:
        op: LSTM, GRU or RNN.
        directions: For each direction, whether it runs backwards.
        activations: By direction.
        clip: Bound of what enters an activation, or None.
        batch_first: Layout 1.
        coupled: The forget gate is 1 - the input gate.
        reset_after: The GRU resets the product with its matrix, not the factor.
    """

    op: str
    directions: tuple[bool, ...]
    activations: tuple[tuple[Activation, ...], ...]
    clip: float | None
    batch_first: bool
    coupled: bool
    reset_after: bool


@dataclass(frozen=True)
class Weights:
    """One direction's weights, in ONNX order; what is left out is None."""

    w: Tensor
    r: Tensor
    b: Tensor | None
    p: Tensor | None


def activation(name: str, alphas: Iterator[float], betas: Iterator[float]) -> Activation:
    """The function of an activation; it takes its parameters from those that are left."""
    defaults = PARAMETERS.get(name, ())
    given = [next(source, default) for source, default in zip((alphas, betas), defaults, strict=False)]
    function = ACTIVATIONS[name]
    return (lambda x: function(x, *given)) if given else function


def activation_names(call: Call, directions: int) -> list[str]:
    names = [name.lower() for name in call.attribute("activations") or DEFAULTS[call.op] * directions]
    if len(names) != len(DEFAULTS[call.op]) * directions or any(name not in ACTIVATIONS for name in names):
        raise call.refuse(f"the list of activations {call.attribute('activations')}")
    return names


def recurrent(call: Call) -> Function:
    direction = call.attribute("direction", "forward")
    directions = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}.get(direction)
    if directions is None:
        raise call.refuse(f"direction {direction!r}")
    names = activation_names(call, len(directions))
    alphas, betas = iter(call.attribute("activation_alpha") or ()), iter(call.attribute("activation_beta") or ())
    functions = [activation(name, alphas, betas) for name in names]
    count = len(functions) // len(directions)
    cell = Cell(
        call.op,
        directions,
        tuple(tuple(functions[place : place + count]) for place in range(0, len(functions), count)),
        call.attribute("clip"),
        bool(call.attribute("layout", 0)),
        bool(call.attribute("input_forget", 0)),
        bool(call.attribute("linear_before_reset", 0)),
    )
    kernel = fused_kernel(call, cell, names)
    outputs = len(call.outputs)
    lengths_known = call.integers(4)

    def run(
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        lengths: Tensor | None = None,
        h: Tensor | None = None,
        c: Tensor | None = None,
        p: Tensor | None = None,
    ) -> Sequence[Tensor]:
        time = 1 if cell.batch_first else 0
        if lengths is not None:
            steps = x.shape[time]
            if all(length == steps for length in lengths_known or integers(lengths)):
                lengths = None
        states = [initial(state, x, w, r, cell) for state in ((h, c) if cell.op == "LSTM" else (h,))]
        if kernel is not None and lengths is None:
            found = fused(kernel, cell, x, (w, r, b), states)
        else:
            found = looped(cell, x, (w, r, b, p), states, lengths)
        return found[:outputs]

    return run


def initial(state: Tensor | None, x: Tensor, w: Tensor, r: Tensor, cell: Cell) -> Tensor:
    """The state before the first step, (directions, batch, hidden)."""
    if state is None:
        return x.new_zeros(w.shape[0], x.shape[0 if cell.batch_first else 1], r.shape[2])
    return (state.transpose(0, 1) if cell.batch_first else state).to(x.device).contiguous()


def fused_kernel(call: Call, cell: Cell, names: Sequence[str]) -> Callable[..., Any] | None:
    """torch's kernel for the whole sequence, where there is one."""
    if cell.clip is not None or cell.coupled or call.has(7):
        return None
    if cell.op == "RNN":
        kernels = {"tanh": torch._VF.rnn_tanh, "relu": torch._VF.rnn_relu}
        return kernels.get(names[0]) if len(set(names)) == 1 else None
    if names != DEFAULTS[cell.op] * len(cell.directions):
        return None
    if cell.op == "LSTM":
        return torch._VF.lstm
    return torch._VF.gru if cell.reset_after else None


def in_torch_order(op: str, stacked: Tensor) -> Tensor:
    """The gates of one direction along axis 0, as torch has them."""
    if op == "RNN":
        return stacked
    hidden = stacked.shape[0] // GATES[op]
    if op == "LSTM":  # i, o, f, c -> i, f, c, o
        return torch.cat([stacked[:hidden], stacked[2 * hidden :], stacked[hidden : 2 * hidden]])
    return torch.cat([stacked[hidden : 2 * hidden], stacked[:hidden], stacked[2 * hidden :]])  # z, r, h -> r, z, h


def fused(
    kernel: Callable[..., Any],
    cell: Cell,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    states: Sequence[Tensor],
) -> list[Tensor]:
    """All steps by one kernel; for a direction that is backwards alone the sequence is turned around."""
    w, r, b = weights
    flat = []
    for place in range(len(cell.directions)):
        flat += [in_torch_order(cell.op, w[place]), in_torch_order(cell.op, r[place])]
        if b is not None:
            flat += [in_torch_order(cell.op, half) for half in b[place].chunk(2)]
    time = 1 if cell.batch_first else 0
    turned = cell.directions == (True,)
    both = len(cell.directions) == 2
    start = tuple(states) if cell.op == "LSTM" else states[0]
    sequence = x.flip(time) if turned else x
    y, *last = kernel(sequence, start, flat, b is not None, 1, 0.0, False, both, cell.batch_first)
    y = (y.flip(time) if turned else y).unflatten(2, (len(cell.directions), -1))
    if cell.batch_first:
        return [y, *(state.transpose(0, 1) for state in last)]
    return [y.transpose(1, 2), *last]


def looped(
    cell: Cell,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    states: Sequence[Tensor],
    lengths: Tensor | None,
) -> list[Tensor]:
    """All steps one by one."""
    sequence = x.transpose(0, 1) if cell.batch_first else x
    ended = None
    if lengths is not None:
        time = torch.arange(sequence.shape[0], device=x.device)
        ended = (time[:, None] >= lengths.to(x.device)).unsqueeze(2)  # (T, N, 1)

    def turn(y: Tensor) -> Tensor:
        return y.flip(0) if lengths is None else reversed_in_time(y.transpose(0, 1), lengths).transpose(0, 1)

    ys, lasts = [], []
    for place, backwards in enumerate(cell.directions):
        own = Weights(*(None if tensor is None else tensor[place] for tensor in weights))  # type: ignore[arg-type]
        y, last = one_direction(cell, place, turn(sequence) if backwards else sequence, own, states, ended)
        ys.append(turn(y) if backwards else y)
        lasts.append(last)
    if cell.batch_first:
        found = [torch.stack(ys, 2).transpose(0, 1)]
        return found + [torch.stack(state, 1) for state in zip(*lasts, strict=True)]
    return [torch.stack(ys, 1), *(torch.stack(state) for state in zip(*lasts, strict=True))]


def one_direction(
    cell: Cell, place: int, x: Tensor, weights: Weights, states: Sequence[Tensor], ended: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (T, N, H) and the last states of one direction."""
    hidden = weights.r.shape[1]
    bias_w, bias_r = (None, None) if weights.b is None else weights.b.chunk(2)
    inputs = functional.linear(x, weights.w, bias_w)
    clip = cell.clip
    functions: Sequence[Activation] = cell.activations[place]
    if clip is not None:
        # The gates' alone: onnxruntime lets an LSTM's state into its last activation as it is.
        functions = [_clipped(function, clip) for function in functions[:2]] + list(functions[2:])
    step = {"LSTM": lstm_step, "GRU": gru_step, "RNN": rnn_step}[cell.op](cell, weights, bias_r, functions, hidden)
    state = [one[place] for one in states]
    outputs = []
    for time, entering in enumerate(inputs.unbind(0)):
        new = step(entering, *state)
        if ended is None:
            outputs.append(new[0])
        else:
            # A sequence that has ended keeps its state and gives zeros.
            new = [torch.where(ended[time], old, one) for old, one in zip(state, new, strict=True)]
            outputs.append(new[0].masked_fill(ended[time], 0.0))
        state = list(new)
    return (torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], hidden)), state


def _clipped(function: Activation, bound: float) -> Activation:
    return lambda x: function(x.clamp(-bound, bound))


Step = Callable[..., Sequence[Tensor]]


def lstm_step(cell: Cell, weights: Weights, bias: Tensor | None, functions: Sequence[Activation], hidden: int) -> Step:
    f, g, h_of = functions
    pi, po, pf = (None, None, None) if weights.p is None else weights.p.chunk(3)

    def run(entering: Tensor, h: Tensor, c: Tensor) -> Sequence[Tensor]:
        i, o, forget, new = (entering + functional.linear(h, weights.r, bias)).chunk(4, 1)
        if pi is not None and pf is not None:
            i, forget = i + pi * c, forget + pf * c
        i = f(i)
        kept = 1 - i if cell.coupled else f(forget)
        c = kept * c + i * g(new)
        o = f(o if po is None else o + po * c)
        return o * h_of(c), c

    return run


def gru_step(cell: Cell, weights: Weights, bias: Tensor | None, functions: Sequence[Activation], hidden: int) -> Step:
    f, g = functions
    gates, candidate = weights.r[: 2 * hidden], weights.r[2 * hidden :]
    gate_bias, new_bias = (None, None) if bias is None else (bias[: 2 * hidden], bias[2 * hidden :])

    def run(entering: Tensor, h: Tensor) -> Sequence[Tensor]:
        z, r = f(entering[:, : 2 * hidden] + functional.linear(h, gates, gate_bias)).chunk(2, 1)
        if cell.reset_after:
            product = r * functional.linear(h, candidate, new_bias)
        else:
            product = functional.linear(r * h, candidate, new_bias)
        new = g(entering[:, 2 * hidden :] + product)
        return ((1 - z) * new + z * h,)

    return run


def rnn_step(cell: Cell, weights: Weights, bias: Tensor | None, functions: Sequence[Activation], hidden: int) -> Step:
    f = functions[0]
    return lambda entering, h: (f(entering + functional.linear(h, weights.r, bias)),)


OPERATORS: dict[str, Builder] = {"GRU": recurrent, "LSTM": recurrent, "RNN": recurrent}
