"""Goals: what is read, and what is refused with the way out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from onnxcompress.compression.goal import Goal, goal_of, parse_goal
from onnxcompress.compression.point import Point, excess, reached
from onnxcompress.compression.wording import latency_text, nearest_text, too_much_text
from onnxcompress.errors import RecipeError
from onnxcompress.measure import LatencyFigures


def point(size: int = 1000, macs: int = 1000, ratio: float = 1.0, drop: float | None = 0.0) -> Point:
    timed = LatencyFigures(2.0, 2.0 / ratio, ratio, ratio, ratio, 10)
    return Point(size, macs, timed, "top1", drop, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "key", "amount", "relative"),
    [
        ("size=10x", "size", 0.1, True),
        ("size=5M", "size", 5 << 20, False),
        ("size = 800 KB", "size", 800 << 10, False),
        ("size=43000", "size", 43000, False),
        ("latency=0.5x", "latency", 0.5, True),
        ("latency=3ms", "latency", 3, False),
        ("latency=250us", "latency", 0.25, False),
        ("macs=0.5x", "macs", 0.5, True),
        ("macs=300M", "macs", 300e6, False),
    ],
)
def test_a_limit_is_read_in_its_unit(text, key, amount, relative):
    limit = getattr(parse_goal(text), key)
    assert limit.amount == pytest.approx(amount) and limit.relative is relative


def test_a_goal_of_several_keys_is_what_it_says_it_is():
    goal = parse_goal(" size=10x,latency=0.5x , drop=1%")
    assert goal.drop == 0.01 and goal.text == "size=10x, latency=0.5x, drop=1%"
    assert parse_goal(goal.text) == goal == goal_of({"size": "10x", "latency": "0.5x", "drop": 0.01})
    assert [limit.key for limit in goal.limits] == ["latency", "size"]  # what is pruned can be quantized


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size=0.1x", "did you mean size=10x?"),
        ("latency=2x", "did you mean latency=0.5x?"),
        ("macs=4x", "did you mean macs=0.25x?"),
        ("drop=5, size=2x", "did you mean drop=5%?"),
        ("sise=10x", "did you mean 'size'?"),
        ("latencies=0.5x", "did you mean 'latency'?"),
        ("speed=0.5x", "there are size, latency, macs, drop"),
        ("size", "expected KEY=VALUE"),
        ("size=ten", "expected 10x or 5M"),
        ("latency=3", "expected 0.5x or 3ms"),
        ("macs=3ms", "expected 0.5x or 300M"),
        ("size=0x", "at least 1"),
        ("size=0", "more than 0"),
        ("size=2x, size=3x", "given twice"),
        ("", "nothing to reach"),
    ],
)
def test_a_near_miss_is_refused_with_the_way_out(text, said):
    with pytest.raises(RecipeError) as error:
        parse_goal(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("goal", "found", "is_reached"),
    [
        ("size=10x", point(size=100), True),
        ("size=10x", point(size=101), False),
        ("size=100", point(size=100), True),
        ("macs=0.5x", point(macs=500), True),
        ("macs=0.5x", point(macs=501), False),
        ("latency=0.5x", point(ratio=2.0), True),
        ("latency=0.5x", point(ratio=1.9), False),
        ("latency=1ms", point(ratio=2.0), True),
        ("latency=0.9ms", point(ratio=2.0), False),
        ("macs=0.5x, drop=1%", point(macs=500, drop=0.01), True),
        ("macs=0.5x, drop=1%", point(macs=500, drop=0.011), False),
        ("macs=0.5x", point(macs=500, drop=0.9), True),
    ],
)
def test_a_goal_is_reached_when_all_of_it_is(goal, found, is_reached):
    assert reached(parse_goal(goal), found, point()) is is_reached


def test_a_drop_alone_asks_for_the_smallest_file():
    goal = parse_goal("drop=1%")
    assert goal.is_smallest and goal.text == "drop=1%" and not parse_goal("size=2x, drop=1%").is_smallest
    found = nearest_text(goal, point(size=250, drop=0.005), point())
    assert found == "size 4.00x, top1 drops by 0.50%"


def test_what_is_lost_and_what_is_allowed_are_told_apart():
    assert too_much_text(point(drop=0.03), 0.01) == "top1 drops by 3.00%, allowed 1.00%"
    assert too_much_text(point(drop=6 / 599), 0.01) == "top1 drops by 1.002%, allowed 1.000%"


def test_latency_is_told_beside_the_original_of_the_same_minute():
    original, busy = point(), replace(point(ratio=2.0), latency=LatencyFigures(6.0, 3.0, 2.0, 1.9, 2.1, 9))
    assert latency_text(original, original) == "2.000 ms" and latency_text(busy, original) == "0.50x"


@pytest.mark.parametrize(
    ("goal", "found", "away"),
    [
        ("size=10x", point(size=100), 1.0),
        ("size=10x", point(size=200), 2.0),
        ("size=200", point(size=300), 1.5),
        ("size=10x, latency=0.5x", point(size=200, ratio=1.0), 4.0),
        ("size=10x, macs=0.5x", point(size=50, macs=750), 1.5),  # more than is wished of one makes up for nothing
        ("latency=1ms", point(ratio=1.6), 1.25),
    ],
)
def test_how_far_a_point_is_from_a_goal(goal, found, away):
    assert math.exp(excess(parse_goal(goal), found, point())) == pytest.approx(away)


def test_a_goal_without_limits_is_reached_by_anything():
    assert reached(Goal(), point(), point())
