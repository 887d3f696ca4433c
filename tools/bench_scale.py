"""Depth, width and resolution together, arm by arm at equal cost: is what the predictor chooses the best there is?

    python tools/bench_scale.py models/resnet20_digits.onnx --data sklearn:digits:train --test sklearn:digits \
        --macs 0.4x --epochs 4 --seeds 3 --out scale.jsonl
    python tools/bench_scale.py --out scale.jsonl --summary

One JSON row a run, appended as it ends: what is in the file is not run again, so a long bench can be run in pieces
(``--arms``, ``--seeds``, and simply by stopping it). With a fifth of --data held out to choose by, --test is looked at
once a run. All arms of a seed share its ladders, and each is pruned at once from the original, fitted and trained for
as long; their MACs, counted on the merged graph, are within 3 % below the goal where the axis has such a level. With
--latency their measured latency is.

    predictor                  what the tool gives: of its finalists, trained to the end, the one with the least loss
    raced                      the candidate that was best after its short training
    second                     the next one
    first                      what the predictor would choose alone
    product                    what the three fits alone would choose
    depth width resolution     one axis alone; left out where it does not reach the goal
    equal                      each axis saves as much
    efficientnet               in the proportions of EfficientNet's compound scaling
    random1 random2 random3    triples drawn at the same MACs
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_arms import Row, accuracy, mean, read, setting, split

from onnxcompress.channels.options import parse_goal
from onnxcompress.train.depth.offers import BudgetError
from onnxcompress.train.depth.options import finite
from onnxcompress.train.scale.given import Given
from onnxcompress.train.scale.options import ScaleOptions, parse_axes
from onnxcompress.train.scale.predictor import AXES
from onnxcompress.train.scale.pruning import Job, prune_scale
from onnxcompress.train.scale.solving import EFFICIENTNET, Levels
from onnxcompress.train.settings import TrainSettings

DIRECTIONS = {
    "depth": (1.0, 0.0, 0.0),
    "width": (0.0, 1.0, 0.0),
    "resolution": (0.0, 0.0, 1.0),
    "equal": (1.0, 1.0, 1.0),
    "efficientnet": EFFICIENTNET,
}
FINALISTS = ("raced", "second")
RANDOM = ("random1", "random2", "random3")
ARMS = ("predictor", "raced", "second", "first", "product", *DIRECTIONS, *RANDOM)
BAND = 0.03  # of the cost, below the goal
TIMINGS = 3  # of a network, where latency is the goal: neighbours on the machine make one of them miss it


class Bench:
    """One model, one seed."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.seed, self.model = arguments, seed, Path(arguments.model)
        self.folder = Path(arguments.work) / self.model.stem / setting(arguments) / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        data, val = split(arguments, self.model, self.folder.parent)
        training = TrainSettings(
            epochs=arguments.epochs,
            batch=arguments.batch,
            optimizer=arguments.optimizer,
            learning_rate=arguments.lr,
            seed=seed,
            device=arguments.device,
        )
        self.options = ScaleOptions(
            data=data,
            val=val,
            goal=parse_goal("latency", arguments.latency) if arguments.latency else parse_goal("macs", arguments.macs),
            axes=parse_axes(arguments.axes),
            rounds=arguments.rounds,
            mixed=arguments.mixed,
            round_epochs=arguments.round_epochs,
            candidates=arguments.candidates,
            finalists=2,
            depth_ranking=arguments.rank_blocks,
            width_ranking=arguments.rank_channels,
            round_to=arguments.round_to,
            calibration=arguments.calibration,
            training=training,
            limit=arguments.limit,
            jobs=arguments.jobs,
            augment=arguments.augment,
        )
        self.state = self.folder / "state"
        self.with_state = replace(self.options, checkpoint=self.state)

    def decide(self) -> tuple[Row, dict[str, Levels]]:
        """Collect and choose: a row of the predictor, and the triples of all arms."""
        start = time.monotonic()
        with Given(self.model, self.with_state) as given:
            job = Job(given, self.state)
            decision = job.decide()
            triples = self._triples(job, decision)
            everything = list(triples.values())
            sizes, places = job.space.coordinates(everything)
            predictor = job.decider.predictor
            assert predictor is not None
            expected, _ = predictor.predict(sizes, places)
            product = predictor.product(sizes)
        row = {
            "decision": decision.as_dict(),
            "triples": triples,
            "expected": dict(zip(triples, expected.tolist(), strict=True)),
            "product": dict(zip(triples, product.tolist(), strict=True)),
            "collecting": sum(point.seconds for point in (*decision.points, *decision.candidates)),
            "wall": time.monotonic() - start,
        }
        return row, triples

    def _triples(self, job: Job, decision: Any) -> dict[str, Levels]:
        table, limit = job.space.table, job.space.limit
        last = [max((p.levels[a] for p in decision.points if p.axis == axis), default=0) for a, axis in enumerate(AXES)]
        within = table.within(limit, last=last)
        band = [levels for levels in within if table.cost(levels) >= (1 - BAND) * limit]
        largest = table.largest(within)
        assert job.decider.predictor is not None
        found = {arm: point.levels for arm, point in zip(FINALISTS, job.finalists(decision), strict=False)}

        def first_within(wanted: Callable[[list[Levels]], Levels], triples: Sequence[Levels]) -> Levels | None:
            left = list(triples)
            while left:
                levels = wanted(left)
                if table.cost(levels) <= limit and job.space.is_within(levels):
                    return levels
                left.remove(levels)
            return None

        for arm, predictor in (
            ("first", job.decider.predictor),
            ("product", replace(job.decider.predictor, correction=None)),
        ):
            best = first_within(lambda left, p=predictor: left[p.best(*job.space.coordinates(left))], largest)
            found |= {} if best is None else {arm: best}
        ends = {point.axis: point.levels for point in decision.points}
        for arm, direction in DIRECTIONS.items():
            if arm in AXES:
                if arm in ends and table.cost(ends[arm]) <= limit and job.space.is_within(ends[arm]):
                    found[arm] = ends[arm]
                continue
            nearest = first_within(lambda left, way=direction: table.nearest(left, way, limit), band or largest)
            found |= {} if nearest is None else {arm: nearest}
        rest = [levels for levels in band or largest if sum(map(bool, levels)) > 1 and levels not in found.values()]
        draws = np.random.PCG64(self.seed).random_raw(len(rest)).argsort(kind="stable")
        drawn = (rest[int(row)] for row in draws)
        found |= dict(zip(RANDOM, filter(job.space.is_within, drawn), strict=False))
        return found

    def run(self, arm: str, levels: Levels) -> Row:
        start = time.monotonic()
        target = self.folder / f"{arm}.onnx"
        state = self.folder / f"state_{arm}"
        state.mkdir(exist_ok=True)
        assert self.options.goal is not None
        for name in ("ladders", self.options.goal.kind):  # the same for all arms, and made once
            (state / f"{name}.json").write_bytes((self.state / f"{name}.json").read_bytes())
        options = replace(self.options, checkpoint=state)
        for left in reversed(range(TIMINGS)):
            try:
                found = prune_scale(self.model, target, options, chosen=levels)
                break
            except BudgetError:  # what is trained is kept: it is timed again
                if not left or self.options.goal.kind != "latency":
                    raise
        return {
            "levels": list(levels),
            "accuracy": accuracy(target, self.arguments.test),
            "original_accuracy": accuracy(self.model, self.arguments.test),
            "val": found.after,
            "loss": found.finalists[0].loss,
            "fitted": found.fitted,
            "macs": found.figures_after.macs,
            "share": found.figures_after.macs / found.figures_before.macs,
            "speedup": found.latency.ratio,
            "bytes": found.figures_after.size_bytes,
            "seconds": time.monotonic() - start,
        }


