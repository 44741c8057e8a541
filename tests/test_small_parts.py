"""`head`, `bitfit`, `prompt`, `prefix`: what they train, send and cost by hand; exports that plain libraries load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from refusals import assert_refused
from runs import assert_same, here, labelled, load, opened_run
from safetensors.torch import load_file
from test_export import MODELS, SMALL, TOKENS, architecture, logits, model_folder, trained
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_ray import subset, virtual
from fedpipe_ray.costs import matmul_parameters, training_flops
from fedpipe_ray.evaluate import combine
from fedpipe_ray.message import Message
from fedpipe_ray.randomness import rng_for
from fedpipe_ray.report import Report
from fedpipe_ray.run import rounds_of
from fedpipe_ray.site import Site, attempt
from fedpipe_ray.views import first_view

HEAD, BITFIT = "method={name: head}", "method={name: bitfit}"
PROMPT, PREFIX = "method={name: prompt, tokens: 5}", "method={name: prefix, tokens: 5}"
LINEAR = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # weights of the tiny Llama's layers
VOCABULARY = 18 * 32  # of its tied embedding and head
GPT2 = 25 * 32 + 2 * 12 * 32 * 32  # the same of the tiny GPT-2
BIASES = 2 * (32 + 96 + 32 + 32 + 128 + 32) + 32  # its norms, c_attn, c_proj, norm, c_fc, c_proj in two layers; a norm
MODELS["bert-lm"] = lambda: transformers.BertLMHeadModel(
    transformers.BertConfig(
        **SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, is_decoder=True
    )
)  # whose output has one bias under two names


def attempted(run_file: Path, *overrides: str) -> tuple[Site, Message, Report, Message]:
    """(edge a, the first state, its report of round 0, its update)."""
    fleet, _, _, state = opened_run(run_file, *overrides)
    report, update = attempt(fleet.sites["a"], Message(state.tensors), 0)
    assert isinstance(report, Report), report
    assert update is not None
    return fleet.sites["a"], state, report, update


# -- what is trained and sent


def test_biases_alone_move_and_the_base_is_left_alone(run_file: Path, tmp_path: Path, model_dir: Path) -> None:
    base = model_folder("gpt2", tmp_path, model_dir)
    site, state, report, update = attempted(run_file, BITFIT, f"model.name={base}")
    plain = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert list(update.tensors) == [name for name in plain if name.endswith("bias")]
    assert update.payload_bytes == report.cost.bytes_up - update.header_bytes == 4 * BIASES
    assert_same(dict(state.tensors), {name: plain[name].detach() for name in update.tensors})
    assert all(not torch.equal(update.tensors[name], plain[name]) for name in update.tensors)
    assert_same(
        {n: p.detach() for n, p in site.base.model.named_parameters()}, {n: p.detach() for n, p in plain.items()}
    )
    model = subset.trainable(site.base, update.tensors)
    shared = {name for name, p in model.named_parameters() if p is dict(site.base.model.named_parameters())[name]}
    assert shared == plain.keys() - update.tensors.keys()
    assert report.cost.flops == report.cost.tokens * 4 * GPT2  # the first norm's bias comes before every weight


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_head_alone_moves(kind: str, run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path) -> None:
    """15 classes of 32 features. Llama's head sees every token, and nothing flows back from it: 2 FLOPs a weight."""
    base = model_folder(kind, tmp_path, model_dir)
    site, state, report, update = attempted(run_file, HEAD, labelled(data_dir), f"model.name={base}")
    expected = {"llama": ["score.weight"], "bert": ["classifier.weight", "classifier.bias"]}[kind]
    assert list(state.tensors) == list(update.tensors) == expected
    assert update.payload_bytes == 4 * 15 * (32 if kind == "llama" else 33)
    assert all(not torch.equal(update.tensors[name], state.tensors[name]) for name in expected)
    if kind == "llama":
        assert report.cost.flops == report.cost.tokens * (2 * LINEAR + 6 * 15 * 32)
    model = subset.trainable(site.base, update.tensors)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected


def test_bitfit_of_a_classifier_has_its_head_too(
    run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path
) -> None:
    base = model_folder("bert", tmp_path, model_dir)
    _, state, _, update = attempted(run_file, BITFIT, labelled(data_dir), f"model.name={base}")
    weights = [name for name in update.tensors if not name.endswith("bias")]
    assert weights == ["classifier.weight"]
    assert "bert.pooler.dense.bias" in update.tensors
    assert all(
        not torch.equal(update.tensors[name], state.tensors[name]) for name in ("classifier.weight", "classifier.bias")
    )


