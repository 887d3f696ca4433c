"""Which blocks to prune: a search over bit strings, one bit a block, for the highest score within a budget.

A candidate meets the budget and prunes no more than it needs: none of its blocks could stay. Four ways to look:

    exhaustive   every candidate
    ga           a genetic algorithm, (mu + lambda) with binary tournaments, uniform crossover and repair
    greedy       block by block, each time the one that costs the least score for what it saves
    random       so many candidates drawn at random

What a score is, the caller knows: ``evaluate`` gets bit strings, several at once so that they can run in parallel.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.errors import OutputError, RecipeError

METHODS = ("auto", "ga", "exhaustive", "greedy", "random")
EXHAUSTIVE_BLOCKS = 12  # up to so many, "auto" looks at every candidate
MOST_CANDIDATES = 1 << 16
CACHE_FORMAT = 1
_TRIES = 50  # at a candidate that is not known yet

Evaluate = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Budget:
    """How much has to be saved, and what each block saves.

    Args:
        savings: By block; one that saves nothing is never pruned.
        need: Smallest sum of the savings of the pruned blocks.
        places: By block, where it is: of two at one place, such as a merge and a deletion, a candidate has one at most.
            None where each is at its own.
    """

    savings: tuple[float, ...]
    need: float
    places: tuple[int, ...] | None = None

    @classmethod
    def count(cls, blocks: int, pruned: int) -> Budget:
        """Exactly ``pruned`` of the blocks."""
        return cls((1.0,) * blocks, float(pruned))

    @property
    def offered(self) -> list[int]:
        """The blocks that save anything, the largest saving first."""
        found = [index for index, saving in enumerate(self.savings) if saving > 0]
        return sorted(found, key=lambda index: -self.savings[index])

    @property
    def most(self) -> float:
        """What all blocks together save, of two at one place the better."""
        best: dict[int, float] = {}
        for index, saving in enumerate(self.savings):
            place = self.place(index)
            best[place] = max(best.get(place, 0.0), saving)
        return math.fsum(best.values())

    def place(self, index: int) -> int:
        return index if self.places is None else self.places[index]

    def rivals(self, index: int, chosen: Collection[int]) -> list[int]:
        """Those of the chosen that are at the same place."""
        return [other for other in chosen if other != index and self.place(other) == self.place(index)]

    def fits(self, bits: str) -> bool:
        """Whether no two are at one place."""
        places = [self.place(index) for index, bit in enumerate(bits) if bit == "1"]
        return len(set(places)) == len(places)

    def saved(self, bits: str) -> float:
        return math.fsum(saving for saving, bit in zip(self.savings, bits, strict=True) if bit == "1")

    def is_met(self, bits: str) -> bool:
        return self.is_enough(self.saved(bits))

    def is_enough(self, saved: float) -> bool:
        return saved >= self.need - 1e-9 * abs(self.need)  # sums in another order differ in the last digits

    def candidates(self) -> Iterator[str]:
        """Every candidate, once."""
        offered = self.offered
        left = [0.0] * (len(offered) + 1)
        for place in reversed(range(len(offered))):
            left[place] = left[place + 1] + self.savings[offered[place]]

        def extended(chosen: list[int], saved: float, place: int) -> Iterator[str]:
            if self.is_enough(saved):  # the last one was the smallest, and without it there was not enough
                yield self._bits(chosen)
                return
            for following in range(place, len(offered)):
                if not self.is_enough(saved + left[following]):
                    return
                block = offered[following]
                if self.rivals(block, chosen):
                    continue
                yield from extended([*chosen, block], saved + self.savings[block], following + 1)

        return extended([], 0.0, 0)

    def repaired(self, bits: str, rng: random.Random) -> str:
        """The nearest candidate on a random way: blocks are added until there is enough, then those not needed go."""
        order = sorted(self.offered, key=lambda index: rng.random())
        chosen: set[int] = set()
        for index in order:
            if bits[index] == "1" and not self.rivals(index, chosen):
                chosen.add(index)

        def enough(indices: Iterable[int]) -> bool:
            return self.is_enough(math.fsum(self.savings[i] for i in indices))

        for swapped in (False, True):  # where adding is not enough, others at their places may save more
            for index in order:
                if enough(chosen):
                    break
                rivals = self.rivals(index, chosen)
                if not rivals or (swapped and self.savings[index] > self.savings[rivals[0]]):
                    chosen = chosen.difference(rivals) | {index}
        for index in order:
            if index in chosen and enough(chosen - {index}):
                chosen.remove(index)
        return self._bits(chosen)

    def drawn(self, rng: random.Random) -> str:
        """A random candidate."""
        return self.repaired("0" * len(self.savings), rng)

    def _bits(self, chosen: Sequence[int] | set[int]) -> str:
        return "".join("1" if index in chosen else "0" for index in range(len(self.savings)))


@dataclass(frozen=True)
class SearchSettings:
    """How to look.

    Args:
        method: One of ``METHODS``; "auto" is exhaustive up to ``EXHAUSTIVE_BLOCKS`` blocks, else the genetic algorithm.
        population: Candidates that live on from one generation to the next, and children of each.
        generations: After the first.
        mutation: Probability with which a child's bit flips.
        crossover: Probability with which a child has two parents.
        evaluations: Draws of "random"; as many as the genetic algorithm would take when None.
        seed: Same seed, same search.
    """

    method: str = "auto"
    population: int = 20
    generations: int = 10
    mutation: float = 0.1
    crossover: float = 0.5
    evaluations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"search {self.method!r} is unknown: choose {', '.join(METHODS)}")
        for name, least in (("population", 2), ("generations", 0), ("evaluations", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise RecipeError(f"{name} {number}: expected at least {least}")
        for name in ("mutation", "crossover"):
            number = getattr(self, name)
            if not 0 <= number <= 1:
                raise RecipeError(f"{name} {number:g}: expected 0 to 1")

    def method_for(self, budget: Budget) -> str:
        if self.method != "auto":
            return self.method
        return "exhaustive" if len(budget.offered) <= EXHAUSTIVE_BLOCKS else "ga"

    @property
    def draws(self) -> int:
        return self.evaluations or self.population * (self.generations + 1)

    def most_evaluations(self, budget: Budget) -> int:
        """An upper estimate of how many evaluations there will be."""
        blocks = len(budget.offered)
        method = self.method_for(budget)
        if method == "greedy":
            return blocks * (blocks + 1) // 2
        every = 0
        for every, _ in enumerate(budget.candidates(), 1):  # counted
            if every > MOST_CANDIDATES:
                break
        if method == "exhaustive":
            return every
        return min(every, self.draws if method == "random" else self.population * (self.generations + 1))


@dataclass(frozen=True)
class SearchResult:
    """What was found.

    Args:
        method: That was used.
        bits: The best candidate; "1" is a pruned block.
        score: Its score; higher is better.
        evaluations: How many bit strings were scored, those from the cache included.
        scores: All of them, the candidates among them best first.
        history: Best score after each generation, or step of the greedy search.
        ranked: The candidates among the scored, best first.
    """

    method: str
    bits: str
    score: float
    evaluations: int
    scores: dict[str, float] = field(repr=False)
    history: list[float] = field(repr=False)
    ranked: list[str] = field(repr=False, default_factory=list)


def search(
    budget: Budget,
    evaluate: Evaluate,
    settings: SearchSettings | None = None,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Look for the best candidate.

    Args:
        budget: Which bit strings are candidates.
        evaluate: Scores, higher is better, NaN is worst; gets each bit string once.
        settings: How to look.
        progress: Called with the number of evaluations and the best score after each call of ``evaluate``.

    Raises:
        RecipeError: All blocks together do not save enough, or there are too many candidates for "exhaustive".
    """
    chosen = settings or SearchSettings()
    if not budget.is_enough(budget.most):
        raise RecipeError(
            f"all {len(budget.offered)} blocks together save {budget.most:g}, {budget.need:g} is asked for"
        )
    run = _Search(budget, evaluate, chosen, progress)
    method = chosen.method_for(budget)
    {"exhaustive": run.exhaustive, "ga": run.genetic, "greedy": run.greedy, "random": run.random}[method]()
    candidates = [bits for bits in run.scores if run.is_candidate(bits)]
    ranked = sorted(candidates, key=run.rank)
    others = [bits for bits in run.scores if bits not in set(ranked)]
    scores = {bits: run.scores[bits] for bits in [*ranked, *others]}
    return SearchResult(method, ranked[0], run.scores[ranked[0]], len(run.scores), scores, run.history, ranked)