# -- rows --------------------------------------------------------------------------------------------------------------


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values)
        return np.array([(array < v).sum() + (array == v).sum() / 2 for v in array])

    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def seed_figures(decision: Row, arms: dict[str, Row]) -> dict[str, float]:
    """What one seed says of the predictor, held against all its arms."""
    names = [arm for arm in arms if arm in decision["expected"]]
    measured = [arms[arm]["accuracy"] for arm in names]
    found = {
        "rank correlation": spearman([decision["expected"][arm] for arm in names], measured),
        "rank correlation of the product": spearman([decision["product"][arm] for arm in names], measured),
        "rank correlation of the loss on validation": spearman([-arms[arm]["loss"] for arm in names], measured),
        "rank correlation of the accuracy on validation": spearman([arms[arm]["val"] for arm in names], measured),
        "off-axis error of the product": decision["decision"]["off_axis_error"] or math.nan,
        "seconds of collecting": decision["collecting"],
    }
    if "predictor" in arms:
        found["regret"] = max(measured) - arms["predictor"]["accuracy"]
    if "first" in arms:
        found["regret of the predictor alone"] = max(measured) - arms["first"]["accuracy"]
    if "product" in arms:
        found["regret of the product"] = max(measured) - arms["product"]["accuracy"]
    return found


