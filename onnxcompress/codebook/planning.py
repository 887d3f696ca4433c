"""Which form each layer is to have: estimates, damage by running the network, and the file's size to the byte."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.codebook.allocation import Offer, allocate, least_size_for_damage, smallest_size, totals
from onnxcompress.codebook.codebook import Choice, QuantizedLayer, Statistics, index_type
from onnxcompress.codebook.damage import MAX_DAMAGE, DamageMeter
from onnxcompress.codebook.encoding import add_low_memory_hint, empty_order, encode, overhead_bytes
from onnxcompress.codebook.layers import Layer, find_layers
from onnxcompress.codebook.narrow import Float16Layer, Int8Layer
from onnxcompress.codebook.offers import SHARED_BYTES, Curve, Estimate, Form, estimate_forms, form_text
from onnxcompress.codebook.pooling import choose_pools, is_shared, pool_of, with_pools
from onnxcompress.codebook.resuming import Checkpoint
from onnxcompress.codebook.shaving import NAMES_PAY, SMALL_FILE_BYTES, Shaving, shave
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.codebook.target import corrected_bias
from onnxcompress.codebook.workers import Workers
from onnxcompress.errors import QuantizationError
from onnxcompress.graph import Graph
from onnxcompress.model_io import StagedFile, load

MAX_CORRECTIONS = 8  # of the budget, until the file meets it
LEAST_STEP = 1.3  # between the squared errors of two forms that say how damage grows
POWERS = (0.5, 4.0)  # of the squared error, at most
LEAST_LEFT = 0.02  # of a layer's output, as far as damage goes
Done = Callable[[Layer], None]
Carried = tuple[Curve, list[np.ndarray | None]]  # and the biases of its forms that were carried out


class BudgetError(QuantizationError):
    """No allocation is small enough; says how far it goes."""


@dataclass(frozen=True)
class Item:
    """A form of a layer with its costs in the whole."""

    form: Form
    size_bytes: int
    damage: float
    error: float  # relative, of the layer's output

    @property
    def offer(self) -> Offer:
        """With a damage that grows faster than the squared error: large errors of several layers add to each other."""
        return Offer(self.size_bytes, self.damage / max(1 - self.error**2, LEAST_LEFT))

    @property
    def importance(self) -> float:
        """That damage over the squared error: how much the layer counts in a codebook for many."""
        return self.offer.damage / self.error**2 if self.error else 0.0


@dataclass
class Menu:
    """What is on offer for one layer.

    Attributes:
        name: Of the layer.
        items: "keep" first.
        new_bias: A bias is added where there was none.
        sensitivity: Damage over the squared error of the layer's output, where that is small.
        bend: A squared error, and the power of it that the damage of larger ones goes with; None for the first power.
    """

    name: str
    items: list[Item]
    new_bias: bool = False
    sensitivity: float = 1.0
    bend: tuple[float, float] | None = None

    def damage(self, squared: float) -> float:
        """Of a squared error of the layer's output."""
        found = self.sensitivity * squared
        if self.bend is not None and squared > self.bend[0]:
            start, power = self.bend
            found = self.sensitivity * start * (squared / start) ** power
        return min(found, MAX_DAMAGE)

    def straight(self) -> Menu:
        """The same, with a damage that goes with the squared error however large."""
        other = Menu(self.name, [], self.new_bias, self.sensitivity)
        other.items = [other.item(item.form, item.size_bytes, item.error**2) for item in self.items]
        return other

    def correct(self, squared_errors: Mapping[Form, float]) -> None:
        """Take the squared errors that some forms turned out to have."""
        self.items = [
            self.item(item.form, item.size_bytes, squared_errors[item.form]) if item.form in squared_errors else item
            for item in self.items
        ]

    def item(self, form: Form, size_bytes: int, squared: float) -> Item:
        """A form with its costs."""
        return Item(form, size_bytes, self.damage(squared), math.sqrt(squared))


