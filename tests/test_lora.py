"""Adapters by name, in and out of models; and FedIT's average of them against numbers derived by hand."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from toys import CPU, PAD, classifier, llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from fedpipe_ray import lora
from fedpipe_ray.costs import Cost
from fedpipe_ray.errors import UserError
from fedpipe_ray.lora import LoraSpec
from fedpipe_ray.message import Message
from fedpipe_ray.methods.base import weighted_mean
from fedpipe_ray.model import Base
from fedpipe_ray.report import Lost, Report

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
TOKENS = torch.tensor([[3, 4, 5, 6]])
Tensors = Mapping[str, torch.Tensor]


def report(edge: str, weight: float, fetch: Tensors | Callable[[], Message]) -> Report:
    return Report(edge, 0, weight, 0.0, Cost(), fetch=fetch if callable(fetch) else lambda: Message(fetch))


def mean_of(state: Tensors, reports: Sequence[Report | Lost]) -> dict[str, torch.Tensor]:
    return dict(weighted_mean(Message(state), reports).tensors)


# -- the average


@pytest.mark.parametrize("weight", [1.0, 16.0])
def test_equal_clients_that_hold_1_2_3_average_to_2(weight: float) -> None:
    """A misspelt variable in a public FedIT gives p_0 times client 0 instead: 1/3."""
    state = {A: torch.zeros(2, 3)}
    reports = [report(str(k), weight, {A: torch.full((2, 3), float(k))}) for k in (1, 2, 3)]
    assert mean_of(state, reports)[A].tolist() == [[2.0] * 3] * 2


def test_weights_by_hand() -> None:
    """Samples 10, 30, 60: A = 0.1 x 1 + 0.3 x 2 + 0.6 x 4 = 3.1; B = 0.1 x 10 - 0.3 x 10 + 0 = -2."""
    held = [(10, 1.0, 10.0), (30, 2.0, -10.0), (60, 4.0, 0.0)]
    reports = [report(str(n), n, {A: torch.tensor([a]), B: torch.tensor([b])}) for n, a, b in held]
    mean = mean_of({A: torch.zeros(1), B: torch.zeros(1)}, reports)
    assert (mean[A].item(), mean[B].item()) == pytest.approx((3.1, -2.0), rel=1e-6)


@given(
    samples=st.lists(st.integers(1, 500), min_size=1, max_size=5), rank=st.integers(1, 3), rows=st.integers(1, 5),
    columns=st.integers(1, 5), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_residual_of_fedit(samples: list[int], rank: int, rows: int, columns: int, seed: int) -> None:
    """sum p_k B_k A_k - B A = sum p_k (B_k - B)(A_k - A), if and only if A and B are the p-weighted means."""
    draw = torch.Generator().manual_seed(seed)
    factors = [(torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)) for _ in samples]
    reports = [report(str(k), n, {A: factors[k][0], B: factors[k][1]}) for k, n in enumerate(samples)]
    mean = mean_of({A: torch.zeros(rank, columns), B: torch.zeros(rows, rank)}, reports)
    a, b = mean[A].double(), mean[B].double()
    shares = [n / sum(samples) for n in samples]
    wanted = sum(p * b_k.double() @ a_k.double() for p, (a_k, b_k) in zip(shares, factors, strict=True))
    residual = sum(p * (b_k.double() - b) @ (a_k.double() - a) for p, (a_k, b_k) in zip(shares, factors, strict=True))
    assert torch.allclose(wanted - b @ a, torch.as_tensor(residual), atol=1e-5)
    if len(samples) == 1:
        assert torch.allclose(wanted, b @ a, atol=1e-5)


def test_updates_are_held_one_at_a_time() -> None:
    """Whatever the number of edges: when one is fetched, those before it are gone, tensors and all."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def fetch() -> Message:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        message = Message({A: torch.ones(4)})
        alive.extend((weakref.ref(message), weakref.ref(message.tensors[A])))
        return message

    def arriving() -> Iterator[Report]:
        for k in range(5):
            yield report(str(k), 1.0, fetch)

    mean = weighted_mean(Message({A: torch.zeros(4)}), arriving())
    assert mean.tensors[A].tolist() == [1.0] * 4
    assert len(alive) == 10
    assert most == 0


def test_halves_are_summed_in_float32() -> None:
    """2049 edges with 1 each: bfloat16 would stop counting at 256, float16 at 2048."""
    for dtype in (torch.bfloat16, torch.float16):
        reports = [report(str(k), 1.0, {A: torch.ones(1, dtype=dtype)}) for k in range(2049)]
        mean = mean_of({A: torch.zeros(1)}, reports)[A]
        assert (mean.dtype, mean.item()) == (torch.float32, 1.0)


