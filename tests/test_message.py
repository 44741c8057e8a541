"""Message: what comes out of the wire and out of a file is what went in, and its bytes are counted exactly."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import pickle
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_ray.files import write_atomically
from fedpipe_ray.message import DTYPES, Message

KINDS = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def pickled(message: Message) -> tuple[bytes, list[bytes]]:
    """As Ray does it: a small pickle, and the tensors' buffers beside it."""
    buffers: list[pickle.PickleBuffer] = []
    small = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return small, [bytes(buffer.raw()) for buffer in buffers]


def unpickled(small: bytes, stored: Sequence[bytes]) -> Message:
    message = pickle.loads(small, buffers=stored)
    assert isinstance(message, Message)
    return message


def out_of_band(message: Message, _: Path) -> Message:
    return unpickled(*pickled(message))


def in_band(message: Message, _: Path) -> Message:
    return unpickled(pickle.dumps(message, protocol=5), [])


def old_protocol(message: Message, _: Path) -> Message:
    return unpickled(pickle.dumps(message, protocol=4), [])


def through_a_file(message: Message, folder: Path) -> Message:
    return Message.load(folder / "m.safetensors", message.save(folder / "m.safetensors"))


WAYS = [out_of_band, in_band, old_protocol, through_a_file]
ways = pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
Way = Callable[[Message, Path], Message]


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def assert_equal(one: Message, other: Message) -> None:
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert (tensor.dtype, tensor.shape) == (other.tensors[name].dtype, other.tensors[name].shape), name
        assert raw(tensor) == raw(other.tensors[name]), name
    assert one.numbers == other.numbers


@ways
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_dtype_and_layout_arrives_bit_for_bit(way: Way, kind: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).reshape(4, 6).to(kind)
    layouts = {
        "plain": values,
        "transposed": values.t(),
        "strided": values[::2, ::3],
        "expanded": values[:1].expand(5, 6),
        "scalar": values[1, 1],
        "none": values[:0],
        "flat none": values.new_empty(0),
    }
    assert_equal(way(Message(layouts), tmp_path), Message(layouts))


@ways
def test_awkward_values_arrive_bit_for_bit(way: Way, tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    back = way(Message({"odd": odd, "half": odd.bfloat16(), "parameter": parameter}), tmp_path)
    assert_equal(back, Message({"odd": odd, "half": odd.bfloat16(), "parameter": parameter.detach()}))
    assert not back.tensors["parameter"].requires_grad


@ways
def test_tensors_that_share_memory_arrive_as_they_are(way: Way, tmp_path: Path) -> None:
    """Tied weights, and views of one stack: safetensors by itself refuses to write them."""
    stack = torch.arange(12.0).reshape(3, 4)
    message = Message({"stack": stack, "same": stack, "row": stack[1], "column": stack[:, 1]})
    assert_equal(way(message, tmp_path), message)


@ways
def test_names_keep_their_order(way: Way, tmp_path: Path) -> None:
    """A method that draws a random number a tensor must go on after a resume as it would have without."""
    message = Message({"z": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64), "a": torch.zeros(9)})
    assert list(way(message, tmp_path).tensors) == ["z", "b", "a"]