@dataclass(frozen=True)
class Plan:
    """A form for each layer.

    Attributes:
        forms: By the layer's name; "keep" ones too.
        size_bytes: Of the file.
        damage: Predicted, a relative squared error of the outputs.
        items: The forms with their costs.
        shaving: What is done to the rest of the file.
    """

    forms: Mapping[str, Form]
    size_bytes: int
    damage: float
    items: Mapping[str, Item] = field(default_factory=dict)
    shaving: Shaving = Shaving.NONE

    @property
    def cost(self) -> float:
        """What the allocation makes least."""
        return sum(item.offer.damage for item in self.items.values())

    @property
    def digest(self) -> str:
        """What tells plans apart."""
        text = "\n".join(f"{name} {form_text(form)}" for name, form in self.forms.items())
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    @property
    def keeps_all(self) -> bool:
        return all(form == "keep" for form in self.forms.values())


class Planner:
    """Allocates forms within sizes.

    Args:
        path: The graph that is quantized.
        original_bytes: Size of the user's file with external data; ratios in messages are against it.
        layers: Those that may change.
        menus: What is on offer, in the order of ``layers``.
        name: Of the file to be; that of a data file beside it stands in the file.
        graph_bytes: Size of ``path``, where that is not the user's file.
    """

    def __init__(
        self,
        path: Path,
        original_bytes: int,
        layers: Sequence[Layer],
        menus: Sequence[Menu],
        name: str | None = None,
        graph_bytes: int | None = None,
    ) -> None:
        self.path, self.original_bytes, self.name = path, original_bytes, name or path.name
        self.graph_bytes = original_bytes if graph_bytes is None else graph_bytes
        self.layers, self.menus = list(layers), list(menus)
        self._sizes: dict[tuple[Shaving, tuple[Form, ...]], int] = {}

    def _offers(self, shaving: Shaving, room: int | None, *, sharing: bool = True) -> tuple[list[list[Offer]], int]:
        """What is on offer for each layer, and the bytes of the codebooks that layers share at this size."""
        offers = [[item.offer for item in menu.items] for menu in self.menus]
        pools = [
            [pool_of(layer, item.form) for item in menu.items]
            for layer, menu in zip(self.layers, self.menus, strict=True)
        ]
        shared = choose_pools(offers, pools, room) if sharing and shaving == Shaving.PACKED else frozenset()
        return with_pools(offers, pools, shared), sum(pool.size_bytes for pool in shared)

    def smallest(self, shaving: Shaving = Shaving.PACKED, *, sharing: bool = True) -> Plan:
        """Everything as small as it gets."""
        offers, _ = self._offers(shaving, None, sharing=sharing)
        return self._plan(allocate(offers, smallest_size(offers)), shaving)

    def within(self, budget_bytes: int) -> Plan:
        """The least damage in a file of at most so many bytes.

        Raises:
            BudgetError: There is none.
        """
        if budget_bytes >= self.graph_bytes:
            return self._plan([0] * len(self.menus))
        for shaving in self._shavings(budget_bytes):
            best = self._within(budget_bytes, shaving)
            if best is not None:
                return best
        plan = self.smallest()
        reached = self.original_bytes / plan.size_bytes
        raise BudgetError(
            f"{budget_bytes} bytes cannot be reached: the smallest file is {plan.size_bytes} bytes ({reached:.1f}x)"
        )

    def rivals(self, budget_bytes: int) -> list[Plan]:
        """Plans for one size, of which none is the best for every network: the one expected to be first.

        What a codebook for many layers costs is measured layer by layer, in the float net; that it leaves the layers
        behind less to make up with is not seen there. So a plan that shares some has one without beside it. And what a
        coarse form of one layer does is measured with all others as they are. So plans for small files, which are made
        quickly, come with and without bends: deit_mini at 20x is better without, minilm_l3 at 9x with them.

        Raises:
            BudgetError: There is none.
        """
        plans = self._with_and_without_sharing(budget_bytes)
        if budget_bytes <= SMALL_FILE_BYTES and any(menu.bend for menu in self.menus):
            menus = [menu.straight() for menu in self.menus]
            other = Planner(self.path, self.original_bytes, self.layers, menus, self.name, self.graph_bytes)
            other._sizes = self._sizes  # of a file with these forms, whatever they are expected to cost
            plans += other._with_and_without_sharing(budget_bytes)
        different: dict[str, Plan] = {}
        for plan in plans:
            different.setdefault(plan.digest, plan)
        return list(different.values())

    def _with_and_without_sharing(self, budget_bytes: int) -> list[Plan]:
        best = self.within(budget_bytes)
        if not any(is_shared(form) for form in best.forms.values()):
            return [best]
        other = self._within(budget_bytes, best.shaving, sharing=False)
        return [best] if other is None else [best, other]

    def _shavings(self, size_bytes: int) -> list[Shaving]:
        """What may be shaved off a file of this size, in the order of preference."""
        if size_bytes > SMALL_FILE_BYTES:
            return list(Shaving)
        plain, named, packed = (self.smallest(one).size_bytes for one in list(Shaving)[1:])
        if named - packed >= NAMES_PAY * size_bytes:
            return [Shaving.PACKED]
        short = [Shaving.NAMES, Shaving.PACKED]
        return short if plain - named >= NAMES_PAY * size_bytes else [Shaving.PLAIN, *short]

    def _within(self, budget_bytes: int, shaving: Shaving, *, sharing: bool = True) -> Plan | None:
        least = self.smallest(shaving, sharing=sharing)
        if least.size_bytes > budget_bytes:
            return None
        best = least
        offers, fixed = self._offers(shaving, None, sharing=sharing)
        room = budget_bytes - least.size_bytes + smallest_size(offers) + fixed
        for _ in range(MAX_CORRECTIONS):
            offers, fixed = self._offers(shaving, room, sharing=sharing)
            if room - fixed < smallest_size(offers):
                break
            plan = self._plan(allocate(offers, room - fixed), shaving)
            if plan.size_bytes <= budget_bytes:
                if plan.cost < best.cost:
                    best = plan
                if budget_bytes - plan.size_bytes < 64 or best is not plan:
                    break
            # From what it used, not from what it was allowed: the next must be another one.
            room = sum(item.size_bytes for item in plan.items.values()) + fixed + budget_bytes - plan.size_bytes
        return best

    def for_damage(self, damage: float) -> Plan:
        """The smallest file of at most this damage."""
        offers, _ = self._offers(Shaving.NONE, None)
        chosen = least_size_for_damage(offers, damage)
        plan = self._plan(chosen)
        if plan.size_bytes <= SMALL_FILE_BYTES and not plan.keeps_all:
            shaving = self._shavings(plan.size_bytes)[0]
            if shaving == Shaving.PACKED:
                offers, _ = self._offers(shaving, totals(offers, chosen).size_bytes)
                chosen = least_size_for_damage(offers, damage)
            plan = self._plan(chosen, shaving)
        return plan if plan.size_bytes < self.graph_bytes else self._plan([0] * len(self.menus))

    def exclude(self, name: str, form: Form) -> None:
        """Take a form that turned out impossible off a menu; "keep" always stays."""
        for menu in self.menus:
            if menu.name == name:
                menu.items = [item for item in menu.items if item.form != form or item.form == "keep"]

    def _plan(self, chosen: Sequence[int], shaving: Shaving = Shaving.NONE) -> Plan:
        items = {menu.name: menu.items[index] for menu, index in zip(self.menus, chosen, strict=True)}
        forms = {name: item.form for name, item in items.items()}
        damage = sum(item.damage for item in items.values())
        return Plan(forms, self._exact_size(forms, shaving), damage, items, shaving)

    def _exact_size(self, forms: Mapping[str, Form], shaving: Shaving) -> int:
        """The file's size, by writing one with these forms and no content."""
        key = shaving, tuple(forms[layer.name] for layer in self.layers)
        if all(form == "keep" for form in key[1]):
            return self.graph_bytes
        if key not in self._sizes:
            graph = load(self.path)
            new_bias = {menu.name for menu in self.menus if menu.new_bias}
            for layer in find_layers(graph)[0]:
                form = forms.get(layer.name, "keep")
                if form != "keep":
                    encode(graph, layer, hollow(layer, form, new_bias=layer.name in new_bias))
            finish(graph, shaving)
            with (
                tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder,
                StagedFile(graph, Path(folder) / self.name) as staged,
            ):
                self._sizes[key] = staged.size_bytes
        return self._sizes[key]


