"""Which steps are tried in which order, and which are kept: on figures made up for each step, without any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnxcompress.compression.attempts import Attempt
from onnxcompress.compression.goal import parse_goal
from onnxcompress.compression.point import Point
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.script import Script, StepError
from onnxcompress.compression.strategy import FITS_ALONE, TRAINED, Means, Strategy
from onnxcompress.errors import RecipeError
from onnxcompress.measure import LatencyFigures

ALL = Means(data=True, torch=True, train=True, fitted=5000, labelled=True)
Outcome = tuple[int, int, float, float] | None


def point(size: int, macs: int, latency: float, drop: float) -> Point:
    timed = LatencyFigures(1.0, latency, 1 / latency, 1 / latency, 1 / latency, 9)
    return Point(size, macs, timed, "top1", drop, 1.0, 1 - drop, drop)


class Made:
    """Attempts whose figures a function gives: bytes, MACs, latency, drop; None where the step fails."""

    def __init__(self, figures: Callable[[Step, Point], Outcome]) -> None:
        self.figures = figures
        self.original = Attempt(0, Step("original"), None, "", Path("m.onnx"), point(1000, 1000, 1.0, 0.0))
        self.tried: list[Attempt] = []

    def attempt(self, step: Step, base: Attempt, why: str, *, planned: bool = True) -> Attempt:
        found = Attempt(len(self.tried) + 1, step, base, why, Path("x.onnx"))
        outcome = self.figures(step, base.found)
        found.point = None if outcome is None else point(*outcome)
        found.failure = "out of reach" if outcome is None else ""
        self.tried.append(found)
        return found

    @property
    def verbs(self) -> list[str]:
        return [attempt.step.verb for attempt in self.tried]


def network(
    *,
    depth: float | None = 0.0,
    width: float | None = 0.0,
    trained: float = 0.0,
    plain: float = 0.0,
    tuned: float = 0.0,
    tuned_weights: float = 0.0,
) -> Callable[[Step, Point], Outcome]:
    """Steps that do as they are told; each adds its drop, ``tuned_weights`` is the share that training wins back.

    ``depth`` and ``width`` of None cannot be done.
    """

    def figures(step: Step, base: Point) -> Outcome:
        told, drop = step.settings, base.drop or 0.0
        latency = base.latency_share
        if step.verb == "optimize":
            return 900, 900, 0.9, 0.0
        if step.verb == "finetune":
            return base.size_bytes, base.macs, latency, drop * (1 - tuned_weights)
        if step.verb == "quantize":
            size = int(told.get("size", 200))
            lost = tuned if told.get("tune") == "joint" else plain
            return size, base.macs, latency, drop + lost * 100 / size
        lost = (trained if told.get("stages") == TRAINED else depth) if step.verb == "prune-depth" else width
        if lost is None:
            return None
        share = float(told["latency"][:-1]) if "latency" in told else int(told["macs"]) / base.macs
        return base.size_bytes, int(share * base.macs), share * latency, drop + lost * (1 - share)

    return figures


def run(goal: str, figures: Callable[[Step, Point], Outcome], means: Means = ALL, **told) -> tuple[Attempt, Made]:
    made = Made(figures)
    return Strategy(made, parse_goal(goal), means, told).run(), made  # type: ignore[arg-type]


def test_nothing_is_done_where_the_goal_is_reached_already():
    last, made = run("size=1x", network())
    assert last is made.original and not made.tried


def test_exact_rewrites_are_enough_where_they_are():
    last, made = run("macs=0.95x, drop=1%", network())
    assert made.verbs == ["optimize"] and last is made.tried[0]


@pytest.mark.parametrize(("depth", "width", "kept"), [(0.001, 0.004, "prune-depth"), (0.004, 0.001, "prune-width")])
@pytest.mark.parametrize("goal", ["macs=0.5x", "latency=0.5x"])
def test_of_blocks_and_channels_what_loses_less_is_kept(goal, depth, width, kept):
    last, made = run(goal, network(depth=depth, width=width))
    assert last.step.verb == kept and made.verbs == ["optimize", "prune-width", "prune-depth"]
    assert made.tried[2].step.settings["stages"] == FITS_ALONE
    assert last.base is made.original  # pruning runs the exact passes itself
    other = next(attempt for attempt in made.tried if attempt.step.verb not in ("optimize", kept))
    assert f"step {last.number}'s by" in other.verdict


@pytest.mark.parametrize("goal", ["macs=0.5x", "latency=0.5x"])
def test_within_a_drop_what_is_cheap_is_enough(goal):
    last, made = run(f"{goal}, drop=1%", network(depth=0.001, width=0.004))
    assert made.verbs == ["optimize", "prune-width"] and last is made.tried[1]
    last, made = run(f"{goal}, drop=1%", network(depth=0.001, width=0.04))
    assert made.verbs == ["optimize", "prune-width", "prune-depth"] and last is made.tried[2]


def test_blocks_are_fitted_in_batches_that_there_are_samples_for():
    for fitted, batch in ((48, {"batch": 48}), (64, {})):
        few = Means(data=True, torch=True, train=True, fitted=fitted, labelled=False)
        _, made = run("macs=0.5x, drop=1%", network(width=0.04), few)
        told = next(attempt.step.settings for attempt in made.tried if attempt.step.verb == "prune-depth")
        assert told == {"stages": FITS_ALONE, **batch, "macs": "500"}


def test_channels_are_taken_where_no_block_can_be_pruned():
    last, _ = run("latency=0.5x, drop=1%", network(depth=None, width=0.002))
    assert last.step.verb == "prune-width" and last.found.latency_share <= 0.5


def test_the_width_for_a_latency_is_found_by_measuring():
    """Latency falls as the root of the MACs does here."""

    def figures(step: Step, base: Point) -> Outcome:
        if step.verb == "optimize":
            return 1000, 1000, 1.0, 0.0
        if step.verb == "prune-depth":
            return None
        macs = int(step.settings["macs"])
        return 1000, macs, (macs / 1000) ** 0.5, 0.0

    last, made = run("latency=0.5x", figures)
    assert 0.5 * 0.93 < last.found.latency_share <= 0.5 and made.verbs.count("prune-width") <= 4
    trials = [attempt for attempt in made.tried if attempt.step.verb == "prune-width" and attempt is not last]
    assert trials and all(trial.verdict == f"a trial on the way to step {last.number}" for trial in trials)


def test_both_together_go_half_of_the_way_each():
    def figures(step: Step, base: Point) -> Outcome:
        """Each loses too much where it goes all the way, and little where it goes half of it."""
        found = network(depth=0.0, width=0.0)(step, base)
        if found is None or step.verb == "optimize":
            return found
        return (*found[:3], (base.drop or 0.0) + (0.03 if found[1] / base.macs < 0.3 else 0.004))

    last, made = run("macs=0.25x, drop=1%", figures)
    assert [attempt.step.verb for attempt in last.chain] == ["prune-depth", "prune-width"]
    assert last.found.macs <= 250 and last.found.drop == pytest.approx(0.008)
    assert made.tried[1].verdict == "top1 drops by 3.00%, allowed 1.00%"


def test_training_is_the_last_resort():
    """What lost least is trained first, then blocks before they are merged, then everything."""
    lost = network(depth=0.1, width=0.08, tuned_weights=0.1, trained=0.01)
    last, made = run("macs=0.25x, drop=1%", lost)
    assert last.step.settings["stages"] == TRAINED and last.step.settings["labels"] and made.tried[-1] is last
    tuned = next(attempt for attempt in made.tried if attempt.step.verb == "finetune")
    assert tuned.base is not None and tuned.base.step.verb == "prune-width"
    last, made = run("macs=0.25x, drop=1%", network(depth=0.1, width=0.08, tuned_weights=0.9))
    assert [attempt.step.verb for attempt in last.chain] == ["prune-width", "finetune"] and made.tried[-1] is last
    assert last.step.settings["distill"] and "stages" not in last.step.settings
    few = Means(data=True, torch=True, train=True, fitted=100, labelled=True)
    last, made = run("macs=0.25x, drop=1%", lost, few)
    assert not any(attempt.step.settings.get("stages") == TRAINED for attempt in made.tried)
    assert "finetune" not in made.verbs


def test_where_codebooks_lose_too_much_the_next_way_to_the_same_speed_takes_the_place_of_the_first():
    """Blocks lose 0.8 % and codebooks 0.6 %; trained blocks lose 0.3 %."""
    figures = network(depth=0.016, width=0.018, tuned_weights=0.625, plain=0.006, tuned=0.006)
    last, made = run("macs=0.5x, size=10x, drop=1%", figures)
    assert [attempt.step.verb for attempt in last.chain] == ["prune-depth", "finetune", "quantize"]
    assert last.found.drop == pytest.approx(0.009) and last.found.macs <= 500 and last.found.size_bytes == 100
    first = next(attempt for attempt in made.tried if attempt.step.verb == "prune-depth")
    assert "prune-depth" in first.step.text and first.found.drop == pytest.approx(0.008)
    # Where no way loses less, the size is approached at that speed, and all that was tried is held against the goal.
    bare = Means(data=True, torch=True, train=False, fitted=5000, labelled=True)
    last, made = run("macs=0.5x, size=10x, drop=1%", figures, bare)
    assert "finetune" not in made.verbs and last.found.macs <= 500 and 100 < last.found.size_bytes <= 450
    assert last.found.drop <= 0.01


def test_the_nearest_has_the_size_even_where_the_speed_is_out_of_reach():
    bare = Means(data=True, torch=True, train=False, fitted=5000, labelled=True)
    last, made = run("macs=0.25x, size=4x, drop=1%", network(depth=0.02, width=0.03, plain=0.0), bare)
    assert last.step.verb == "quantize" and last.found.size_bytes == 250 and 500 <= last.found.macs <= 620
    # Codebooks that lose too much there leave the speed alone.
    last, made = run("macs=0.25x, size=4x, drop=1%", network(depth=0.02, width=0.03, plain=0.1), bare)
    assert last.step.verb == "prune-depth" and made.verbs.count("quantize") == 1


def test_of_a_drop_alone_the_smallest_file_is_looked_for():
    def figures(step: Step, base: Point) -> Outcome:
        """A size loses 0.01 * 100 / bytes, tuned half of it; on its own samples quantize sees half of the drop."""
        if "max-drop" in step.settings:
            return 50, base.macs, 1.0, 0.02
        return network(plain=0.01, tuned=0.005)(step, base)

    last, made = run("drop=1%", figures)
    assert made.tried[1].step.settings == {"max-drop": "0.01"}
    assert made.tried[1].verdict == "top1 drops by 2.00%, allowed 1.00%"
    sizes = [attempt.step.settings["size"] for attempt in made.tried[2:]]
    assert sizes == ["50", "33", "40"] and last is made.tried[2] and last.step.settings["tune"] == "joint"
    bare = Means(data=True, torch=True, train=False, fitted=5000, labelled=True)
    last, made = run("drop=1%", figures, bare)
    assert [attempt.step.settings["size"] for attempt in made.tried[2:]] == ["75", "112", "91"]
    assert last is made.tried[3] and last.found.drop <= 0.01
    # Where quantize is right, a tuned file has to be smaller still.
    last, made = run("drop=2%", figures)
    assert [attempt.step.settings["size"] for attempt in made.tried[2:]] == ["33", "22", "26"] and last is made.tried[4]
    last, made = run("drop=2%", figures, bare)
    assert last is made.tried[1] and len(made.tried) == 2
    # Nothing to be had: exact rewrites are left.
    last, made = run("drop=1%", lambda step, base: None if step.verb == "quantize" else (900, 900, 0.9, 0.0), bare)
    assert last is made.tried[0]


def test_where_all_lose_too_much_the_nearest_is_found_by_bisection():
    last, made = run("macs=0.25x, drop=1%", network(depth=0.02, width=0.03, trained=0.02))
    # 0.02 (1 - share) = 0.01 at a share of one half; halves of the interval are taken in ratio.
    assert 0.5 <= last.found.macs / 1000 <= 0.62 and last.found.drop <= 0.01
    assert any("is out of reach" in attempt.why for attempt in made.tried)
    # Channels are enough where they lose little enough, and what is close to the goal is near enough.
    last, made = run("macs=0.25x, drop=1%", network(depth=0.02, width=0.0137, trained=0.02))
    back = [attempt for attempt in made.tried if attempt.why.startswith(("channels: back", "blocks: back"))]
    assert last is back[-1] and last.found.macs < 300 and [one.step.verb for one in back] == ["prune-width"] * 3
    last, made = run("macs=0.86x, drop=1%", network(depth=0.1, width=0.1, trained=0.1))
    assert last is made.tried[0] and not any("back to" in attempt.why for attempt in made.tried)  # 0.9x, and near


def test_without_data_nothing_is_pruned():
    bare = Means(data=False, torch=True, train=True, fitted=0, labelled=False)
    last, made = run("macs=0.5x, size=10x", network(), bare)
    assert made.verbs == ["optimize", "quantize"] and last is made.tried[1]  # nearer, if not there
    last, made = run("macs=0.5x", network(), bare)
    assert made.verbs == ["optimize"] and last is made.tried[0]
    last, made = run("size=10x", network(), bare)
    assert made.verbs == ["optimize", "quantize"] and last.found.size_bytes == 100


def test_without_torch_no_block_is_pruned_and_nothing_tuned():
    bare = Means(data=True, torch=False, train=True, fitted=5000, labelled=True)
    last, made = run("macs=0.5x, size=10x, drop=1%", network(plain=0.5, tuned=0.0), bare)
    assert "prune-depth" not in made.verbs and "prune-width" in made.verbs
    assert not any("tune" in attempt.step.settings for attempt in made.tried)
    assert last.found.drop <= 0.01


def test_codebooks_are_tuned_only_where_they_lose_too_much():
    last, made = run("size=10x, drop=1%", network(plain=0.004))
    assert last.step.settings == {"size": "100"} and made.verbs == ["optimize", "quantize"]
    last, made = run("size=10x, drop=1%", network(plain=0.03, tuned=0.008))
    assert last.step.settings == {"size": "100", "tune": "joint"}
    assert made.tried[1].verdict == "top1 drops by 3.00%, allowed 1.00%"


def test_a_size_that_loses_too_much_is_approached():
    last, made = run("size=10x, drop=1%", network(plain=0.05, tuned=0.03))
    # tuned: 0.03 * 100 / bytes <= 0.01 from 300 bytes on; of the interval from 100 to 900
    assert 300 <= last.found.size_bytes <= 400 and last.found.drop <= 0.01
    assert made.verbs.count("quantize") <= 10


def test_channels_go_where_codebooks_alone_cannot_reach_the_size():
    def figures(step: Step, base: Point) -> Outcome:
        if step.verb == "quantize" and base.macs > 500:
            return None
        return network(width=0.004)(step, base)

    last, made = run("size=20x, drop=1%", figures)
    assert [attempt.step.verb for attempt in last.chain] == ["prune-width", "quantize"]
    assert last.found.size_bytes == 50 and made.verbs.count("prune-width") == 2  # 0.7 did not do


def test_channels_that_go_for_a_size_are_trained_where_they_lose_too_much():
    def figures(step: Step, base: Point) -> Outcome:
        if step.verb == "quantize" and base.macs > 700:
            return None
        return network(width=0.04, tuned_weights=0.75)(step, base)

    last, _ = run("size=20x, drop=1%", figures)
    assert [attempt.step.verb for attempt in last.chain] == ["prune-width", "finetune", "quantize"]
    few = Means(data=True, torch=True, train=True, fitted=100, labelled=True)
    last, made = run("size=20x, drop=1%", figures, few)
    assert "finetune" not in made.verbs and last is made.tried[0]


def test_speed_comes_before_size():
    last, _ = run("size=10x, latency=0.5x, drop=1%", network())
    assert [attempt.step.verb for attempt in last.chain] == ["prune-width", "quantize"]


def test_what_is_told_of_a_verb_reaches_its_steps():
    last, made = run("size=10x, drop=1%", network(plain=0.05), quantize={"tune": "none", "permute": "none"})
    assert all(attempt.step.settings.get("tune") != "joint" for attempt in made.tried)
    assert last.step.settings["permute"] == "none"


# -- steps that the user wrote -----------------------------------------------------------------------------------------


def script(goal: str | None, steps: list[Step], figures: Callable[[Step, Point], Outcome]) -> tuple[Attempt, Made]:
    made = Made(figures)
    return Script(made, None if goal is None else parse_goal(goal), steps).run(), made  # type: ignore[arg-type]


def test_a_script_gives_each_step_what_is_left_of_the_goal():
    steps = [Step("optimize"), Step("prune-width"), Step("quantize", {"permute": "none"})]
    last, made = script("macs=0.5x, size=10x", steps, network())
    assert [attempt.step.settings for attempt in made.tried] == [
        {},
        {"macs": "500"},
        {"permute": "none", "size": "100"},
    ]
    assert last.chain == made.tried


def test_a_script_backs_out_of_what_costs_more_than_it_brings():
    steps = [Step("prune-width", {"macs": "200"}), Step("quantize")]
    last, made = script("size=10x, drop=1%", steps, network(width=0.05))
    assert made.tried[0].verdict == "top1 drops by 4.00%, allowed 1.00%" and last.chain == [made.tried[1]]
    last, made = script("size=10x", [Step("prune-width", {"macs": "200"}), Step("quantize")], network())
    assert made.tried[0].verdict == "it brings nothing of what is wished" and last.chain == [made.tried[1]]


def test_a_script_judges_a_step_with_the_training_that_follows_it():
    steps = [Step("prune-width", {"macs": "500"}), Step("finetune"), Step("quantize")]
    lost = network(width=0.04, tuned_weights=0.75)
    last, made = script("macs=0.5x, size=10x, drop=1%", steps, lost)
    assert last.chain == made.tried and last.found.drop == pytest.approx(0.005)
    assert made.tried[0].verdict == "top1 drops by 2.00%, allowed 1.00%"  # by itself
    last, made = script("macs=0.5x, size=10x, drop=1%", steps, network(width=0.04, tuned_weights=0.25))
    assert [attempt.step.verb for attempt in last.chain] == ["quantize"]  # both are backed out
    last, made = script("macs=0.5x, drop=3%", steps[:2], lost)
    assert made.verbs == ["prune-width"]  # reached


def test_training_that_a_user_wrote_without_a_goal_stays_unless_it_loses():
    steps = [Step("optimize"), Step("finetune")]
    for won, kept in ((0.5, True), (0.0, True), (-0.5, False)):
        last, _ = script(
            None,
            steps,
            lambda step, base, won=won: (
                (900, 900, 0.9, 0.02) if step.verb == "optimize" else (900, 900, 0.9, 0.02 * (1 - won))
            ),
        )
        assert (last.step.verb == "finetune") is kept
    last, _ = script("size=10x, drop=5%", steps, network())
    assert last.step.verb == "optimize"  # nothing was lost that could be won back


def test_a_script_for_a_drop_alone_runs_to_its_end():
    _, made = script("drop=1%", [Step("optimize"), Step("quantize", {"size": "300"}), Step("quantize")], network())
    assert made.verbs == ["optimize", "quantize", "quantize"]
    assert made.tried[2].step.settings == {"max-drop": "0.01"}


def test_a_script_ends_where_its_goal_is_reached_and_runs_to_its_end_without_one():
    steps = [Step("optimize"), Step("quantize", {"size": "300"})]
    assert script("size=1.1x", steps, network())[1].verbs == ["optimize"]
    assert script(None, steps, network())[1].verbs == ["optimize", "quantize"]


def test_a_step_that_fails_ends_a_script_without_a_goal():
    steps = [Step("prune-width", {"macs": "1"}), Step("optimize")]
    with pytest.raises(StepError, match="step 1, prune-width macs=1: out of reach"):
        script(None, steps, network(width=None))
    assert script("size=1.1x", steps, network(width=None))[1].verbs == ["prune-width", "optimize"]


def test_a_step_that_nothing_tells_how_far_is_refused():
    with pytest.raises(RecipeError, match="step 1, prune-width: nothing says how far: give it macs or latency"):
        script(None, [Step("prune-width")], network())
