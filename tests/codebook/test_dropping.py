"""The search for the largest damage whose drop is allowed."""

import itertools
import math

import pytest

from onnxcompress.codebook.dropping import MAX_TRIALS, DropSearch, next_damage


def search(limit, drop_of):
    found = DropSearch(limit)
    tried = []
    while not found.done:
        tried.append((found.damage, found.tell(drop_of(found.damage))))
    return tried


@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0])
def test_a_drop_that_follows_the_root_law_is_met_at_once_from_anywhere(scale):
    tried = search(0.01, lambda damage: scale * math.sqrt(damage))
    allowed = [damage for damage, good in tried if good]
    assert len(tried) <= 4 and 0.7 * 0.01 <= scale * math.sqrt(max(allowed)) <= 0.01


def test_a_step_is_closed_in_from_both_sides():
    tried = search(0.01, lambda damage: 0.0 if damage <= 0.02 else 0.5)
    allowed, refused = ([damage for damage, good in tried if good is kind] for kind in (True, False))
    assert len(tried) <= MAX_TRIALS and max(allowed) <= 0.02 < min(refused) and min(refused) <= 2.2 * max(allowed)


def test_what_is_never_allowed_ends():
    tried = search(0.01, lambda damage: 0.5)
    assert len(tried) == MAX_TRIALS and not any(good for _, good in tried)
    assert all(after < before for (before, _), (after, _) in itertools.pairwise(tried))


def test_the_next_damage_stays_between_what_is_allowed_and_what_is_not():
    assert next_damage(0.01, 0.5, 0.01, 0.004, 0.01) == pytest.approx(math.sqrt(0.004 * 0.01))
    assert next_damage(0.01, 0.0, 0.01, 0.01, math.inf) == pytest.approx(0.16)