def finish(graph: Graph, shaving: Shaving) -> None:
    """What is left to do when all layers are encoded: say how they stay packed, or save the bytes of that as well."""
    if shaving == Shaving.NONE:
        add_low_memory_hint(graph)
    shave(graph, shaving)


def hollow(layer: Layer, form: Form, *, new_bias: bool = False) -> QuantizedLayer | Int8Layer | Float16Layer:
    """A quantized layer of the right size, with numbers that mean nothing."""
    bias = np.ones(layer.outputs, np.float32) if new_bias else None
    if form == "float16":
        return Float16Layer(np.zeros((layer.outputs, layer.length), np.float16), bias)
    if form == "int8":
        factors = np.arange(1, layer.outputs + 1, dtype=np.float32)
        return Int8Layer(np.zeros((layer.outputs, layer.length), np.int8), factors, bias)
    assert isinstance(form, Choice)
    whole = form.codebook_type == "int8"
    return QuantizedLayer(
        form,
        np.zeros((form.codewords, form.block), np.int8 if whole else np.float16),
        np.ones(form.block, np.float32) if whole else None,
        np.zeros((layer.outputs, layer.length // form.block), index_type(form.codewords)),
        np.ones(layer.outputs, np.float16) if form.scaled else None,
        bias,
        0.0,
        None,
        order=empty_order(layer, form),
    )


# -- menus -----------------------------------------------------------------------------------------------------------


def make_menus(
    graph: Graph,
    layers: Sequence[Layer],
    calibration: Calibration,
    meter: DamageMeter | None,
    workers: Workers,
    checkpoint: Checkpoint,
    *,
    method: str,
    permute: bool,
    seed: int,
    done: Done,
) -> list[Menu]:
    """Estimate every form of every layer, and run the network with each layer changed once.

    Args:
        graph: The outermost graph.
        layers: Its layers.
        calibration: Of the float net: nothing is replaced.
        meter: Measures damage; None takes the error of the layer's own output for it.
        workers: Where estimates are made.
        checkpoint: Menus that are there are taken from it.
        method: How the layers will be quantized.
        permute: Whether orders of input channels are on offer.
        seed: Same seed, same menus.
        done: Called after each layer.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        kept = checkpoint.load(f"menu-{index:04d}")
        if kept is not None:
            found[layer.name] = kept
            done(layer)
    numbers = {layer.name: index for index, layer in enumerate(layers)}
    if len(found) < len(layers):
        for stage in calibration.stages():
            waiting = [layer for layer in stage if layer.name not in found]

            def finish(number: int, made: Carried, waiting: list[Layer] = waiting) -> None:
                layer = waiting[number]
                found[layer.name] = _measured(layer, made, meter)
                checkpoint.save(f"menu-{numbers[layer.name]:04d}", found[layer.name])
                done(layer)

            tasks = (
                (
                    layer.matrix(),
                    layer.bias(),
                    calibration.statistics(layer),
                    {
                        "stored_bytes": layer.stored_bytes,
                        "has_bias": layer.has_bias,
                        "kernel": layer.kernel,
                        "depthwise": layer.depthwise,
                        "swept": method == "sweep",
                        "scalable": method in ("sweep", "em"),
                        "permutable": permute and method in ("sweep", "em") and layer.is_permutable,
                        "seed": seed,
                    },
                )
                for layer in waiting
            )
            workers.map(_estimate, tasks, finish)
    typical = _typical_sensitivity(found.values())
    corrects_bias = method in ("sweep", "em")
    return [_menu(graph, layer, found[layer.name], typical, corrects_bias=corrects_bias) for layer in layers]


def _estimate(
    weight: np.ndarray, bias: np.ndarray | None, statistics: Statistics | None, wishes: Mapping[str, Any]
) -> Carried:
    """In another process: the curve of a layer, and the biases for the forms that were carried out."""
    curve = estimate_forms(weight, statistics, **wishes)
    decoded = [one.decoded for one in (curve.middle, curve.coarse) if one is not None]
    if statistics is None or not wishes["has_bias"]:
        return curve, [None] * len(decoded)
    return curve, [corrected_bias(weight, bias, one, statistics) for one in decoded]


def _measured(layer: Layer, made: Carried, meter: DamageMeter | None) -> dict[str, Any]:
    curve, biases = made
    tried = []
    for one, bias in zip((curve.middle, curve.coarse), biases, strict=False):
        assert one is not None, "there are as many biases"
        damage = None
        if meter is not None and not layer.in_body and one.form != "keep":
            damage = meter.measure([(layer, one.decoded, bias)])
        tried.append([one.error, damage])
    return {
        "forms": [[_written(one.form), one.size_bytes, one.error] for one in curve.estimates],
        "tried": tried,
        "corrected": biases[0] is not None,
    }


def _typical_sensitivity(found: Any) -> float:
    """Damage over squared error of the middle one of the layers that were tried."""
    firsts = [one["tried"][0] for one in found]
    ratios = [damage / error for error, damage in firsts if damage is not None and error > 0]
    return float(np.median(ratios)) if ratios else 1.0


def find_bend(tried: Sequence[Sequence[Any]]) -> tuple[float, float] | None:
    """From where on, and with which power of the squared error, damage grows faster or slower than it.

    In a transformer one direction holds most of the energy of a layer's output and little of what counts: minilm_l3 at
    9x, where the power was taken for 1, had a layer of it stored in 0.36 bits a weight, its own error being 0.09.

    Args:
        tried: (squared error, damage or None) of a form and of a coarser one.
    """
    if len(tried) < 2 or any(not error or not damage for error, damage in tried):
        return None
    (error, damage), (larger, other) = tried
    if larger < LEAST_STEP * error or other >= MAX_DAMAGE:
        return None
    return error, min(max(math.log(other / damage) / math.log(larger / error), POWERS[0]), POWERS[1])


def _menu(graph: Graph, layer: Layer, kept: Mapping[str, Any], typical: float, *, corrects_bias: bool) -> Menu:
    error, damage = kept["tried"][0]
    slope = typical if damage is None or error <= 0 else damage / error
    # A change that was not felt may be felt where it is larger; never quite for nothing.
    slope = max(slope, 1e-6 * typical, 1e-12)
    new_bias = kept["corrected"] and corrects_bias and layer.bias() is None
    menu = Menu(layer.name, [], new_bias, slope, find_bend(kept["tried"]))
    for written, size, squared in kept["forms"]:
        form = _read(written)
        if form == "keep":
            menu.items.append(Item(form, layer.stored_bytes, 0.0, 0.0))
            continue
        # offers.py counts the bias of a codebook; one that is there already stays in the fixed bytes
        arrays = size - 4 * layer.outputs if isinstance(form, Choice) and layer.has_bias else size
        shared = isinstance(form, Choice) and form.shared
        total = arrays + 4 * layer.outputs * new_bias + (SHARED_BYTES if shared else overhead_bytes(graph, layer, form))
        if total < layer.stored_bytes:
            menu.items.append(menu.item(form, total, squared))
    return menu


def _written(form: Form) -> Any:
    if isinstance(form, Choice):
        return list(astuple(form))
    return form


def _read(written: Any) -> Form:
    return Choice(*written) if isinstance(written, list) else written


__all__ = ["BudgetError", "Estimate", "Item", "Menu", "Plan", "Planner", "finish", "hollow", "make_menus"]