def gone() -> Message:
    raise ConnectionError("node b is gone\nwith a long story")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({A: torch.ones(2)}, f"its update differs from the state in 1 tensors, the first {B}"),
        ({A: torch.ones(2), B: torch.ones(1), "x": torch.ones(1)}, "in 1 tensors, the first x"),
        ({A: torch.ones(1, 2), B: torch.ones(1)}, rf"its update has {A} in shape [1, 2], not [2]"),
        ({A: torch.tensor([1, math.nan]), B: torch.ones(1)}, f"its update has NaN or infinity in {A}"),
        ({A: torch.ones(2), B: torch.tensor([-math.inf])}, f"its update has NaN or infinity in {B}"),
        (gone, "its update was lost on the way: ConnectionError: node b is gone"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_named(bad: Any, reason: str) -> None:
    """The mean is that of the other two, of weights 1 and 3: (1 + 3 x 5) / 4 = 4."""
    state = {A: torch.zeros(2), B: torch.zeros(1)}
    fine = [report(str(n), n, {A: torch.full((2,), v), B: torch.full((1,), v)}) for n, v in ((1, 1.0), (3, 5.0))]
    culprit = report("bad", 100, bad)
    mean = mean_of(state, [Lost("far", "gone"), fine[0], culprit, fine[1]])
    assert mean[A].tolist() == [4.0, 4.0]
    assert mean[B].tolist() == [4.0]
    assert culprit.rejected is not None
    assert reason in culprit.rejected
    assert culprit.rejected.count("\n") == 0
    assert [one.rejected for one in fine] == [None, None]


def test_without_a_usable_report_the_state_stands() -> None:
    state = Message({A: torch.ones(2)}, {"clock": 3.0})
    reports = [Lost("a", "gone"), report("b", 5, gone)]
    assert weighted_mean(state, reports) is state
    after = weighted_mean(state, [report("a", 1, {A: torch.zeros(2)})])
    assert (after.tensors[A].tolist(), after.numbers) == ([0, 0], {"clock": 3.0})


# -- a fresh adapter


def test_a_fresh_adapter_starts_as_lora_does() -> None:
    """B zero; A uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt 5), of standard deviation 1/sqrt(3 d_in)."""
    shapes = {A: (16, 400), B: (300, 16), "head.weight": (3, 4)}
    fresh = lora.initial(shapes, torch.Generator().manual_seed(0))
    assert {name: tuple(t.shape) for name, t in fresh.items()} == shapes
    assert not fresh[B].any()
    assert 0.0499 < float(fresh[A].abs().max()) <= 0.05
    assert float(fresh[A].std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
    again = lora.initial(shapes, torch.Generator().manual_seed(0))
    other = lora.initial(shapes, torch.Generator().manual_seed(1))
    assert torch.equal(fresh[A], again[A])
    assert not torch.equal(fresh[A], other[A])


# -- in and out of a model


def adapter(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=draw) * 0.1 for name, p in lora.parameters(model).items()}


def test_what_is_loaded_is_read() -> None:
    model = lora.inject(llama(), LoraSpec(2, 4, ("q_proj", "down_proj")))
    tensors = adapter(model)
    lora.load(model, tensors)
    back = lora.read(model)
    assert list(back) == list(lora.parameters(model))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    lora.load(model, {name: tensor * 0 for name, tensor in tensors.items()})
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)  # a copy, not a view


def test_names_are_those_of_peft() -> None:
    for model, task in ((llama(), "causal"), (classifier(), "classification")):
        ours = lora.inject(model, LoraSpec(2, 4, ("v_proj",), task=task))
        theirs = peft.get_peft_model_state_dict(ours)
        assert lora.read(ours).keys() == theirs.keys()


@pytest.mark.parametrize("change", ["missing", "further", "renamed"])
def test_other_names_are_refused(change: str) -> None:
    model = lora.inject(llama(), LoraSpec(2, 4, ("v_proj",)))
    before, tensors = lora.read(model), adapter(model)
    first = min(tensors)
    odd = first if change != "further" else "another"
    if change == "further":
        tensors[odd] = torch.zeros(1)
    else:
        moved = tensors.pop(odd)
        if change == "renamed":
            tensors["z"] = moved
    count = 2 if change == "renamed" else 1
    with pytest.raises(ValueError, match=f"adapter and model differ in {count} tensors, the first {odd}"):
        lora.load(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.read(model).items())


