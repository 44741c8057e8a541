"""Whole updates through codecs: what travels, what the server makes of it, and what of it is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import SETTINGS, drawn

from fedpipe_ray.encoding import Encoding, with_carried, without_carried
from fedpipe_ray.errors import DivergedError, UnfitUpdate
from fedpipe_ray.message import Message
from fedpipe_ray.settings import Wire

codecs = pytest.mark.parametrize("codec", SETTINGS, ids=str)


def encoding(codec: dict[str, Any], round: int = 0, feedback: bool = False, dtype: Any = "float32") -> Encoding:
    return Encoding(Wire(codec=codec, error_feedback=feedback, dtype=dtype), 0, round, "a")


def order() -> Message:
    """Two matrices, a vector, an integer, and a tensor to keep."""
    floats = {"b": drawn((40, 50), 1), "a": drawn((8, 33), 0), "v": drawn((5,), 2)}
    return Message({**floats, "n": torch.arange(3), "kept.w": drawn((4,), 3)})


def update(seed: int = 9, size: float = 0.1) -> Message:
    """Each changed a little, the integer too, and one thing that the order lacks."""
    sent = order().tensors
    floats = {name: sent[name] + size * drawn(tuple(sent[name].shape), seed) for name in ("a", "b", "v")}
    return Message({**floats, "n": torch.arange(3) + 1, "new": drawn((6, 7), seed)}, {"rows": 3})


@codecs
@given(st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.sets(st.sampled_from(["a", "b", "v", "new", "n"])))
@settings(max_examples=25)
def test_what_arrives_is_the_order_plus_the_decoded_change(
    codec: dict[str, Any], dtype: str, feedback: bool, names: set[str]
) -> None:
    """Any part of an update: nearer to what was made than the order is, or as near; its integers are equal."""
    one, sent = encoding(codec, feedback=feedback, dtype=dtype), order().to(dtype)
    whole = Message({name: t for name, t in update().tensors.items() if name in names}, {"rows": 3})
    travels, carried = one.encode(whole, sent, None)
    back = one.decode(travels, sent)
    assert (back.tensors.keys(), back.numbers) == (names, {"rows": 3})
    for name, tensor in back.tensors.items():
        expected = whole.tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        if name == "n":
            assert torch.equal(tensor, expected)
        elif name == "new":
            exact = codec["name"] in ("topk", "randomk", "lowrank")
            torch.testing.assert_close(tensor, expected, rtol=0.01 if exact else 0, atol=0.0 if exact else 0.6)
        elif feedback:
            left = carried.tensors[f"codec.left.{name}"] if carried else torch.zeros(())
            torch.testing.assert_close(tensor + left, expected, rtol=0, atol=1e-6)
            change = expected - sent.tensors[name].float()
            assert float(left.norm()) <= 1.01 * float(change.norm())
    assert travels.payload_bytes <= whole.payload_bytes + 4 * 3  # places, at worst


def test_names_that_the_order_has_do_not_travel() -> None:
    """100 tensors of 64 entries: topk's 100 x 1 x (4 + 2) bytes, and a header that does not grow with the names."""
    sent = Message({f"base_model.model.layers.{n}.self_attn.q_proj.lora_A.weight": torch.zeros(64) for n in range(100)})
    travels, _ = encoding({"name": "topk"}).encode(sent, sent, None)
    assert travels.payload_bytes == 600
    assert travels.header_bytes < 100 < sent.header_bytes
    part = Message(dict(list(sent.tensors.items())[:50]))
    travels, _ = encoding({"name": "topk"}).encode(part, sent, None)
    assert travels.payload_bytes == 300 + 4 * 50
    assert encoding({"name": "topk"}).decode(travels, sent).tensors.keys() == part.tensors.keys()


def test_a_kept_tensor_is_changed_too() -> None:
    """Its place travels, 4 bytes; where none comes back, nothing does. What is left of it waits for its next turn."""
    sent = Message({"kept.a": torch.arange(8.0), "kept.b": torch.ones(8), "head": torch.ones(2)})
    one, a = encoding({"name": "topk", "share": 0.5}, feedback=True), {"a": torch.arange(8.0) + torch.arange(8)}
    travels, carried = one.encode(Message({**a, "head": torch.ones(2)}), sent, None)
    assert travels.payload_bytes == 4 * (4 + 2) + 1 * (4 + 2) + 2 * 4
    found = one.decode(travels, sent).tensors
    assert found["a"].tolist() == [0, 1, 2, 3, 8, 10, 12, 14]  # of changes 0 to 7 the four largest
    assert found.keys() == {"a", "head"}
    travels, carried = one.encode(Message({"b": torch.ones(8), "head": torch.ones(2)}), sent, carried)
    travels, _ = one.encode(Message({"a": torch.arange(8.0), "head": torch.ones(2)}), sent, carried)
    assert one.decode(travels, sent).tensors["a"].tolist() == [0, 2, 4, 6, 4, 5, 6, 7]
    travels, _ = one.encode(Message({"head": torch.ones(2)}), sent, None)
    assert travels.payload_bytes == 6
    assert one.decode(travels, sent).tensors.keys() == {"head"}