def shortlist(ranked: Sequence[str], deletes: Sequence[bool], count: int) -> list[str]:
    """Of candidates that come best first, those to look at again: in turn the next best with each number of deletions.

    Deleted blocks rank low until what follows them is fitted, so that the best score alone would leave them out.

    Args:
        ranked: Bit strings.
        deletes: By bit, whether it deletes a block.
        count: How many.
    """
    classes: dict[int, list[str]] = {}
    for bits in ranked:
        classes.setdefault(sum(bit == "1" and gone for bit, gone in zip(bits, deletes, strict=True)), []).append(bits)
    rounds = itertools.zip_longest(*(classes[number] for number in sorted(classes)))
    return [bits for turn in rounds for bits in turn if bits is not None][:count]


class _Search:
    """The scores so far."""

    def __init__(
        self,
        budget: Budget,
        evaluate: Evaluate,
        settings: SearchSettings,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        self.budget, self.settings, self.progress = budget, settings, progress
        self._evaluate = evaluate
        self.rng = random.Random(settings.seed)
        self.scores: dict[str, float] = {}
        self.history: list[float] = []

    def is_candidate(self, bits: str) -> bool:
        budget = self.budget
        if not budget.is_met(bits) or not budget.fits(bits):
            return False
        saved = budget.saved(bits)
        pruned = [saving for saving, bit in zip(budget.savings, bits, strict=True) if bit == "1"]
        return all(saving > 0 and not budget.is_enough(saved - saving) for saving in pruned)

    def rank(self, bits: str) -> tuple[float, str]:
        """Best first; of equal ones the same everywhere."""
        return -self.scores[bits], bits

    def evaluate(self, wanted: Sequence[str]) -> None:
        new = [bits for bits in dict.fromkeys(wanted) if bits not in self.scores]
        if not new:
            return
        for bits, score in zip(new, self._evaluate(new), strict=True):
            self.scores[bits] = -math.inf if math.isnan(score) else float(score)
        if self.progress is not None:
            self.progress(len(self.scores), max(self.scores.values()))

    def note(self, population: Sequence[str]) -> None:
        self.history.append(max(self.scores[bits] for bits in population))

    def exhaustive(self) -> None:
        every: list[str] = []
        for bits in self.budget.candidates():
            every.append(bits)
            if len(every) > MOST_CANDIDATES:
                raise RecipeError(
                    f"{len(self.budget.offered)} blocks have more than {MOST_CANDIDATES} candidates: take the search ga"
                )
        self.evaluate(every)
        self.note(every)

    def random(self) -> None:
        drawn = self.unknown(self.settings.draws, lambda: self.budget.drawn(self.rng))
        self.evaluate(drawn)
        self.note(drawn)

    def unknown(self, count: int, make: Callable[[], str]) -> list[str]:
        """Candidates that are not known yet: fewer where hardly any are left."""
        found: dict[str, None] = {}
        for _ in range(count):
            for attempt in range(2 * _TRIES):
                bits = make() if attempt < _TRIES else self.budget.drawn(self.rng)
                if bits not in self.scores and bits not in found:
                    found[bits] = None
                    break
        return list(found)

    def genetic(self) -> None:
        settings = self.settings
        population = self.unknown(settings.population, lambda: self.budget.drawn(self.rng))
        self.evaluate(population)
        self.note(population)
        for _ in range(settings.generations):
            parents = sorted(population, key=self.rank)
            children = self.unknown(settings.population, lambda: self._child(parents))  # noqa: B023  # used at once
            if not children:
                break
            self.evaluate(children)
            population = sorted([*parents, *children], key=self.rank)[: settings.population]
            self.note(population)

    def _child(self, parents: Sequence[str]) -> str:
        first = self._pick(parents)
        second = self._pick(parents) if self.rng.random() < self.settings.crossover else first
        bits = [a if self.rng.random() < 0.5 else b for a, b in zip(first, second, strict=True)]
        flipped = [("1" if bit == "0" else "0") if self.rng.random() < self.settings.mutation else bit for bit in bits]
        return self.budget.repaired("".join(flipped), self.rng)

    def _pick(self, ranked: Sequence[str]) -> str:
        """The better of two, drawn from candidates that come best first."""
        places = [int(self.rng.random() * len(ranked)) for _ in range(2)]
        return ranked[min(places)]

    def greedy(self) -> None:
        budget = self.budget
        current = "0" * len(budget.savings)
        self.evaluate([current])
        while not budget.is_met(current):
            steps = {i: after for i in budget.offered if (after := self._with(current, i))}
            self.evaluate(list(steps.values()))
            here = self.scores[current]
            saved = budget.saved(current)
            current = min(steps.values(), key=lambda bits: self._loss(here, bits, budget.saved(bits) - saved))
            self.history.append(self.scores[current])
        for index in reversed(budget.offered):  # the smallest first
            without = _flipped(current, index)
            if current[index] == "1" and budget.is_met(without):
                current = without
        self.evaluate([current])
        self.history.append(self.scores[current])

    def _with(self, bits: str, index: int) -> str:
        """The same with one more block, which takes the place of one that saves less; empty where it cannot."""
        chosen = [i for i, bit in enumerate(bits) if bit == "1"]
        rivals = self.budget.rivals(index, chosen)
        if index in chosen or any(self.budget.savings[i] >= self.budget.savings[index] for i in rivals):
            return ""
        for rival in rivals:
            bits = _flipped(bits, rival)
        return _flipped(bits, index)

    def _loss(self, here: float, bits: str, saving: float) -> tuple[float, float, str]:
        """What a step loses for what it saves; one that loses nothing counts by its score."""
        lost = here - self.scores[bits]
        if not math.isfinite(lost):
            return (math.inf if self.scores[bits] == -math.inf else 0.0), -self.scores[bits], bits
        return (lost / saving if lost > 0 else lost * saving), -self.scores[bits], bits


def _flipped(bits: str, index: int) -> str:
    return bits[:index] + ("0" if bits[index] == "1" else "1") + bits[index + 1 :]


# -- scores on disk ----------------------------------------------------------------------------------------------------


class ScoreCache:
    """Scores by bit string in a JSON file, with the identity of what they are scores of.

    Args:
        path: The file; None keeps nothing.
        identity: Plain numbers, strings, None, and lists of them, by name.
        resume: Whether scores found there are used; a file of another identity is refused, or else overwritten.

    Raises:
        RecipeError: The file cannot be read, or belongs to another search.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path, self.identity = path, json.loads(json.dumps(dict(identity)))
        self.scores: dict[str, float] = {}
        if path is None or not resume or not path.exists():
            return
        way_out = "--no-resume starts anew, --checkpoint names another folder"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version, theirs, scores = found["format"], found["identity"], found["scores"]
            self.scores = {bits: math.nan if score is None else float(score) for bits, score in scores.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"the scores in {path} cannot be read ({error}): {way_out}") from error
        if version != CACHE_FORMAT:
            raise RecipeError(
                f"the scores in {path} have format {version}, this version reads {CACHE_FORMAT}: {way_out}"
            )
        changed = [name for name in {**self.identity, **theirs} if self.identity.get(name) != theirs.get(name)]
        if changed:
            raise RecipeError(f"the scores in {path} are of another run: another {', '.join(changed[:3])}; {way_out}")

    def put(self, scores: Mapping[str, float]) -> None:
        """Add scores and write the file.

        Raises:
            OutputError: It cannot be written.
        """
        self.scores.update(scores)
        if self.path is None:
            return
        plain = {bits: score if math.isfinite(score) else None for bits, score in self.scores.items()}
        text = json.dumps({"format": CACHE_FORMAT, "identity": self.identity, "scores": plain}, indent=0)
        write_whole(self.path, text)

    def wrap(self, evaluate: Callable[[Sequence[str], Callable[[Mapping[str, float]], None]], None]) -> Evaluate:
        """An ``Evaluate`` that asks for what is not known only.

        Args:
            evaluate: Gets bit strings, and what to call with scores as soon as there are some.
        """

        def known(wanted: Sequence[str]) -> list[float]:
            missing = [bits for bits in wanted if bits not in self.scores]
            if missing:
                evaluate(missing, self.put)
            return [self.scores[bits] for bits in wanted]

        return known


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
