"""In which order steps are tried, and which are kept.

Speed first, for a pruned network is quantized as well as any, and a quantized one can no longer be pruned. What is
cheap is tried before what is dear: exact rewrites, fits, tuning and training. Of ways to the same goal the one that
loses less is kept. Where codebooks then lose too much, the next way to the same speed that loses less takes its place;
where all do, the goal is approached by bisection, and of all that was tried the nearest is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcompress.compression.attempts import Attempt, Attempts
from onnxcompress.compression.goal import Goal, Limit
from onnxcompress.compression.point import Point, allowed_share, excess, reached
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.wording import drop_text, goal_figure, too_much_text

FITS_ALONE = "supernet,search"
TRAINED = "supernet,search,train"
LEAST_TO_TRAIN = 512  # samples
TRAINING_STEPS, TRAINING_BATCH, TRAINING_EPOCHS = 400, 64, 4  # at least so many of steps and epochs
WIDTHS = (0.7, 0.5, 0.35)  # of the MACs, where quantizing alone cannot reach a size
BISECTIONS = 3  # of speed
CLOSE_SPEED = 1.05  # of the speed that is out of reach, from which on no better one is looked for
SIZE_BISECTIONS = 4
SMALLER = 1.5  # times, from one file to the next, where the smallest is looked for
SMALLEST_TRIALS = 4
CLOSE_SIZE = 1.25  # from the smallest that lost too much, where the search for the smallest file ends
LATENCY_TRIALS = 4  # of a width, until latency is as wished
CLOSE = 0.93  # of the latency that is allowed: near enough
AIM = 0.98
NOISE = 0.98  # a latency above this share of the one before brings nothing


Way = Callable[[Limit, float, Attempt, str], Attempt]


@dataclass(frozen=True)
class Means:
    """What there is to work with.

    Attributes:
        data: There are samples.
        torch: It is installed.
        train: Training is allowed.
        fitted: Samples to fit with.
        labelled: They have labels.
    """

    data: bool
    torch: bool
    train: bool
    fitted: int
    labelled: bool

    @property
    def can_train(self) -> bool:
        return self.torch and self.train and self.fitted >= LEAST_TO_TRAIN

    @property
    def fits_alone(self) -> dict[str, Any]:
        """Settings of blocks that are fitted without training, in batches that there are samples for."""
        return {"stages": FITS_ALONE, **({"batch": self.fitted} if self.fitted < TRAINING_BATCH else {})}

    @property
    def training(self) -> dict[str, Any]:
        """Settings of a training that is planned."""
        epochs = max(TRAINING_EPOCHS, math.ceil(TRAINING_STEPS * TRAINING_BATCH / max(self.fitted, 1)))
        learning: dict[str, Any] = {"labels": True, "distill": True} if self.labelled else {"distill": True}
        return {"stages": TRAINED, "epochs": epochs, "lr": 1e-3, **learning}


class Strategy:
    """Looks for the way to a goal.

    Args:
        attempts: Does and measures steps.
        goal: To be reached.
        means: What there is to work with.
        told: Settings of planned steps, by verb.
    """

    def __init__(
        self, attempts: Attempts, goal: Goal, means: Means, told: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.attempts, self.goal, self.means, self.told = attempts, goal, means, told or {}
        self.original = attempts.original
        self.exact: Attempt | None = None

    def run(self) -> Attempt:
        """The attempt that reaches the goal, or the nearest to it."""
        current = self.original
        if self.goal.limits and self.reached(current):
            return current
        exact = self._try("optimize", {}, current, "exact rewrites lose nothing")
        if exact.point is not None and self._within(exact):
            if brings(current.found, exact.found, self.goal):
                self.exact = current = exact
            else:
                exact.verdict = "it brings nothing of what is wished"
        if self.goal.is_smallest:
            return self._smallest(current)
        levels: Iterator[Attempt] = iter(())
        for limit in (self.goal.macs, self.goal.latency):
            if limit is not None and not self._meets(current, limit):
                levels = self._levels(limit, current)
                found = next(levels, None)
                current = found or self._approach(limit, current)
                if found is None:
                    return self._nearest(self._with_size(current))
        if self.goal.size is not None and not self._meets(current, self.goal.size):
            current = self._smaller(self.goal.size, current, levels)
        return current if self.reached(current) else self._nearest(current)

    def _with_size(self, current: Attempt) -> Attempt:
        """The size that was wished, though the speed is out of reach."""
        limit = self.goal.size
        if limit is None or self._meets(current, limit):
            return current
        found, _ = self._at_size(self._bytes(limit), current)
        return found if found.point is not None and self._within(found) else current

    def _bytes(self, limit: Limit) -> int:
        return int(limit.allowed(self.original.found.size_bytes))

    def reached(self, attempt: Attempt) -> bool:
        """Whether an attempt is what was wished."""
        return attempt.point is not None and reached(self.goal, attempt.point, self.original.found)

    def _nearest(self, last: Attempt) -> Attempt:
        """Of all that lose no more than allowed, the one nearest to the limits."""
        done = [attempt for attempt in self.attempts.tried if attempt.point is not None]
        allowed = [attempt for attempt in [last, self.original, *done] if attempt.found.within(self.goal.drop)]

        def away(attempt: Attempt) -> tuple[float, float]:
            return excess(self.goal, attempt.found, self.original.found), attempt.found.loss

        return min(allowed, key=away)

    # -- speed -------------------------------------------------------------------------------------------------------

    def _levels(self, limit: Limit, current: Attempt) -> Iterator[Attempt]:
        """Ways to fewer MACs or less time, the cheap ones first; each loses less than the one before."""
        base, share = self._from(limit, current)
        ways = self._ways(limit)
        found: list[Attempt] = []
        last = math.inf
        for level in self._tries(limit, share, base, current, ways, found):
            found += level
            best = self._best(found, limit) if level else None
            if best is not None and best.found.loss < last:
                last = best.found.loss
                yield best

    def _tries(
        self, limit: Limit, share: float, base: Attempt, current: Attempt, ways: Sequence[Way], found: list[Attempt]
    ) -> Iterator[list[Attempt]]:
        """What is tried together; ``found`` is what was tried before."""
        alone: list[Attempt] = []
        for way in ways:
            alone.append(way(limit, share, base, "fits alone"))
            if self.goal.drop is not None:
                yield alone[-1:]  # what is cheap may do
        if self.goal.drop is None:
            yield alone
        if len(ways) > 1:
            # Half of the way by each, from where exact rewrites end.
            start = min(1.0, self._figure(limit, current) / self._figure(limit, base))
            half = self._depth(limit, math.sqrt(share * start), base, "half of the way, the rest by channels")
            if half.point is not None and self._within(half):
                rest = self._share(limit, half)
                yield [half if rest >= 1 else self._width(limit, rest, half, "the other half")]
        if self.means.can_train:
            yield self._finetuned([one for one in found if one.point is not None and self._meets(one, limit)])
            if any(one.step.verb == "prune-depth" and one.point is not None for one in alone):
                yield [self._trained(limit, share, base)]
            yield [self._scaled(limit, share, base)]

    def _finetuned(self, found: Sequence[Attempt]) -> list[Attempt]:
        """Training wins back what fits cannot, of what lost least."""
        least = min(found, key=lambda attempt: attempt.found.loss, default=None)
        if least is None or not self.means.can_train:
            return []
        settings = {key: value for key, value in self.means.training.items() if key != "stages"}
        return [self._try("finetune", settings, least, f"{drop_text(least.found)} after fits alone: with training")]

    def _approach(self, limit: Limit, current: Attempt) -> Attempt:
        """The nearest to a speed that loses no more than allowed."""
        base, share = self._from(limit, current)
        ways = self._ways(limit)
        low, high, nearest = share, min(1.0, self._figure(limit, current) / self._figure(limit, base)), current
        for _ in range(BISECTIONS if ways else 0):
            if high < CLOSE_SPEED * low:
                break
            middle = math.sqrt(low * high)
            best = self._one_of(ways, limit, middle, base, f"back to {middle:.3f}x, as {share:.3f}x is out of reach")
            if best is None:
                low = middle
            else:
                nearest, high = best, min(middle, self._figure(limit, best) / self._figure(limit, base))
        return nearest

    def _one_of(self, ways: Sequence[Way], limit: Limit, share: float, base: Attempt, why: str) -> Attempt | None:
        """The first way that loses no more than allowed; else what lost least, trained."""
        found = []
        for way in ways:
            attempt = way(limit, share, base, why)
            if attempt.point is not None:
                found.append(attempt)
                if self._within(attempt):
                    return attempt
        return self._best(self._finetuned(found))

    def _from(self, limit: Limit, current: Attempt) -> tuple[Attempt, float]:
        """Where pruning begins, and the share of it that is to be left."""
        base = self._before_passes(current)
        return base, self._share(limit, base)

    def _ways(self, limit: Limit) -> list[Way]:
        if not self.means.data:
            return []
        return [self._width, *([self._depth] if self.means.torch else [])]

    def _depth(self, limit: Limit, share: float, base: Attempt, why: str) -> Attempt:
        settings = {**self.means.fits_alone, **self._wish(limit, share, base)}
        return self._try("prune-depth", settings, base, f"blocks: {why}")

    def _trained(self, limit: Limit, share: float, base: Attempt) -> Attempt:
        settings = {**self.means.training, **self._wish(limit, share, base)}
        return self._try("prune-depth", settings, base, "blocks, trained while they are still whole")

    def _scaled(self, limit: Limit, share: float, base: Attempt) -> Attempt:
        settings = {key: value for key, value in self.means.training.items() if key != "stages"}
        settings |= self._wish(limit, share, base)
        return self._try("prune-scale", settings, base, "blocks, channels and pixels together")

    def _width(self, limit: Limit, share: float, base: Attempt, why: str) -> Attempt:
        if limit.key == "macs":
            return self._try("prune-width", self._wish(limit, share, base), base, f"channels: {why}")
        return self._width_for_latency(share, base, f"channels: {why}")

    def _width_for_latency(self, share: float, base: Attempt, why: str) -> Attempt:
        """MACs such that the file, measured, takes a share of the base's latency."""
        wanted = share * base.found.latency_share
        slow, fast = (1.0, base.found.latency_share), (0.0, 0.0)  # shares of the MACs and of the latency
        guess, best, last = share, None, None
        tried = []
        for _ in range(LATENCY_TRIALS):
            last = found = self._try("prune-width", {"macs": str(int(guess * base.found.macs))}, base, why)
            tried.append(found)
            if found.point is None:
                if fast[0] or guess >= AIM * slow[0]:
                    break
                guess = math.sqrt(guess * slow[0])
                continue
            here = (guess, found.found.latency_share)
            if here[1] <= wanted:
                fast, best = here, found
            else:
                slow = here
            if fast[1] > CLOSE * wanted or (fast[0] and slow[0] - fast[0] < 0.02):
                break
            if fast[0] and slow[1] > fast[1]:
                part = (math.log(AIM * wanted) - math.log(fast[1])) / (math.log(slow[1]) - math.log(fast[1]))
                guess = fast[0] * (slow[0] / fast[0]) ** min(max(part, 0.1), 0.9)
            else:
                guess *= (AIM * wanted / here[1]) ** 1.5
        assert last is not None
        chosen = best or last
        for found in tried:
            if found is not chosen and not found.verdict:
                found.verdict = f"a trial on the way to step {chosen.number}"
        return chosen

    # -- size --------------------------------------------------------------------------------------------------------

    def _smaller(self, limit: Limit, current: Attempt, levels: Iterator[Attempt]) -> Attempt:
        """Fewer bytes; of what loses less at the same speed, where codebooks would lose too much."""
        size = self._bytes(limit)
        found, base = self._at_size(size, current)
        while found.point is not None and not self._within(found) and (current.found.drop or 0.0) > 0:
            gentler = next(levels, None)
            if gentler is None:
                break
            current = gentler
            found, base = self._at_size(size, current)
        if found.point is not None and self._within(found):
            return found
        return self._approach_size(size, base, current)

    def _at_size(self, size: int, current: Attempt) -> tuple[Attempt, Attempt]:
        """Codebooks within a size, tuned where they lose too much; and what they were made of."""
        base = self._before_passes(current)
        plain = self._quantized(size, base, "codebooks within the bytes that are wished")
        if plain.point is None and self.means.data:
            plain, base = self._narrower(size, plain, base, current)
        if plain.point is None or self._within(plain) or not self._can_tune:
            return plain, base
        return self._quantized(size, base, "codebooks alone lose too much: tuned together", tune=True), base

    def _smallest(self, current: Attempt) -> Attempt:
        """The smallest file within the drop: quantize looks for it, and sizes about that are tried, tuned."""
        base, nearest = self._before_passes(current), current
        assert self.goal.drop is not None
        told = {"max-drop": f"{self.goal.drop:g}"}
        first = self._try("quantize", told, base, "the smallest file of those that quantize tries")
        if first.point is None:
            return nearest
        fits, size = self._within(first), float(first.found.size_bytes)
        if fits:
            nearest = first
            if not self._can_tune:
                return first
        low, high = 0.0, size if fits else math.inf
        middle = size / SMALLER if fits else size if self._can_tune else size * SMALLER
        for _ in range(SMALLEST_TRIALS):
            if middle >= current.found.size_bytes or high < low * CLOSE_SIZE:
                break
            why = f"{middle:,.0f} bytes may do" + (" when all codebooks are tuned" if self._can_tune else "")
            found = self._quantized(int(middle), base, why, tune=self._can_tune)
            if found.point is not None and self._within(found):
                nearest, high = found, float(found.found.size_bytes)
            else:
                low = middle
            middle = high / SMALLER if not low else low * SMALLER if high == math.inf else math.sqrt(low * high)
        return nearest

    def _narrower(self, size: int, plain: Attempt, base: Attempt, current: Attempt) -> tuple[Attempt, Attempt]:
        """Quantize what has fewer channels: the file holds more than weights."""
        for share in WIDTHS:
            settings = {"macs": str(int(share * current.found.macs))}
            narrow = self._try(
                "prune-width", settings, base, "quantizing alone does not reach the size: fewer channels"
            )
            if narrow.point is not None and not self._within(narrow):
                narrow = next(iter(self._finetuned([narrow])), narrow)
            if narrow.point is None or not self._within(narrow):
                break
            found = self._quantized(size, narrow, f"codebooks for {share:g} of the MACs")
            if found.point is not None:
                return found, narrow
            narrow.verdict = "the size is out of reach even so"
        return plain, base

    def _approach_size(self, size: int, base: Attempt, current: Attempt) -> Attempt:
        """The smallest file that loses no more than allowed."""
        low, high, nearest = float(size), float(current.found.size_bytes), current
        for _ in range(SIZE_BISECTIONS):
            middle = int(math.sqrt(low * high))
            if not size < middle < high:
                break
            why = f"back to {middle:,} bytes, as {size:,} are out of reach"
            found = self._quantized(middle, base, why)
            if found.point is not None and not self._within(found) and self._can_tune:
                found = self._quantized(middle, base, f"{why}, tuned together", tune=True)
            if found.point is not None and self._within(found):
                nearest, high = found, float(found.found.size_bytes)
            else:
                low = float(middle)
        return nearest

    @property
    def _can_tune(self) -> bool:
        told = self.told.get("quantize", {})
        return self.means.torch and self.means.train and self.means.data and "tune" not in told

    def _quantized(self, size: int, base: Attempt, why: str, *, tune: bool = False) -> Attempt:
        settings: dict[str, Any] = {"size": str(size), **({"tune": "joint"} if tune else {})}
        return self._try("quantize", settings, base, why)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _try(self, verb: str, settings: Mapping[str, Any], base: Attempt, why: str) -> Attempt:
        step = Step(verb, {**settings, **self.told.get(verb, {})})
        return self.attempts.attempt(step, base, why)

    def _within(self, attempt: Attempt) -> bool:
        """Whether it loses no more than allowed; says so where not."""
        if attempt.found.within(self.goal.drop):
            return True
        assert self.goal.drop is not None
        attempt.verdict = too_much_text(attempt.found, self.goal.drop)
        return False

    def _best(self, found: Sequence[Attempt], limit: Limit | None = None) -> Attempt | None:
        """Of those that are allowed, and keep a limit, the one that loses least."""
        done = [attempt for attempt in found if attempt.point is not None and self._within(attempt)]
        kept = [attempt for attempt in done if limit is None or self._meets(attempt, limit)]
        for attempt in done:
            if limit is not None and attempt not in kept:
                attempt.verdict = f"{goal_figure(limit, attempt.found, self.original.found)} is not {limit.text}"
        best = min(kept, key=lambda attempt: attempt.found.loss, default=None)
        for attempt in kept:
            if best is not None and attempt is not best:
                attempt.verdict = _worse(attempt, best)
        return best

    def _meets(self, attempt: Attempt, limit: Limit) -> bool:
        return attempt.found.meets(limit, self.original.found)

    def _before_passes(self, current: Attempt) -> Attempt:
        """Where a step begins that runs the exact passes itself."""
        if current is self.exact and "optimize" not in self.told:
            current.verdict = "the steps after it run the same passes"
            return self.original
        return current

    def _figure(self, limit: Limit, attempt: Attempt) -> float:
        return attempt.found.latency_share if limit.key == "latency" else attempt.found.figure(limit.key)

    def _share(self, limit: Limit, base: Attempt) -> float:
        """What is to be left of the base's."""
        if limit.key == "latency":
            return allowed_share(limit, base.found) / base.found.latency_share
        return limit.allowed(self.original.found.figure(limit.key)) / base.found.figure(limit.key)

    @staticmethod
    def _wish(limit: Limit, share: float, base: Attempt) -> dict[str, Any]:
        """A goal of a step: MACs as a number, latency as a share of what it begins with."""
        if limit.key == "macs":
            return {"macs": str(int(share * base.found.macs + 1e-6))}
        return {"latency": f"{share:.4f}x"}


def _worse(attempt: Attempt, best: Attempt) -> str:
    drop = drop_text(best.found, bare=True)
    if drop == drop_text(attempt.found, bare=True):
        return f"{drop_text(attempt.found)} as by step {best.number}, whose outputs are nearer"
    return f"{drop_text(attempt.found)}, step {best.number}'s by {drop}"


def brings(before: Point, after: Point, goal: Goal | None) -> bool:
    """Whether a step brought something of what is wished; without a goal, anything."""
    keys = ["size", "macs", "latency"] if goal is None else [limit.key for limit in goal.limits] or ["size"]
    gains = {
        "size": after.size_bytes < before.size_bytes,
        "macs": after.macs < before.macs,
        "latency": after.latency_share < NOISE * before.latency_share,
    }
    return any(gains[key] for key in keys)
