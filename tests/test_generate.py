"""`fedpipe generate`: what transformers and peft alone answer, of every kind of method; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from refusals import assert_refused
from runs import emulated, here, labelled, tiny_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedpipe_ray.data.prompted import Prompter
from fedpipe_ray.errors import UserError
from fedpipe_ray.generate import printable
from fedpipe_ray.model import load_tokenizer
from fedpipe_ray.settings import Data, Model

PROMPTS = ("red green blue", "four one south")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The tiny Llama with larger weights, so that it answers words, and room for 40 tokens."""
    folder = tmp_path_factory.mktemp("talkative")
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(
        model_dir, initializer_range=0.5, tie_word_embeddings=False, max_position_embeddings=40
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, talkative: Path, data_dir: Path) -> Path:
    return tiny_run(tmp_path_factory.mktemp("generate"), talkative, data_dir)


@pytest.fixture(scope="module")
def run(file: Path) -> Path:
    """The folder of a run of LoRA, two rounds."""
    assert here("run", file, "--out", file.parent / "run") == 0
    return file.parent / "run"


def given(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What --json prints."""
    capsys.readouterr()
    assert here("generate", *arguments, "--json") == 0
    return list(json.loads(capsys.readouterr().out))


def by_hand(model: Any, folder: Path, prompt: str, count: int) -> dict[str, Any]:
    """Greedy tokens, one at a time, until <eos>."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, new = tokenizer(prompt).input_ids, list[int]()
    while len(new) < count and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    ended = new[-1] == tokenizer.eos_token_id
    return {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new), "ended": ended}