def summary(rows: Iterable[Row]) -> str:
    """Markdown: a table for each model and setting, what the predictor is worth, and paired differences."""
    groups: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["setting"]), {}).setdefault(row["arm"], {})[row["seed"]] = row
    lines = []
    for (model, key), arms in groups.items():
        shown = [arm for arm in ARMS if arm in arms]
        if not shown:
            continue
        first = next(iter(arms[shown[0]].values()))
        lines += [f"## {model}, {first['goal']}, {key}", "", f"original: accuracy {first['original_accuracy']:.4f}", ""]
        lines += ["| arm | seeds | test accuracy | validation | fitted only | MACs | speed-up |", "|---" * 7 + "|"]
        for arm in shown:
            found = list(arms[arm].values())
            cells = [arm, str(len(found)), *(mean([row[name] for row in found]) for name in ("accuracy", "val"))]
            cells += [mean([row["fitted"] for row in found]), f"{statistics.mean(row['share'] for row in found):.3f}x"]
            lines.append(f"| {' | '.join([*cells, mean([row['speedup'] for row in found], 2)])} |")
        lines.append("")
        by_seed = [
            seed_figures(decision, {arm: arms[arm][seed] for arm in shown if seed in arms[arm]})
            for seed, decision in arms.get("decision", {}).items()
        ]
        for name in dict.fromkeys(name for found in by_seed for name in found):
            values = [found[name] for found in by_seed if name in found and math.isfinite(found[name])]
            lines.append(f"- {name}: {mean(values, 1 if name.startswith('seconds') else 4)} over {len(values)} seeds")
        for other in shown[1:]:
            seeds = sorted(arms.get("predictor", {}).keys() & arms[other].keys())
            if seeds:
                gaps = [arms["predictor"][seed]["accuracy"] - arms[other][seed]["accuracy"] for seed in seeds]
                lines.append(f"- predictor - {other}: {mean(gaps)} over {len(seeds)} paired seeds")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--summary", action="store_true", help="print the tables of --out and do nothing else")
    parser.add_argument("--data")
    parser.add_argument("--val", default="", help="to choose by; a fifth of --data when left out")
    parser.add_argument("--test", help="looked at once a run")
    parser.add_argument("--macs", default="0.5x")
    parser.add_argument("--latency", help="a goal in the place of --macs: 0.5x, 3ms")
    parser.add_argument("--axes", default="d,w,r")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--mixed", type=int, default=3)
    parser.add_argument("--round-epochs", type=float, default=1)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--rank-blocks", choices=("fits", "probes"), default="fits")
    parser.add_argument("--rank-channels", choices=("data", "magnitude"), default="data")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--augment", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", default="bench_scale", help="folder for states and models")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(read(arguments.out)))
        return
    arms = arguments.arms.split(",")
    if not (arguments.model and arguments.data and arguments.test) or not set(arms) <= set(ARMS):
        parser.error(f"a model, --data and --test are needed; arms: {', '.join(ARMS)}")
    key, model = setting(arguments), Path(arguments.model).stem
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        bench = Bench(arguments, seed)
        here = (model, key, seed)
        done = {row["arm"]: row for row in read(arguments.out) if (row["model"], row["setting"], row["seed"]) == here}

        def write(arm: str, row: Row, *, bench: Bench = bench, seed: int = seed, done: dict[str, Row] = done) -> None:
            assert bench.options.goal is not None
            names = {"model": model, "setting": key, "arm": arm, "seed": seed, "goal": bench.options.goal.text}
            row = {**names, "settings": asdict(bench.options.training), **row, "arm": arm}
            done[arm] = row
            with open(arguments.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(finite(row)) + "\n")
            text = f"{row['accuracy']:.4f}" if "accuracy" in row else f"chose {row['decision']['chosen']}"
            print(f"{model} seed {seed} {arm}: {text}", file=sys.stderr)

        if "decision" not in done:
            row, _ = bench.decide()
            write("decision", row)
        triples = {arm: tuple(levels) for arm, levels in done["decision"]["triples"].items()}
        for arm in (arm for arm in arms if arm in triples and arm not in done):
            # Two arms may be one network.
            same = next((done[a] for a in triples if a in done and triples[a] == triples[arm]), None)
            write(arm, bench.run(arm, triples[arm]) if same is None else {**same, "same_as": same["arm"]})
        finalists = [done[arm] for arm in FINALISTS if arm in done]
        if "predictor" in arms and "predictor" not in done and finalists:
            best = min(finalists, key=lambda row: row["loss"])
            write("predictor", {**best, "same_as": best["arm"]})


if __name__ == "__main__":
    main()