@pytest.mark.parametrize(("method", "more"), [(BITFIT, ()), (HEAD, ("labelled",))], ids=["bitfit", "head"])
def test_a_base_in_16_bits_is_trained_in_32(
    method: str, more: tuple[str, ...], run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path
) -> None:
    """With this rate no step is a bfloat16's; the model computes in bfloat16, and costs what it costs in 32 bits."""
    base = model_folder("gpt2" if method == BITFIT else "llama", tmp_path, model_dir)
    data = [labelled(data_dir)] if more else []
    settings = (method, f"model.name={base}", "model.dtype=bfloat16", "local.lr=1e-6", *data)
    site, state, report, update = attempted(run_file, *settings)
    assert {t.dtype for t in (*state.tensors.values(), *update.tensors.values())} == {torch.float32}
    moved = [(update.tensors[name] - before).abs().max() for name, before in state.tensors.items()]
    assert all(0 < float(change) <= 4.1e-6 for change in moved)  # four steps of Adam, each at most the rate
    model = subset.trainable(site.base, update.tensors)
    assert_same(subset.read(model), dict(update.tensors))
    whole = attempted(run_file, *settings[:2], *data)[2].cost
    assert report.cost.flops == whole.flops
    found = site.evaluate(Message(update.tensors), "test", 0 if more else 1)
    assert found["loss"] > 0
    plain = subset.SubsetWeights(update.tensors, site.task).merged(site.base)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(plain(input_ids=TOKENS % 18).logits, model(input_ids=TOKENS % 18).logits)


@pytest.mark.parametrize("method", [PROMPT, PREFIX], ids=["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_state_computes_as_words_before_the_row(
    method: str, kind: str, run_file: Path, tmp_path: Path, model_dir: Path
) -> None:
    fleet, own, server, state = opened_run(run_file, method, f"model.name={model_folder(kind, tmp_path, model_dir)}")
    words = virtual.words(server.base, 5, rng_for(0, 0, "start"))
    assert int(words.max()) < len(server.base.tokenizer)
    behind = logits_of(fleet.sites["a"].base.model, torch.cat([words.expand(2, -1), TOKENS], dim=1))
    model = first_view(server, state).on(server.base)
    assert float((logits(model)[:, -5:] - behind[:, -5:]).abs().max()) < 1e-5
    assert float((logits(server.base.model) - behind[:, -5:]).abs().max()) > 1e-3
    assert own.spec.count == 5


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=tokens).logits
    return found


def test_a_prompt_lengthens_every_row(run_file: Path) -> None:
    """5 x 32 numbers; 16 rows, each 5 tokens longer; a gradient goes through all frozen weights: 4 FLOPs."""
    site, state, report, update = attempted(run_file, PROMPT)
    passed = attempted(run_file, "method={name: lora, rank: 4, alpha: 8}")[2].cost.tokens
    assert report.cost.tokens == passed + 16 * 5
    assert report.cost.flops == report.cost.tokens * 4 * (LINEAR + VOCABULARY)
    assert update.payload_bytes == Message(state.tensors).payload_bytes == 4 * 5 * 32
    assert not torch.equal(update.tensors["prompt_embeddings"], state.tensors["prompt_embeddings"])
    assert sum(matmul_parameters(site.base.model)) == LINEAR + VOCABULARY
    assert all(not p.requires_grad for p in site.base.model.parameters())


def test_a_prefix_costs_keys_and_values(run_file: Path) -> None:
    """2 layers x (key + value) x 5 x 32 numbers; a token attends to 5 more places: 12 x 5 x 32 FLOPs a layer."""
    _, state, report, update = attempted(run_file, PREFIX)
    passed = attempted(run_file, "method={name: lora, rank: 4, alpha: 8}")[2].cost.tokens
    assert report.cost.tokens == passed
    assert report.cost.flops == passed * (4 * (LINEAR + VOCABULARY) + 2 * 12 * 5 * 32)
    assert update.payload_bytes == Message(state.tensors).payload_bytes == 4 * 2 * 2 * 5 * 32
    assert not torch.equal(update.tensors["prompt_embeddings"], state.tensors["prompt_embeddings"])


def test_uniform_prompts_lie_in_the_papers_range(run_file: Path) -> None:
    state = opened_run(run_file, "method={name: prompt, tokens: 50, init: uniform}")[3]
    drawn = state.tensors["prompt_embeddings"]
    assert 0.45 < float(drawn.abs().max()) <= 0.5
    assert abs(float(drawn.mean())) < 0.03  # 1600 numbers of spread 0.29: 0.007


def test_operations_after_a_trained_bias() -> None:
    """Of three layers of 4 x 4 the middle one's bias is trained: what stands before it, and it, only pass."""
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)]).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    assert matmul_parameters(model) == (32, 16, 0)
    assert training_flops(model, 10) == 10 * (2 * 32 + 4 * 16)


# -- what a run leaves


