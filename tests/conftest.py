"""Settings for every test, made before anything imports ray or torch; what the caller has already set stays."""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fedbiot_made import Here
    from runs import Started

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor with num_gpus=0 sees no GPU
    "RAY_AUTH_MODE": "disabled",  # no token file in HOME
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every listener on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
CACHE = tempfile.mkdtemp(prefix="fp-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE  # nothing of the user's is read or written

settings.register_profile("fedpipe", deadline=None, derandomize=True)  # slow machines pass, and results repeat
settings.load_profile("fedpipe")


def pytest_unconfigure() -> None:
    """Removes the tests' cache."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread before each test and its fixtures: thread counts change bits. Does not itself import torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


WORDS = [
    *["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "red", "green", "blue"],
    "north",
    "south",
]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 32 with a word tokenizer, in plain Hugging Face layout."""
    return make_model(tmp_path_factory.mktemp("model"), 2)


@pytest.fixture(scope="session")
def deep_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 8 layers."""
    return make_model(tmp_path_factory.mktemp("deep"), 8)


def make_model(folder: Path, layers: int) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, tie_word_embeddings=True, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{edge}.jsonl for edges a, b, c: prompts of three words, answered by a rule that a tiny model can learn."""
    folder = tmp_path_factory.mktemp("data")
    for edge, seed in (("a", 0), ("b", 1), ("c", 2)):
        write_rows(folder / f"{edge}.jsonl", seed)
    return folder


@pytest.fixture(scope="session")
def public_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of the server, of the same kind."""
    file = tmp_path_factory.mktemp("public") / "public.jsonl"
    write_rows(file, 3)
    return file


def write_rows(file: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = []
    for _ in range(40 + 20 * seed):
        words = draw.choices(WORDS, k=3)
        rows.append({"question": " ".join(words), "answer": words[0], "kind": "xyz"[draw.randrange(3)]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_file(tmp_path: Path, model_dir: Path, data_dir: Path) -> Path:
    """A run of three edges with data of their own, two rounds, in this process."""
    from runs import tiny_run

    return tiny_run(tmp_path, model_dir, data_dir)


@pytest.fixture
def needs(deep_dir: Path, public_file: Path) -> list[str]:
    """What `fedbiot` needs beside `run_file`."""
    from runs import emulated

    return emulated(deep_dir, public_file)


@pytest.fixture
def fedbiot(run_file: Path, needs: list[str]) -> "Callable[..., Here]":
    """Makes a run of `fedbiot` with changed settings."""
    from fedbiot_made import opened

    return partial(opened, run_file, needs)


@pytest.fixture
def started(tmp_path: Path) -> Iterator["Started"]:
    """A run in a process that does not outlive the test."""
    from runs import Started

    one = Started(tmp_path)
    yield one
    if hasattr(one, "process"):
        one.kill()


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One private Ray on loopback for all tests of this process, in a temporary folder of its own."""
    folder = tempfile.mkdtemp(prefix="fp-", dir="/tmp")  # short: Ray puts sockets in it
    os.environ["RAY_TMPDIR"] = folder
    import ray

    from actors.connect import connect

    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [path]), str(Path(__file__).parent)])  # of the workers
    connect("local")
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short folder for Ray's sockets; processes that still belong to it at the end are ended by their ids."""
    folder = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    yield folder
    from runs import belonging

    for process in belonging(folder):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `services` what test_contract.py runs on Ray of methods that are like another one there."""
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.name == "test_contract.py" and chosen.get("fleet") == "packed":
            module: Any = item.getparent(pytest.Module).obj
            if chosen["run"] not in module.ON_RAY:
                item.add_marker(pytest.mark.services)
