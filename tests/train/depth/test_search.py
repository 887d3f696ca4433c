"""The search over bit strings, on scores that are known."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest

from onnxcompress.errors import RecipeError
from onnxcompress.train.depth.search import Budget, ScoreCache, SearchSettings, search, shortlist

LOSSES = [0.5, 0.1, 3.0, 0.2, 2.0, 0.05, 1.0, 0.7, 0.4, 0.3, 0.9, 0.15, 0.6, 0.25]
PAIR = 4.0  # what it costs to prune blocks 1 and 5 both, the two cheapest ones


def additive(bits: str) -> float:
    return -sum(loss for loss, bit in zip(LOSSES, bits, strict=False) if bit == "1")


def coupled(bits: str) -> float:
    return additive(bits) - (PAIR if bits[1] == bits[5] == "1" else 0.0)


class Counted:
    """A score that notes what it was asked."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def __call__(self, wanted):
        self.asked += wanted
        return [self.score(bits) for bits in wanted]


def best_by_hand(budget: Budget, score) -> str:
    every = ("".join(bits) for bits in itertools.product("01", repeat=len(budget.savings)))
    return max((bits for bits in every if budget.is_met(bits)), key=score)


@pytest.mark.parametrize("pruned", [1, 4, 9])
def test_exhaustive_finds_the_best_of_all_sets(pruned):
    budget = Budget.count(9, pruned)
    asked = Counted(coupled)
    found = search(budget, asked, SearchSettings(method="exhaustive"))
    assert found.bits == best_by_hand(budget, coupled)
    assert found.evaluations == len(asked.asked) == len(set(asked.asked)) == math.comb(9, pruned)


def test_candidates_prune_no_more_than_needed():
    budget = Budget((3.0, 1.0, -0.5, 2.0, 0.0, 1.5), 3.2)
    every = ["".join(bits) for bits in itertools.product("01", repeat=6)]
    minimal = {
        bits
        for bits in every
        if bits[2] == bits[4] == "0"
        and budget.saved(bits) >= 3.2
        and all(bit == "0" or budget.saved(bits[:i] + "0" + bits[i + 1 :]) < 3.2 for i, bit in enumerate(bits))
    }
    found = list(budget.candidates())
    assert len(found) == len(set(found)) and set(found) == minimal


RIVALS = Budget((3.0, 1.0, -0.5, 2.0, 0.0, 1.5, 5.0), 5.5, (0, 1, 2, 3, 4, 3, 0))


def test_candidates_have_one_of_two_at_a_place():
    every = ["".join(bits) for bits in itertools.product("01", repeat=7)]
    minimal = {
        bits
        for bits in every
        if bits[2] == bits[4] == "0"
        and not bits[0] == bits[6] == "1"
        and not bits[3] == bits[5] == "1"
        and RIVALS.saved(bits) >= 5.5
        and all(bit == "0" or RIVALS.saved(bits[:i] + "0" + bits[i + 1 :]) < 5.5 for i, bit in enumerate(bits))
    }
    found = list(RIVALS.candidates())
    assert len(found) == len(set(found)) and set(found) == minimal and len(minimal) == 5
    assert RIVALS.most == 8.0


@pytest.mark.parametrize("method", ["exhaustive", "ga", "greedy", "random"])
@pytest.mark.parametrize("need", [0.5, 5.5, 8.0])
def test_every_search_takes_one_of_two_at_a_place(method, need):
    budget = replace(RIVALS, need=need)
    found = search(budget, Counted(lambda bits: -budget.saved(bits)), SearchSettings(method=method))
    assert budget.fits(found.bits) and budget.is_met(found.bits)
    if need == 8.0:  # the larger one at each place, and the one that has its own
        assert found.bits == "0101001"


def test_a_shortlist_takes_turns_among_numbers_of_deletions():
    ranked = ["1100", "1010", "0011", "0110", "1001", "0101"]
    deletes = [False, False, True, True]
    assert shortlist(ranked, deletes, 4) == ["1100", "1010", "0011", "0110"]
    assert shortlist(ranked, deletes, 9) == ["1100", "1010", "0011", "0110", "1001", "0101"]
    assert shortlist(["1010", "1001", "1100"], deletes, 2) == ["1100", "1010"]


def test_repair_gives_candidates_only():
    import random

    candidates = set(RIVALS.candidates())
    every = ["".join(bits) for bits in itertools.product("01", repeat=7)]
    assert {RIVALS.repaired(one, random.Random(0)) for one in every} == candidates
    budget = Budget(tuple(float(1 + i % 4) for i in range(10)), 9.0)
    candidates = set(budget.candidates())
    rng = random.Random(0)
    bits = [format(rng.getrandbits(10), "010b") for _ in range(200)]
    assert {budget.repaired(one, rng) for one in bits} <= candidates
    assert budget.repaired(next(iter(candidates)), rng) in candidates
    assert len({budget.drawn(rng) for _ in range(200)}) > 20


@pytest.mark.parametrize("seed", range(5))
def test_genetic_algorithm_finds_the_best_with_fewer_evaluations(seed):
    budget = Budget.count(14, 5)  # 2002 candidates
    asked = Counted(coupled)
    found = search(budget, asked, SearchSettings(method="ga", population=20, generations=15, seed=seed))
    assert found.bits == best_by_hand(budget, coupled)
    assert found.evaluations == len(asked.asked) == len(set(asked.asked)) <= 320
    assert found.history == sorted(found.history)