@pytest.mark.parametrize(("method", "kind"), [(PROMPT, "llama"), (PROMPT, "gpt2"), (PREFIX, "llama"), (PREFIX, "gpt2")])
def test_virtual_tokens_are_a_peft_adapter(
    method: str, kind: str, run_file: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "run", model_folder(kind, tmp_path, model_dir)
    ours, state = trained(
        folder, run_file, f"model.name={base}", method, "evaluate.generate=1", "evaluate.max_new_tokens=4"
    )
    expected = logits(ours)
    plain = AutoModelForCausalLM.from_pretrained(base)
    names = architecture(plain)
    adapted = peft.PeftModel.from_pretrained(plain, folder / "adapter")
    assert float((logits(plain) - expected[:, -5:]).abs().max()) > 0.01
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-6)
    assert architecture(plain) == names
    found = json.loads((folder / "summary.json").read_text())
    assert found["tuned"]["global"]["loss"] < found["base"]["global"]["loss"]
    assert found["tuned"]["global"]["generated"] == 3
    assert here("export", folder, "--out", tmp_path / "again") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / "adapter" / file).read_bytes()
    says = f"a {method.split()[1].strip(',')} is an input ... cannot be merged ... without --merge"
    assert_refused(capsys, "export", folder, "--merge", says=says, out=tmp_path / "merged")
    assert list(state.tensors) == ["prompt_embeddings"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [(BITFIT, "gpt2"), (BITFIT, "bert-lm"), (HEAD, "llama"), (HEAD, "distilbert"), (BITFIT, "bert")],
)
def test_parameters_load_into_the_plain_model(
    method: str, kind: str, run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, base, causal = tmp_path / "run", model_folder(kind, tmp_path, model_dir), kind in ("gpt2", "bert-lm")
    data = () if causal else (labelled(data_dir),)
    ours, _ = trained(folder, run_file, f"model.name={base}", method, *data, "rounds=1")
    shown = " ".join(capsys.readouterr().out.split())
    assert f'load_file("{folder}/parameters/parameters.safetensors"), strict=False' in shown
    expected = logits(ours)
    if causal:
        plain = AutoModelForCausalLM.from_pretrained(base)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=15)
    names = architecture(plain)
    assert float((logits(plain) - expected).abs().max()) > 1e-3
    found = plain.load_state_dict(load_file(folder / "parameters" / "parameters.safetensors"), strict=False)
    assert found.unexpected_keys == []
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-6)
    assert here("export", folder, "--merge", "--out", tmp_path / "merged") == 0
    merged = type(plain).from_pretrained(tmp_path / "merged")
    assert architecture(merged) == names
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)
    assert causal or merged.config.id2label[14] == "south"


@pytest.mark.parametrize("method", [HEAD, BITFIT, PROMPT, PREFIX], ids=["head", "bitfit", "prompt", "prefix"])
def test_updates_from_older_states_are_of_use(
    method: str, run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path
) -> None:
    """Buffers of two: edge c, half as fast, is a state behind when it comes; what comes out is better than the base."""
    base = model_folder("gpt2" if method == BITFIT else "llama", tmp_path, model_dir)
    data = [labelled(data_dir)] if method == HEAD else []
    run = load(run_file, method, *data, f"model.name={base}", "rounds=4", "fleet.mode=buffered", "fleet.buffer=2")
    fleet, own, server, _ = opened_run(run_file, method, *data, f"model.name={base}")
    rounds = list(rounds_of(run, own, fleet, server))
    assert max(done.number - one.base_round for done in rounds for one in done.reports) >= 1
    before = combine({name: one for name, one in fleet.evaluate(None, "validation").items() if isinstance(one, dict)})
    assert rounds[-1].quality["loss"] < before["loss"]


# -- refusals


def test_refusals(
    run_file: Path, tmp_path: Path, model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2, labels = f"model.name={model_folder('gpt2', tmp_path, model_dir)}", labelled(data_dir)
    for settings, says in (
        ((HEAD,), "head trains a classifier's head, and data.task is causal; ... or use method.name: lora"),
        ((BITFIT,), f"{model_dir} (LlamaForCausalLM) has no bias ... method.name: lora, prompt or full"),
        ((BITFIT, labels), "(LlamaForSequenceClassification) has no bias ... method.name: head or lora"),
        ((PROMPT, labels), "prompt is for data.task: causal; ... method.name: head, bitfit or lora"),
        ((PREFIX, labels), "prefix is for data.task: causal"),
        ((PREFIX, "local.checkpointing=true"), "local.checkpointing: true: a prefix ... or use method.name: prompt"),
        (("method={name: prompt, tokens: 0}",), "method.tokens: 0 must be at least 1"),
        (("method={name: prefix, tokens: 0}",), "method.tokens: 0 must be at least 1"),
        (("method={name: prompt, init: zeros}",), "method.init: 'zeros' is not valid ... 'words' or 'uniform'"),
        (
            ("method={name: prompt, tokens: 1020}", gpt2),
            "method.tokens: 1020 and data.max_length: 16 need 1036 positions of the model's 1024",
        ),
    ):
        assert_refused(capsys, "check", run_file, *settings, says=says)
    assert load(run_file, PROMPT).method["tokens"] == 5