@codecs
def test_what_is_left_out_comes_later(codec: dict[str, Any]) -> None:
    """The sum of T decoded changes is that of the true ones but for what is still left, which does not grow with T.

    So the gap falls as 1 / T: from round 20 to round 100 to about a fifth, where it is not rounding alone.
    """
    gaps = gaps_of(codec, feedback=True, rounds=100)
    assert gaps[99] < max(1e-3, 0.35 * gaps[19])


@pytest.mark.parametrize("feedback", [False, True])
@codecs
def test_changes_of_what_has_arrived_reach_their_aim(codec: dict[str, Any], feedback: bool) -> None:
    """Each is the way from what arrived to the same aim, so that what was left out is in the next: nothing is kept."""
    aim, there, carried, gaps = drawn((12, 20), 2), Message({"c.b": torch.zeros(12, 20)}), None, []
    for round in range(100):
        one = dataclasses.replace(encoding(codec, round, feedback), again=("c.*",))
        found = one.arriving(Message({"c.b": aim}), there, carried)
        travels, carried = one.encode(Message({"c.b": aim}), there, carried)
        there = one.decode(travels, there)
        assert torch.equal(there.tensors["c.b"], found.tensors["c.b"])
        gaps.append(float((aim - there.tensors["c.b"]).norm() / aim.norm()))
    assert max(gaps) <= 1
    assert gaps[99] < 0.8 * gaps[0] or gaps[0] < 1e-3
    assert carried is None or all("left" not in name for name in carried.tensors)


def test_without_feedback_what_is_left_out_never_comes() -> None:
    """topk at 1/10 of one and the same change sends the same entries each time: 9 in 10 never come."""
    gaps = gaps_of({"name": "topk", "share": 0.1}, feedback=False, rounds=20)
    assert gaps[19] == pytest.approx(gaps[0], rel=1e-4)
    assert gaps[19] > 0.5


def gaps_of(codec: dict[str, Any], feedback: bool, rounds: int) -> list[float]:
    """||sum of what arrived - sum of what was changed|| / ||the latter|| after each round of the same change."""
    carried = None
    sent, change = Message({"b": drawn((12, 20), 1)}), 0.1 * drawn((12, 20), 2)
    total, gaps = torch.zeros(12, 20), []
    for round in range(rounds):
        one = encoding(codec, round, feedback=feedback)
        travels, carried = one.encode(Message({"b": sent.tensors["b"] + change}), sent, carried)
        total += one.decode(travels, sent).tensors["b"] - sent.tensors["b"]
        true = (round + 1) * change
        if feedback:
            assert carried is not None
            torch.testing.assert_close(total + carried.tensors["codec.left.b"], true, rtol=0, atol=1e-3)
        gaps.append(float((true - total).norm() / true.norm()))
    return gaps


def test_what_was_kept_of_tensors_that_do_not_come_this_time_stays() -> None:
    one, sent = encoding({"name": "topk"}, feedback=True), order()
    _, first = one.encode(update(), sent, None)
    only_a = Message({"a": update().tensors["a"]})
    _, second = one.encode(only_a, sent, first)
    assert first is not None
    assert second is not None
    assert torch.equal(second.tensors["codec.left.b"], first.tensors["codec.left.b"])
    assert not torch.equal(second.tensors["codec.left.a"], first.tensors["codec.left.a"])


def test_what_was_kept_of_tensors_that_the_order_has_no_more_is_dropped() -> None:
    """As of slora's sparse entries, when LoRA begins; lowrank's Q of a matrix, too."""
    one = encoding({"name": "lowrank"}, feedback=True)
    _, first = one.encode(update(), order(), None)
    rest = Message({name: tensor for name, tensor in order().tensors.items() if name != "b"})
    _, second = one.encode(Message({"a": update().tensors["a"]}), rest, first)
    assert first is not None
    assert second is not None
    assert first.tensors.keys() - second.tensors.keys() == {"codec.left.b", "codec.warm.b"}