def test_another_rank_is_refused_whole() -> None:
    model = lora.inject(llama(), LoraSpec(2, 4, ("v_proj",)))
    before = lora.read(model)
    with pytest.raises(ValueError, match=r"lora_A\.weight: shape \[3, 32\], the model has \[2, 32\]"):
        lora.load(model, adapter(lora.inject(llama(), LoraSpec(3, 4, ("v_proj",)))))
    last = list(before)[-1]
    with pytest.raises(ValueError, match=rf"{last}: shape \[9\]"):
        lora.load(model, {**adapter(model), last: torch.zeros(9)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.read(model).items())


def test_a_target_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match=r"no module query; there are down_proj, gate_proj, .*q_proj"):
        lora.inject(llama(), LoraSpec(2, 4, ("q_proj", "query")))
    with pytest.raises(UserError, match=r"method\.targets: "):
        lora.inject(llama(), LoraSpec(2, 4, ("input_layernorm",)))


@pytest.mark.parametrize("task", ["causal", "classification"])
def test_the_base_stays_the_base(task: str) -> None:
    """Adapters of two shapes come and go, random weights in them; a classifier's head is trained whole."""
    base = Base(llama() if task == "causal" else classifier(), SimpleNamespace(pad_token_id=PAD), CPU)
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    logits = base.model(TOKENS).logits
    one, other = LoraSpec(2, 4, ("q_proj",), task=task), LoraSpec(4, 4, ("v_proj", "o_proj"), task=task)
    first = lora.attach(base, one)
    assert lora.attach(base, one) is first
    lora.load(first, adapter(first))
    assert not torch.allclose(first(TOKENS).logits, logits, atol=1e-3)
    with first.disable_adapter():
        assert torch.equal(first(TOKENS).logits, logits)
    second = lora.attach(base, other)
    assert list(base.attached) == [(other, None)]
    assert torch.equal(second(TOKENS).logits, logits)
    lora.load(second, adapter(second))
    lora.detach(base)
    assert base.attached == {}
    assert torch.equal(base.model(TOKENS).logits, logits)
    assert {name: tensor.shape for name, tensor in base.model.state_dict().items()} == {
        n: w.shape for n, w in weights.items()
    }
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# -- files


def test_a_saved_adapter_is_the_same_file_every_time(tmp_path: Path) -> None:
    files = []
    names = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj")
    for i, targets in enumerate((names, names[::-1])):
        spec = LoraSpec(2, 4, targets)
        model = lora.inject(llama(), spec)
        lora.save_adapter(tmp_path / str(i), spec, model, adapter(model), "some/model")
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(files[0]["adapter_config.json"])  # PEFT has a set there, whose order changes with the process
    assert config["target_modules"] == sorted(names)
    assert list(config) == sorted(config)


@pytest.mark.parametrize("task", ["causal", "classification"])
@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("all-linear",)])
def test_peft_reads_a_saved_adapter(task: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    make = llama if task == "causal" else classifier
    spec = LoraSpec(3, 6.5, targets, dropout=0.1, task=task)
    ours = lora.inject(make(), spec)
    tensors = adapter(ours)
    lora.load(ours, tensors)
    lora.save_adapter(tmp_path, spec, lora.inject(make(), spec), tensors, "some/model")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(theirs.eval()(TOKENS).logits, ours.eval()(TOKENS).logits)
    assert not torch.equal(theirs(TOKENS).logits, make()(TOKENS).logits)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 6.5, "some/model")


# -- sizes

GPT2 = GPT2Config()  # 12 layers of width 768
BERT = BertConfig(is_decoder=True)  # 12 layers of width 768
LLAMA2 = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
QKVO = ("query", "key", "value", "attention.output.dense")


def trainable(model: Any, spec: LoraSpec) -> int:
    return sum(p.numel() for p in lora.parameters(lora.inject(model, spec)).values())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    ("config", "rank", "targets", "count"),
    [
        (BERT, 1, QKVO, 73_728),
        (GPT2, 1, ("attn.c_attn", "attn.c_proj"), 55_296),
        (LLAMA2, 1, ("q_proj", "k_proj", "v_proj", "o_proj"), 1_048_576),
        (LLAMA2, 8, ("q_proj", "v_proj"), 4_194_304),
    ],
    ids=["bert-base", "gpt2", "llama2-7b", "llama2-7b-qv"],
)
def test_trainable_parameters(config: Any, rank: int, targets: tuple[str, ...], count: int) -> None:
    """r (d_in + d_out) a module. BERT: 12 x 4 x (768 + 768); LLaMA2: 32 x 4 x 8192, and 32 x 2 x 8 x 8192.

    GPT-2 has one matrix for q, k and v: 12 x ((768 + 2304) + (768 + 768)).
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert trainable(model, LoraSpec(rank, 1, targets)) == count


def test_a_classifier_trains_its_head_too() -> None:
    """BERT with 2 classes: 73,728 as above, and 768 x 2 + 2 of the head."""
    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=2))
    assert trainable(model, LoraSpec(1, 1, QKVO, task="classification")) == 73_728 + 1_538
