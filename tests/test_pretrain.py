"""builtin:tiny-llama on a model of 5 steps and a corpus of 60 files, both made for the test."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpipe_ray import pretrain
from fedpipe_ray.data.docstrings import PROMPT, RESPONSE
from fedpipe_ray.errors import Interrupted
from fedpipe_ray.model import load_tokenizer
from fedpipe_ray.pretrain import Muon, Recipe, builtin_model, packed, pretrained, recipe_hash, train_tokenizer
from fedpipe_ray.settings import Model

RECIPE = Recipe(
    corpus="spoken",
    vocabulary=400,
    hidden=32,
    layers=2,
    heads=2,
    intermediate=64,
    batch=4,
    tokens=32,
    steps=5,
    warmup_steps=2,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the corpus `spoken` on the path."""
    root = tmp_path / "site" / "spoken"
    root.mkdir(parents=True)
    for n in range(60):
        text = f'"""Module {n} counts."""\ndef count_{n}(a, b={n}):\n    """Count the {n} words between a and b."""\n'
        (root / f"m{n}.py").write_text(text)
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_runs_give_the_same_files(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pretrained(RECIPE)
    torch.rand(3)  # the caller's generator must not matter
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    second = pretrained(RECIPE)
    assert first != second
    assert contents(first) == contents(second)
    assert set(contents(first)) >= set(pretrain.FILES)


def test_the_tokenizer_is_there_before_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrain.RECIPES, "small", RECIPE)
    alone = load_tokenizer(Model(name="builtin:small"))
    assert not (cache / "fedpipe-ray" / "models").exists()
    pretrained(RECIPE)
    saved = load_tokenizer(Model(name="builtin:small"))
    assert type(alone) is type(saved)
    assert alone.get_vocab() == saved.get_vocab()
    text = "Count the words between a and b."
    assert alone(text)["input_ids"] == saved(text)["input_ids"]
    assert (alone.eos_token_id, alone.pad_token_id) == (saved.eos_token_id, saved.pad_token_id)


def test_a_stop_while_a_model_loads_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stopped)
    with pytest.raises(Interrupted):
        load_tokenizer(Model(name="."))


def test_the_folder_loads_as_any_model_does(cache: Path) -> None:
    folder = pretrained(RECIPE)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (0, 1, None)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), RECIPE.hidden)
    assert model.dtype == torch.float32
    prompt = tokenizer("def count(a) ->", return_tensors="pt")
    assert model(**prompt).logits.shape == (*prompt["input_ids"].shape, len(tokenizer))


def test_the_tokenizer_keeps_any_text_and_the_border_of_the_response(cache: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained(RECIPE))
    for text in ("  two  spaces\n\ttab ", "caf\u00e9 \u4e2d", "def f(*a, **k) -> x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for sentence in ("Count it.", "'quoted' first.", "-> arrow.", "*args are", "3 numbers"):
        row = {"signature": "f(a: int, *, b='x')", "sentence": sentence}
        parts = [tokenizer(part.format(**row))["input_ids"] for part in (PROMPT, RESPONSE)]
        assert tokenizer((PROMPT + RESPONSE).format(**row))["input_ids"] == parts[0] + parts[1]


def test_the_second_call_trains_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pretrained(RECIPE)
    monkeypatch.setattr(pretrain, "_make", None)
    assert pretrained(RECIPE) == first
    assert [path.name for path in (cache / "fedpipe-ray" / "models").iterdir()] == [first.name]


def test_an_interrupt_leaves_nothing_and_restores_threads_and_generator(cache: Path) -> None:
    def interrupt(step: int, steps: int, loss: float) -> None:
        if step == 1:
            raise KeyboardInterrupt

    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        pretrained(RECIPE, interrupt, threads=threads + 1)
    assert list((cache / "fedpipe-ray" / "models").iterdir()) == []
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_of_two_processes_the_first_to_finish_stands(cache: Path) -> None:
    inner: list[Path] = []

    def race(step: int, steps: int, loss: float) -> None:
        if step == 2 and not inner:
            inner.append(Path())
            inner[0] = pretrained(RECIPE)
            (inner[0] / "mark").touch()

    outer = pretrained(RECIPE, race)
    assert outer == inner[0]
    assert (outer / "mark").exists()
    assert list(outer.parent.iterdir()) == [outer]


def test_a_folder_with_a_missing_file_is_made_again(cache: Path) -> None:
    folder = pretrained(RECIPE)
    whole = contents(folder)
    (folder / "tokenizer.json").unlink()
    assert contents(pretrained(RECIPE)) == whole


def test_an_unwritable_cache_is_said(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME"):
        folder = pretrained(RECIPE)
    assert (folder / "model.safetensors").is_file()


def test_builtin_model_takes_steps_and_reports_them(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pretrain.RECIPES, "tiny-llama", replace(RECIPE, steps=99))
    seen: list[tuple[int, int, float]] = []
    folder = builtin_model(steps=30, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(done, 30) for done in range(1, 31)]
    assert seen[-1][2] < seen[0][2] - 1  # the loss falls
    assert folder.name == f"llama-{recipe_hash(replace(RECIPE, steps=30))}"


def test_an_unknown_model_is_named_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"'huge-llama'.*tiny-llama"):
        builtin_model("huge-llama")


def test_the_hash_sees_the_recipe_and_the_corpus(cache: Path, tmp_path: Path) -> None:
    hashes = [recipe_hash(RECIPE), recipe_hash(RECIPE), recipe_hash(replace(RECIPE, seed=1))]
    (tmp_path / "site" / "spoken" / "new.py").write_text('def f():\n    """Came afterwards."""\n')
    hashes.append(recipe_hash(RECIPE))
    assert len(hashes[0]) == 12
    assert len(set(hashes)) == 3


def test_batches_hold_every_document_once_before_any_twice() -> None:
    documents = [torch.tensor([n] * (n % 5 + 1)) for n in range(40)]  # 120 tokens
    recipe = replace(RECIPE, batch=2, tokens=15)
    batches = packed(documents, recipe)
    epoch = torch.cat([next(batches) for _ in range(4)])
    assert epoch.shape == (8, 15)
    assert torch.equal(epoch.flatten().sort().values, torch.cat(documents).sort().values)


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)])
def test_muon_is_that_of_torch_to_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    muon = Muon(ours, momentum=0.95, decay=0.1, newton_schulz_steps=4)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, ns_steps=4)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape)
            other.grad = mine.grad.clone()
        muon.step(0.02)
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


def test_the_vocabulary_is_the_same_every_time() -> None:
    texts = [f"count {n} words" for n in range(200)]
    assert train_tokenizer(texts, 300).get_vocab() == train_tokenizer(texts, 300).get_vocab()
