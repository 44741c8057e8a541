"""Models in 4 and 8 bits that a node keeps."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedpipe_ray import model as models
from fedpipe_ray.model import Base
from fedpipe_ray.packed import digest, source_of
from fedpipe_ray.settings import Model

TOKENS = torch.tensor([[3, 9, 17, 5, 10], [4, 4, 11, 12, 8]])  # [rows, length]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(folder: Path, bits: int, parcel: Any = None) -> Base:
    return Base.load(Model(name=str(folder)), "causal", [], 0, parcel, bits)


def kept(cache: Path) -> set[Path]:
    return {path.parent for path in cache.rglob("packed.json")}


def mapped_from(tensor: torch.Tensor) -> str:
    """The file whose mapping holds a tensor's memory; "" if none does."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, place = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= tensor.data_ptr() < high:
            return place if place.startswith("/") else ""
    return ""


@pytest.mark.parametrize("bits", [4, 8])
def test_a_kept_model_is_the_packed_one_and_its_memory_is_the_file(model_dir: Path, cache: Path, bits: int) -> None:
    fresh, _ = models._weights(Model(name=str(model_dir)), "causal", [], 0, bits, torch.device("cpu"), torch.float32)
    fresh = Base(fresh, models.load_tokenizer(Model(name=str(model_dir))), torch.device("cpu"), bits)
    first = loaded(model_dir, bits)
    second = loaded(model_dir, bits)
    (folder,) = kept(cache)
    for base in (first, second):
        found, expected = (dict(b.model.named_parameters()) for b in (base, fresh))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        weight = base.model.model.layers[0].mlp.up_proj.weight
        assert Path(mapped_from(weight)).parent == folder
    assert torch.equal(first.model(TOKENS).logits, second.model(TOKENS).logits)


def test_packing_lets_go_of_the_checkpoint(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """Whose pages would count as the process's until the next collection; GPT-2's layers hold it in cycles."""
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512)).save_pretrained(tmp_path)
    for file in model_dir.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gc.collect()
    gc.disable()
    try:
        base = loaded(tmp_path, 4)
        assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    assert base.bits == 4


def test_it_is_packed_once(model_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(model_dir, 4)
    monkeypatch.setattr(models, "_weights", lambda *_: pytest.fail("packed again"))
    loaded(model_dir, 4)
    with pytest.raises(pytest.fail.Exception):
        loaded(model_dir, 8)


def test_another_checkpoint_in_the_same_place_is_packed_anew(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for file in model_dir.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    loaded(place, 4)
    os.utime(place / "model.safetensors", ns=(1, 1))
    loaded(place, 4)
    assert len(kept(cache)) == 2


def test_a_damaged_file_is_packed_anew(model_dir: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = {name: tensor.clone() for name, tensor in loaded(model_dir, 4).model.named_parameters()}
    (folder,) = kept(cache)
    (folder / "model.safetensors").unlink()  # not overwritten: a mapping of it may still be alive
    (folder / "model.safetensors").write_bytes(b"x")
    again = dict(loaded(model_dir, 4).model.named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert "packed anew" in caplog.text


def test_a_shipped_model_is_known_by_its_weights(model_dir: Path, cache: Path) -> None:
    parcel = loaded(model_dir, 16).parcel()
    loaded(model_dir, 4, parcel)
    loaded(model_dir, 4, parcel)
    assert len(kept(cache)) == 1
    one = {"a": torch.tensor([1.0, 2.0])}
    assert digest(one) != digest({"b": one["a"]})
    assert digest(one) != digest({"a": torch.tensor([1.0, 3.0])})
    assert digest(one) == digest({"a": torch.tensor([1.0, 2.0])})


def test_a_node_that_can_keep_nothing_packs_for_itself(model_dir: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    base = loaded(model_dir, 4)
    assert base.bits == 4
    assert mapped_from(base.model.model.layers[0].mlp.up_proj.weight) == ""


def test_a_hub_model_without_a_commit_is_not_kept() -> None:
    assert source_of("nobody/nothing", None) is None
    assert source_of("nobody/nothing", "abc") == ["nobody/nothing", "abc"]