def test_answers_are_greedy(run: Path, talkative: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = given(capsys, run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", 6)
    plain = AutoModelForCausalLM.from_pretrained(talkative).eval()
    assert [pair["base"] for pair in found] == [by_hand(plain, talkative, prompt, 6) for prompt in PROMPTS]
    tuned = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    assert [pair["tuned"] for pair in found] == [by_hand(tuned, talkative, prompt, 6) for prompt in PROMPTS]
    assert [pair["text"] for pair in found] == list(PROMPTS)  # the template is {question} alone
    assert found[0]["base"] != found[0]["tuned"]


def test_sampling_repeats_with_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = (run, "--prompt", PROMPTS[0], "--max-new-tokens", 12, "--temperature", 3)
    one, again, other = (given(capsys, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_plain_text_and_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    capsys.readouterr()
    assert here("generate", run, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3) == 0
    said = capsys.readouterr().out
    assert f"{run}: round 2 of 2\n" in said
    assert [line for line in said.splitlines() if line.startswith("prompt: ")] == [f"prompt: {p}" for p in PROMPTS]
    assert said.count("\nbase") == said.count("\ntuned") == 2
    assert "\x1b" not in said


def test_a_run_in_progress_has_its_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("summary.json", "adapter", "round-0002"))
    capsys.readouterr()
    assert here("generate", folder, "--prompt", PROMPTS[0]) == 0
    said = capsys.readouterr().out
    assert f"{folder}: round 1 of 2; the run has not ended, this is its checkpoint" in said


OTHERS = [
    "{name: fedkseed, tau: 2, seeds: 8}", "{name: prompt, tokens: 2}", "{name: fedadapter, trial_every: 2}",
    "{name: bitfit}",
]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        "{name: full}",
        "{name: prefix, tokens: 2}",
        *[pytest.param(one, marks=pytest.mark.services) for one in OTHERS],
    ],
)
def test_other_methods(method: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answers, and the base model's part is the same whatever stands beside it."""
    changes = ["local.steps=1", "rounds=1", "evaluate.every=0", "evaluate.rows=2"]
    if "bitfit" in method:
        changes.append(f"model.name={biased(file, tmp_path)}")
    assert here("run", file, f"method={method}", *changes, "--out", tmp_path / "run") == 0
    (pair,) = given(capsys, tmp_path / "run", "--prompt", PROMPTS[0], "--max-new-tokens", 4)
    folder = Path(changes[-1].partition("=")[2]) if "bitfit" in method else Path(model_of(file))
    assert pair["base"] == by_hand(AutoModelForCausalLM.from_pretrained(folder).eval(), folder, PROMPTS[0], 4)
    assert 1 <= pair["tuned"]["tokens"] <= 4


def model_of(file: Path) -> str:
    return file.read_text().partition("model: {name: ")[2].partition("}")[0]


def biased(file: Path, tmp_path: Path) -> Path:
    """The same model with biases."""
    source, folder = Path(model_of(file)), tmp_path / "biased"
    folder.mkdir()
    for one in source.glob("tokenizer*"):
        shutil.copy(one, folder)
    config = AutoConfig.from_pretrained(source, attention_bias=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_fedbiot_answers_with_the_plugged_adapter(
    file: Path, deep_dir: Path, public_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first view: the whole model with the adapter that the edges trained, which is what it exports."""
    changes = [*emulated(deep_dir, public_file), "rounds=1", "local.steps=2"]
    assert here("run", file, *changes, "--out", tmp_path / "run") == 0
    (pair,) = given(capsys, tmp_path / "run", "--prompt", PROMPTS[0], "--max-new-tokens", 3)
    plain = AutoModelForCausalLM.from_pretrained(deep_dir).eval()
    assert pair["base"] == by_hand(plain, deep_dir, PROMPTS[0], 3)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    assert pair["tuned"] == by_hand(tuned, deep_dir, PROMPTS[0], 3)


def test_each_edge_its_own(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers of an edge are those of the adapter that `export --edge` writes."""
    folder = tmp_path / "run"
    assert here("run", file, "method.name=fedsa_lora", "--out", folder) == 0
    assert_refused(
        capsys, "generate", folder, "--prompt", "red", says="fedsa_lora has no model for all edges, each has its own; "
        "fedpipe generate takes --edge, of a, b, c",
    )  # fmt: skip
    assert_refused(capsys, "generate", folder, "--prompt", "red", "--edge", "x", says="--edge x: there is no such edge")
    assert here("export", folder, "--edge", "b", "--out", tmp_path / "b") == 0
    (pair,) = given(capsys, folder, "--edge", "b", "--prompt", PROMPTS[0], "--max-new-tokens", 6)
    source = Path(model_of(file))
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "b").eval()
    assert pair["tuned"] == by_hand(tuned, source, PROMPTS[0], 6)


def test_classes_have_probabilities(
    file: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert here("run", file, labelled(data_dir), "--out", folder) == 0
    row = json.dumps({"question": PROMPTS[0], "answer": "red"})
    (pair,) = given(capsys, folder, "--prompt", row)
    assert here("export", folder, "--merge", "--out", tmp_path / "merged") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")(f"{PROMPTS[0]} red", return_tensors="pt")
    with torch.no_grad():
        shares = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits[0].softmax(-1)
    expected = {model.config.id2label[i]: float(share) for i, share in enumerate(shares)}
    assert pair["tuned"] == pytest.approx(expected, abs=1e-5)
    assert sum(pair["base"].values()) == pytest.approx(1, abs=1e-5)
    assert pair["base"] != pair["tuned"]
    assert_refused(
        capsys, "generate", folder, "--prompt", PROMPTS[0], says="the run's template has the columns question, answer; "
        "write --prompt '{\"question\": \"...\", \"answer\": \"...\"}', or use --raw",
    )  # fmt: skip
    capsys.readouterr()
    assert here("generate", folder, "--prompt", PROMPTS[0], "--raw") == 0
    said = capsys.readouterr().out
    assert all(f"\n{label} " in said for label in model.config.id2label.values())


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, says in (
        ((tmp_path, "--prompt", "red"), f"{tmp_path} is not a run folder"),
        ((run,), "no prompt; write --prompt TEXT"),
        ((run, "--prompt", "red", "--prompt", " "), "a prompt is empty; write --prompt TEXT"),
        ((run, "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read: No such file"),
        ((run, "--prompts", tmp_path / "empty.txt"), "empty.txt: holds no prompt"),
        ((run, "--prompt", "red", "--edge", "a"), "--edge a: lora has one result for all edges; leave it out"),
        ((run, "--prompt", "red " * 45), "has 45 tokens, 6 more than the model's context of 40 has room for"),
    ):
        assert_refused(capsys, "generate", *arguments, says=says)
    for option in (("--temperature", "-1"), ("--temperature", "hot"), ("--max-new-tokens", "0"), ("--seed", "x")):
        with pytest.raises(SystemExit) as end:
            here("generate", run, "--prompt", "red", *option)
        assert end.value.code == 2
        assert f"argument {option[0]}: '{option[1]}' must be a" in capsys.readouterr().err


def test_answers_end_where_positions_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pair,) = given(capsys, run, "--prompt", "red " * 38, "--max-new-tokens", 30)
    assert pair["base"]["tokens"] <= 2


def test_prompts_of_chats_and_code(talkative: Path) -> None:
    """Words are the user's turn, up to where the assistant's begins; braces may be no JSON."""
    tokenizer = load_tokenizer(Model(name=str(talkative)))
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = Prompter(Data(source="x.jsonl", messages="chat"), tokenizer, [], raw=False)
    assert chat.text("one two") == "<user>one two<assistant>"
    turns = [{"role": "system", "content": "red"}, {"role": "user", "content": "blue"}]
    assert chat.text(json.dumps(turns)) == "<system>red<user>blue<assistant>"
    plain = Prompter(Data(source="x.jsonl", prompt="Q: {q}\nA:", response="{a}"), tokenizer, [], raw=False)
    assert plain.text("{ return 1; }") == "Q: { return 1; }\nA:"
    assert plain.text('{"q": "one"}') == "Q: one\nA:"
    assert plain.tokens("one") == tokenizer("one").input_ids
    fixed = Prompter(Data(source="x.jsonl", prompt="Go:", response="{a}"), tokenizer, [], raw=False)
    with pytest.raises(UserError, match="names no column; use --raw"):
        fixed.text("one")


def test_escape_sequences_are_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\n\u202ec") == "a\ufffd[2Jb\n\ufffdc"