def test_no_codec_is_the_wire_as_it_was() -> None:
    plain, whole = Encoding(Wire(), 0, 0, "a"), update()
    assert plain.encode(whole, order(), None) == (whole, None)
    half = Encoding(Wire(dtype="bfloat16"), 0, 0, "a").encode(whole, order(), None)[0]
    assert half.tensors["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [math.nan, math.inf])
@codecs
def test_nan_is_not_encoded(codec: dict[str, Any], value: float) -> None:
    whole = update()
    whole.tensors["a"][3, 3] = value
    with pytest.raises(DivergedError, match="its update has NaN or infinity in a"):
        encoding(codec).encode(whole, order(), None)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", ["topk", "randomk", "lowrank"])
def test_what_wire_dtype_cannot_hold_is_not_encoded(name: str, feedback: bool) -> None:
    """float16 ends at 65,504. The infinity would stay in what is left, and spoil every later update of the edge."""
    with pytest.raises(DivergedError, match="its update is too large for float16 in a; use bfloat16 or float32"):
        encoding({"name": name}, feedback=feedback, dtype="float16").encode(update(size=1e6), order(), None)


def test_private_states_are_kept_as_one_and_told_apart() -> None:
    own, carried = Message({"drawn": torch.ones(2)}, {"n": 1}), Message({"codec.left.a": torch.ones(3)})
    for one, other in ((own, carried), (None, carried), (own, None), (None, None)):
        found = without_carried(with_carried(one, other))
        assert [None if part is None else (part.tensors, part.numbers) for part in found] == [
            None if part is None else (part.tensors, part.numbers) for part in (one, other)
        ]


# -- malformed messages: each is refused with its reason, whatever else it holds


def tampered(codec: dict[str, Any], **changes: torch.Tensor | None) -> Message:
    """An encoded update with tensors replaced, added, or taken out."""
    travels, _ = encoding(codec).encode(update(), order(), None)
    tensors = {**travels.tensors, **{name.replace("__", "."): t for name, t in changes.items()}}
    return Message({name: t for name, t in tensors.items() if t is not None}, travels.numbers)


TOPK, INT8, NF4, LOW = ({"name": name} for name in ("topk", "int8", "nf4", "lowrank"))
WRONG: list[tuple[dict[str, Any], dict[str, torch.Tensor | None], str]] = [
    (TOPK, {"codec__values": None}, "has indices, the first odd one values"),
    (TOPK, {"codec__rogue": torch.zeros(1)}, "the first odd one rogue"),
    (TOPK, {"codec__values": torch.zeros(3)}, r"values in float32 \[3\], not float32 \[24\]"),
    (TOPK, {"codec__values": torch.zeros(4, 6)}, r"values in float32 \[4, 6\], not float32 \[24\]"),
    (TOPK, {"codec__values": torch.zeros(24).double()}, "values in float64"),
    (TOPK, {"codec__values": torch.full((24,), math.nan)}, "NaN or infinity in the values of a"),
    (TOPK, {"codec__indices": torch.full((24,), 65535).to(torch.uint16)}, "in a indices that do not rise"),
    (TOPK, {"codec__known": torch.tensor([0, 0, 1], dtype=torch.int32)}, "places that do not rise"),
    (TOPK, {"codec__known": torch.tensor([0, 1, 9], dtype=torch.int32)}, "places that do not rise"),
    (TOPK, {"codec__known": torch.tensor([-1, 1, 2], dtype=torch.int32)}, "places that do not rise"),
    (TOPK, {"codec__known": torch.arange(9, dtype=torch.int32)}, r"encodes \[9\] tensors of 4"),
    (TOPK, {"codec__known": torch.zeros(2)}, r"encodes \[2\] tensors of 4"),
    (TOPK, {"codec__known": torch.tensor([0], dtype=torch.int32)}, r"values in float32 \[24\], not float32 \[3\]"),
    (TOPK, {"a": torch.zeros(8, 33)}, "has a twice"),
    (TOPK, {"new": torch.zeros(6, 7).double()}, "has new in float64, not float32"),
    (INT8, {"codec__scales": torch.full((12,), math.inf)}, "NaN or infinity in the scales of a"),
    (INT8, {"new": torch.zeros(6, 7)}, "has new as it is, not encoded"),
    (INT8, {"new": torch.zeros(())}, "has new as it is, not encoded"),
    (INT8, {"new": torch.empty(0, 10**9, 10**9)}, r"codes in int8 \[2311\], not int8 \[1000000000000002269\]"),
    (NF4, {"codec__codes": torch.zeros(7, dtype=torch.uint8)}, "codes in uint8"),
    (LOW, {"codec__p": torch.full((96,), math.nan)}, "NaN or infinity in the p of a"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "changes", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_malformed_messages_are_refused(
    codec: dict[str, Any], changes: dict[str, torch.Tensor | None], says: str
) -> None:
    with pytest.raises(UnfitUpdate, match=says):
        encoding(codec).decode(tampered(codec, **changes), order())


def test_a_message_that_is_not_encoded_at_all_is_refused() -> None:
    for codec in SETTINGS:
        with pytest.raises(UnfitUpdate):
            encoding(codec).decode(update(), order())
        with pytest.raises(UnfitUpdate):
            encoding(codec).decode(Message(), order())