@ways
@given(
    numbers=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False) | st.integers(-(2**53), 2**53), max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
)
def test_any_shapes_and_numbers_arrive(
    way: Way, numbers: dict[str, float], shapes: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {
        f"t{i}": torch.arange(math.prod(shape), dtype=torch.bfloat16).reshape(shape) for i, shape in enumerate(shapes)
    }
    message = Message(tensors, numbers)
    assert_equal(way(message, tmp_path_factory.getbasetemp()), message)


def test_nothing_is_copied_on_the_way_out_or_in() -> None:
    """The buffers handed to the object store are the tensors' own memory, and what is loaded looks into the store's."""
    message = Message({"a": torch.ones(300, 200), "b": torch.ones(70, dtype=torch.bfloat16), "c": torch.tensor(2.0)})
    buffers: list[pickle.PickleBuffer] = []
    small = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    assert len(small) < 1000
    for buffer, tensor in zip(buffers, message.tensors.values(), strict=True):
        sent = torch.frombuffer(buffer.raw(), dtype=torch.uint8)
        assert sent.data_ptr() == tensor.data_ptr()
        assert sent.numel() == tensor.numel() * tensor.element_size()
    stored = [bytearray(buffer.raw()) for buffer in buffers]
    back = pickle.loads(small, buffers=stored)
    for buffer, tensor in zip(stored, back.tensors.values(), strict=True):
        assert bool((tensor != 0).all())
        buffer[:] = bytes(len(buffer))
        assert bool((tensor == 0).all())


def test_a_copied_message_is_its_own() -> None:
    message = Message({"a": torch.ones(3)}, {"n": 1.0})
    other = copy.deepcopy(message)
    message.tensors["a"].zero_()
    assert other.tensors["a"].tolist() == [1, 1, 1]


def test_bytes_by_hand() -> None:
    """Payload: 6 x 4 + 5 x 2 + 1 x 8 + 0 = 42, and an expanded tensor as it is sent, 8 x 4 = 32.

    Header: names, dtypes, shapes and numbers as the JSON text below.
    """
    two = {
        "w": torch.zeros(2, 3),
        "h": torch.zeros(5, dtype=torch.bfloat16),
        "n": torch.tensor(1),
        "e": torch.zeros(0, 4),
    }
    assert Message(two).payload_bytes == 42
    assert Message({"x": torch.zeros(1).expand(2, 4)}).payload_bytes == 32
    message = Message({"w": torch.zeros(2, 3), "n": torch.tensor(1)}, {"k": 0.5})
    text = '[[["w", "float32", [2, 3]], ["n", "int64", []]], {"k": 0.5}]'
    assert message.header_bytes == len(text)
    assert message.total_bytes == 32 + len(text)
    assert Message().total_bytes == len("[[], {}]")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 5), max_size=3)), max_size=5))
def test_payload_is_what_leaves_the_pickle(specs: list[tuple[torch.dtype, list[int]]]) -> None:
    message = Message({str(i): torch.zeros(shape).to(kind) for i, (kind, shape) in enumerate(specs)})
    _, stored = pickled(message)
    assert message.payload_bytes == sum(map(len, stored))


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_leaves_integers_alone_and_copies_only_if_it_must(dtype: str) -> None:
    message = Message({"f": torch.tensor([1.5, 2.5]), "i": torch.tensor([3]), "b": torch.tensor([True])}, {"n": 1})
    cast = message.to(dtype)
    assert [t.dtype for t in cast.tensors.values()] == [DTYPES[dtype], torch.int64, torch.bool]
    assert cast.tensors["f"].tolist() == [1.5, 2.5]
    assert cast.tensors["i"] is message.tensors["i"]
    assert cast.numbers == {"n": 1}
    assert cast.to(dtype) is cast


# -- files


def test_a_file_is_a_function_of_its_message(tmp_path: Path) -> None:
    message = Message({"b": torch.ones(3), "a": torch.ones(2)}, {"x": 1.0, "y": 2.0})
    digests = {message.save(tmp_path / f"{i}.safetensors") for i in range(10)}
    assert digests == {hashlib.sha256((tmp_path / "0.safetensors").read_bytes()).hexdigest()}


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    digest = Message({"a": torch.ones(100)}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"m\.safetensors is damaged: its SHA-256 is not the recorded one"):
        Message.load(path, digest)
    for content in (b"", whole[:5], whole[:-1], whole + b"x", b"no safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.safetensors is damaged: "):
            Message.load(path)
    path.write_bytes(whole)
    assert Message.load(path, digest).tensors["a"].tolist() == [1.0] * 100


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Message.load(tmp_path / "none.safetensors")


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    Message({"a": torch.ones(2, dtype=torch.bfloat16)}, {"n": 3}).save(tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["a"].dtype == torch.bfloat16


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """A folder that stands where the file should go, and with something in it."""
    path = tmp_path / "there" / "m.safetensors"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"m\.safetensors"):
        Message({"a": torch.ones(3)}).save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["m.safetensors"]
    assert [entry.name for entry in path.iterdir()] == ["inside"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write stops in the middle with an error."""
    path = tmp_path / "m.safetensors"
    digest = Message({"a": torch.ones(3)}).save(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Message({"a": torch.ones(1 << 20)}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Message.load(path, digest).tensors["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text"
    write_atomically(path, "naïve")
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert os.listdir(path.parent) == ["text"]
