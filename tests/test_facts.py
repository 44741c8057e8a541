"""What edges tell the server: shares, protection, smoothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedpipe_ray.facts import facts_of, learn, protected, scores_of, smoothed
from fedpipe_ray.planning import Key

EDGES = dict.fromkeys(("a", "b"))


def test_an_edge_that_told_nothing_has_long_rows_and_a_fair_share() -> None:
    known = facts_of(EDGES, {}, longest=96)
    assert (known["a"].tokens, known["a"].longest, known["a"].terms, known["a"].share) == (96, 96, 96, 0.5)


def test_a_share_of_rows() -> None:
    known = facts_of(EDGES, {"a/rows": 30.0, "b/rows": 10.0}, longest=96)
    assert (known["a"].share, known["b"].share) == (0.75, 0.25)


def test_a_rare_class_counts_as_much_as_a_common_one() -> None:
    """a holds 90 of 100 rows of class 0 and none of class 1: (0.9 + 0) / 2; b all 10 of class 1: (0.1 + 1) / 2."""
    numbers = {"a/rows": 90.0, "a/class.0": 90.0, "b/rows": 20.0, "b/class.0": 10.0, "b/class.1": 10.0}
    known = facts_of(EDGES, numbers, longest=96)
    assert (known["a"].share, known["b"].share) == (pytest.approx(0.45), pytest.approx(0.55))


def test_names_of_edges_that_begin_alike_do_not_mix() -> None:
    known = facts_of({"a": None, "a/b": None}, {"a/rows": 30.0, "a/b/rows": 10.0}, longest=96)
    assert (known["a"].rows, known["a/b"].rows) == (30, 10)


@pytest.mark.parametrize(("share", "steps"), [(0.1, 3), (0.2, 3), (0.3, 10), (0.4, 20), (0.9, 20)])
def test_large_or_rare_data_are_protected(share: float, steps: int) -> None:
    """Five edges, 20 steps planned: a fair share is 0.2; at 0.3 half: 20 x (0.3 x 5 - 1) = 10; at twice it all."""
    assert protected(20, share, 5) == steps


def test_never_more_steps_than_planned_are_protected() -> None:
    assert protected(2, 0.1, 5) == 2


def test_scores_are_smoothed_and_facts_replaced() -> None:
    """I' = 0.15 x 2 = 0.3, U' = 0.15 x (2 - 0.3) = 0.255; then I' = 0.85 x 0.3 + 0.3 = 0.555, U' as below."""
    numbers: dict[str, float] = {}
    learn("a", {"rows": 5.0, "score.x.q_proj": 2.0}, numbers)
    assert smoothed("a", numbers, ["x.q_proj"]).scores()["x.q_proj"] == pytest.approx(0.3 * 0.255)
    learn("a", {"rows": 6.0, "score.x.q_proj": 2.0}, numbers)
    assert numbers["a/rows"] == 6
    after = smoothed("a", numbers, ["x.q_proj"]).scores()
    assert after["x.q_proj"] == pytest.approx(0.555 * (0.85 * 0.255 + 0.15 * 1.445))


def test_scores_are_local_or_the_mean_and_equal_until_all_are_known() -> None:
    """a has told 1 and 3 over 10 rows, b 3 and 1 over 30, c nothing; layers apart, so `none` leaves no difference."""
    keys = [Key(f"{layer}.q", "q", layer, 8, 8) for layer in range(2)]
    numbers = {
        "a/rows": 10.0,
        "b/rows": 30.0,
        "a/mean.0.q": 1.0,
        "a/mean.1.q": 3.0,
        "b/mean.0.q": 3.0,
        "b/mean.1.q": 1.0,
    }
    facts = facts_of(("a", "b", "c"), numbers, 96)
    kinds = [replace(key, kind=key.name) for key in keys]
    local = scores_of(facts, numbers, kinds, scope="local", tie="kind", plain=True)
    assert {edge: found.tolist() for edge, found in local.items()} == {
        "a": [0.25, 0.75], "b": [0.75, 0.25], "c": [0.5, 0.5]
    }  # fmt: skip
    mean = scores_of(facts, numbers, kinds, scope="global", tie="kind", plain=True)
    assert all(found.tolist() == [0.625, 0.375] for found in mean.values())
    assert scores_of(facts, numbers, keys, scope="local", tie="kind", plain=True)["a"].tolist() == [0.5, 0.5]
