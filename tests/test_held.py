"""What edges keep of their orders is counted once, by content."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_ray.costs import Cost
from fedpipe_ray.held import Held, grouped, ungrouped
from fedpipe_ray.message import KEPT, Message
from fedpipe_ray.report import Lost, Report

WEIGHTS = torch.arange(6.0)


def order(weights: torch.Tensor = WEIGHTS) -> Message:
    return Message({KEPT + "w": weights, "lora": torch.zeros(2)}, {"x": 1})


def report(edge: str) -> Report:
    return Report(edge, 0, 1.0, 0.0, Cost())


def test_counted_once_and_again_when_it_changes_or_the_edge_was_lost() -> None:
    held = Held({})
    first = held.mark({"a": order(), "b": order(), "c": order()})
    assert {edge: one.payload_bytes for edge, one in first.items()} == dict.fromkeys("abc", 24 + 8)
    late = Lost("c", "late", status="late")
    held.note(first, {"a": report("a"), "b": Lost("b", "gone"), "c": late})
    second = held.mark({edge: order(WEIGHTS.clone()) for edge in "abcd"})
    assert {edge: one.payload_bytes for edge, one in second.items()} == {"a": 8, "b": 32, "c": 8, "d": 32}
    assert second["a"].held == {KEPT + "w"}
    assert second["a"].header_bytes < second["b"].header_bytes
    assert second["a"].tensors.keys() == second["b"].tensors.keys()
    changed = held.mark({"a": order(WEIGHTS + 1)})
    assert changed["a"].payload_bytes == 32
    other = held.mark({"a": order(WEIGHTS.view(2, 3))})  # the same bytes in another form
    assert other["a"].payload_bytes == 32


def test_what_is_held_travels_with_a_message() -> None:
    marked = Held({"a": frozenset()}).mark({"a": order()})["a"]
    assert marked.held == frozenset()
    one = Message(order().tensors, {}, frozenset({KEPT + "w"}))
    for again in (pickle.loads(pickle.dumps(one, protocol=5)), one.to("bfloat16"), Message.joined(Message(), one)):
        assert again.held == one.held
        assert torch.equal(again.kept["w"], WEIGHTS)  # as it was stored
    assert one.to("bfloat16").rest["lora"].dtype == torch.bfloat16
    assert one.to("float32") is one


@given(st.dictionaries(st.text(max_size=3), st.frozensets(st.text("abcdef", min_size=2, max_size=3))))
def test_a_checkpoint_gives_it_back(edges: dict[str, frozenset[str]]) -> None:
    assert ungrouped(grouped(edges)) == edges
    assert len(grouped(edges)) == len(set(edges.values()))