def test_genetic_algorithm_is_better_than_random_draws_and_than_greed_on_coupled_blocks():
    budget = Budget.count(14, 5)
    genetic = search(budget, Counted(coupled), SearchSettings(method="ga", generations=15)).score
    drawn = search(budget, Counted(coupled), SearchSettings(method="random", evaluations=40)).score
    assert genetic > drawn
    # Greed takes block 5 first, and can never take it back.
    trap = lambda bits: additive(bits) - (0.3 if bits[5] == "1" else 0.0) * (bits.count("1") - 1)  # noqa: E731
    greedy = search(Budget.count(14, 2), Counted(trap), SearchSettings(method="greedy")).score
    assert search(Budget.count(14, 2), Counted(trap), SearchSettings(method="exhaustive")).score > greedy


def test_same_seed_same_search():
    budget = Budget.count(14, 6)

    def asked(seed):
        counted = Counted(coupled)
        search(budget, counted, SearchSettings(method="ga", generations=3, seed=seed))
        return counted.asked

    assert asked(3) == asked(3) != asked(4)


def test_small_spaces_end_early():
    asked = Counted(additive)
    found = search(Budget.count(4, 2), asked, SearchSettings(method="ga"))
    assert sorted(asked.asked) == sorted(Budget.count(4, 2).candidates())
    assert found.bits == "0101"


def test_greedy_prefers_what_saves_more_for_its_loss():
    # Block 0 loses 2 and saves 4, block 1 loses 1 and saves 1.
    budget = Budget((4.0, 1.0, 1.0, 1.0), 4.0)
    losses = (2.0, 1.0, 1.0, 1.0)
    found = search(budget, lambda wanted: [-_weighted(losses, b) for b in wanted], SearchSettings(method="greedy"))
    assert found.bits == "1000" and found.evaluations == 5


def test_greedy_drops_what_a_later_step_made_needless():
    budget = Budget((5.0, 1.0), 5.0)
    losses = (9.0, 0.1)
    found = search(budget, lambda wanted: [-_weighted(losses, b) for b in wanted], SearchSettings(method="greedy"))
    assert found.bits == "10"


def _weighted(losses, bits):
    return sum(loss for loss, bit in zip(losses, bits, strict=True) if bit == "1")


def test_a_score_that_is_no_number_is_the_worst():
    scores = {"10": math.nan, "01": -5.0}
    found = search(Budget.count(2, 1), lambda wanted: [scores[b] for b in wanted], SearchSettings(method="exhaustive"))
    assert found.bits == "01"


def test_a_budget_out_of_reach_says_how_far_it_goes():
    with pytest.raises(RecipeError, match="all 2 blocks together save 3, 4 is asked for"):
        search(Budget((1.0, 2.0, -1.0), 4.0), Counted(additive))


def test_auto_takes_every_candidate_up_to_twelve_blocks():
    assert SearchSettings().method_for(Budget.count(12, 3)) == "exhaustive"
    assert SearchSettings().method_for(Budget.count(13, 3)) == "ga"
    assert SearchSettings().most_evaluations(Budget.count(12, 3)) == 220
    assert SearchSettings().most_evaluations(Budget.count(13, 3)) == 220  # 20 x 11 of 286
    assert SearchSettings(method="greedy").most_evaluations(Budget.count(4, 4)) == 10


def test_exhaustive_refuses_what_would_never_end():
    with pytest.raises(RecipeError, match="40 blocks have more than 65536 candidates: take the search ga"):
        search(Budget.count(40, 20), Counted(additive), SearchSettings(method="exhaustive"))


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ({"method": "best"}, "search 'best' is unknown"),
        ({"population": 1}, "population 1: expected at least 2"),
        ({"mutation": 1.5}, "mutation 1.5: expected 0 to 1"),
        ({"evaluations": 0}, "evaluations 0: expected at least 1"),
    ],
)
def test_bad_settings_are_refused(wish, text):
    with pytest.raises(RecipeError, match=text):
        SearchSettings(**wish)


def cached(path, asked, resume=True, **identity):
    cache = ScoreCache(path, {"model": "a", **identity}, resume=resume)

    def evaluate(wanted, done):
        for bits in wanted:
            asked.append(bits)
            done({bits: additive(bits)})

    return cache.wrap(evaluate)


def test_scores_are_kept_on_disk(tmp_path):
    path, asked = tmp_path / "run" / "scores.json", []
    first = cached(path, asked)(["10", "01", "11"])
    again = cached(path, asked)(["01", "11", "00"])
    assert asked == ["10", "01", "11", "00"]
    assert again[:2] == first[1:] and json.loads(path.read_text())["scores"]["10"] == first[0]
    assert not list(path.parent.glob(".*"))


def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path):
    path, asked = tmp_path / "scores.json", []
    budget, settings = Budget.count(14, 5), SearchSettings(method="ga", generations=4)
    whole = search(budget, Counted(additive), settings)

    def interrupted(wanted, done):
        for bits in wanted:
            if len(asked) == 47:
                raise KeyboardInterrupt
            asked.append(bits)
            done({bits: additive(bits)})

    with pytest.raises(KeyboardInterrupt):
        search(budget, ScoreCache(path, {"model": "a"}).wrap(interrupted), settings)
    found = search(budget, cached(path, asked), settings)
    assert found.bits == whole.bits and found.scores == whole.scores
    assert len(asked) == len(set(asked)) == whole.evaluations


def test_scores_of_another_run_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    cached(path, [])(["1"])
    with pytest.raises(RecipeError, match="of another run: another data; --no-resume"):
        cached(path, [], data="b")
    assert cached(path, [], resume=False, data="b")(["1"]) == [-0.5]
    path.write_text("{")
    with pytest.raises(RecipeError, match="cannot be read"):
        cached(path, [])


def test_nan_survives_the_file(tmp_path):
    path = tmp_path / "scores.json"
    ScoreCache(path, {}).put({"1": math.nan})
    assert math.isnan(ScoreCache(path, {}).scores["1"])
