"""Bad input through the command line: exit code 2, a message with value, limit and remedy, and nothing half-written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import assert_refused
from runs import ROOT, fedpipe

Refuse = Callable[..., str]

CLASSES = ("data.task=classification", "data.text='{question}'", "data.label=kind")


@pytest.fixture
def assert_run_refused(capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> Refuse:
    """`run` of the tiny run file with overrides, which must fail and leave no folder."""

    def check(says: str, *overrides: str, more: str = "") -> str:
        with run_file.open("a", encoding="latin-1") as file:
            file.write(more)
        return assert_refused(capsys, "run", run_file, *overrides, says=says, out=tmp_path / "out")

    return check


# -- the run file


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("ronds: 3", "unknown key ronds; did you mean rounds?"),
        ("zebra: 3", "unknown key zebra; known keys: data, evaluate, fleet"),
        ("3: 3", "unknown key 3; known keys: data"),
        ("rounds: 3", "tiny.yaml: key 'rounds' stands twice, again in line "),
        ("evaluate: {every: 1, every: 2}", "tiny.yaml: key 'every' stands twice"),
        ("track: [1, 2", "tiny.yaml is not valid YAML: ... line 1"),
        ("\ttrack: 1", "tiny.yaml is not valid YAML"),
        ("track: *nobody", "tiny.yaml is not valid YAML: found undefined alias 'nobody'"),
        ("track: !!python/object:os.system 3", "tiny.yaml is not valid YAML: could not determine a constructor"),
        ("[1, 2]: 3", "tiny.yaml is not valid YAML"),
        ("out: zwölf", "cannot read ... tiny.yaml: 'utf-8' codec can't decode byte"),
    ],
)
def test_run_file(more: str, says: str, assert_run_refused: Refuse) -> None:
    assert_run_refused(says, more=more)


@pytest.mark.parametrize("text", ["", "- rounds", "rounds"])
def test_run_file_without_keys(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    assert_refused(
        capsys, "run", tmp_path / "odd.yaml", says="odd.yaml holds ... not key: value lines", out=tmp_path / "out"
    )


def test_no_run_file(capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
    missing, out = tmp_path / "tinny.yaml", tmp_path / "out"
    assert_refused(capsys, "run", missing, says=f"no file {missing}; in that folder: {run_file}", out=out)
    assert_refused(capsys, "check", missing, says=f"no file {missing}; in that folder: {run_file}")
    assert_refused(capsys, "run", tmp_path, says=f"cannot read {tmp_path}: ... Is a directory", out=out)
    assert_refused(capsys, "run", run_file / "deeper.yaml", says="cannot read ... Not a directory", out=out)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        # keys that are not there
        ("local.stepz=3", "unknown key local.stepz; did you mean steps?"),
        ("locl.lr=3", "unknown key locl; did you mean local?"),
        ("fleet.edges.a.uplink=3", "unknown key fleet.edges.a.uplink; did you mean uplink_bps?"),
        ("fleet.edges.a.data={sorce: x}", "unknown key fleet.edges.a.data.sorce; did you mean source?"),
        ("server.data={sorce: x}", "unknown key server.data.sorce; did you mean source?"),
        ("method.rnk=3", "unknown key method.rnk; did you mean rank?"),
        ("data.partition.alfa=1", "unknown key data.partition.alfa; did you mean alpha?"),
        ("lr", "'lr' is not key=value; write for example local.lr=1e-3"),
        ("rounds.more=3", "'rounds.more=3': rounds is a value, not a section"),
        # types and choices
        ("rounds=many", "rounds: 'many' is not valid: input should be a valid integer"),
        ("rounds=true", "rounds: True is not valid: input should be a valid integer"),
        ("rounds=2.5", "rounds: 2.5 is not valid: input should be a valid integer"),
        ("local=3", "local: 3 is not valid: input should be a mapping"),
        ("fleet.edges=[a, b]", "fleet.edges: ['a', 'b'] is not valid: input should be a mapping"),
        ("fleet.edges.a=fast", "fleet.edges.a: 'fast' is not valid: input should be a mapping"),
        ("fleet.edges={}", "fleet: no edge; name a file in fleet.profiles (such as clusters/laptop.yaml)"),
        ("method=lora", "method: 'lora' is not valid: input should be a mapping"),
        ("method.rank=big", "method.rank: 'big' is not valid: input should be a valid integer"),
        ("data.labels=x", "data.labels: 'x' is not valid: input should be a list"),
        ("local.schedule=cosin", "local.schedule: 'cosin' is not valid: ... 'constant', 'linear' or 'cosine'"),
        ("local.lr=.nan", "local.lr: nan is not valid: input should be a finite number"),
        ("local.lr=.inf", "local.lr: inf is not valid: input should be a finite number"),
        # units
        ("fleet.edges.a.memory_bytes=4Gs", "memory_bytes: '4Gs' is not ... a quantity in byte; ... 4GiB"),
        ("fleet.edges.a.uplink_bps=20MB", "uplink_bps: '20MB' is not ... a quantity in bit/second; ... 20Mbit/s"),
        ("fleet.edges.a.latency_seconds=3B", "latency_seconds: '3B' is not ... a quantity in second; ... 30ms"),
        ("fleet.edges.a.compute_flops=5GB", "compute_flops: '5GB' is not ... a quantity in flop/second; ... 50GFLOP/s"),
        # limits
        ("rounds=0", "rounds: 0 must be at least 1"),
        ("seed=-1", "seed: -1 must not be negative"),
        ("fleet.fraction=0", "fleet.fraction: 0.0 must lie in (0, 1]"),
        ("fleet.fraction=1.5", "fleet.fraction: 1.5 must lie in (0, 1]"),
        ("fleet.edges.a.gpus=1.5", "fleet.edges.a.gpus: 1.5 must be a fraction below 1 or a whole number"),
        ("fleet.edges.a.cpus=-1", "fleet.edges.a.gpus: 0.0 and cpus: -1.0 must not be negative"),
        ("fleet.edges.a.memory_bytes=-1", "fleet.edges.a.memory_bytes: -1 must be above 0"),
        ("fleet.edges.a.resources={tpu: -1}", "fleet.edges.a.resources.tpu: -1.0 must not be negative"),
        ("fleet.edges.a.availability=0", "fleet.edges.a.availability: 0.0 must lie in (0, 1]"),
        ("fleet.round_timeout_seconds=0", "fleet.round_timeout_seconds: 0.0 must be above 0"),
        ("local.epochs=2", "local: steps: 4 and epochs: 2.0 ... set one to null"),
        ("local.lr=0", "local.lr: 0.0 must be above 0"),
        ("local.accumulate=5", "local.accumulate: 5 parts of a batch of 4 rows; at most 4"),
        ("data.max_length=3", "data.max_length: 3 tokens are too few; at least 8"),
        ("data.validation=0.9", "data.validation, data.test: shares in [0, 1), together below 1"),
        ("data.messages=chat", "data: a causal task needs prompt and response ... or messages (a column), not both"),
        ("data.task=classification", "data.task: classification needs data.text ... and data.label (a column)"),
        ("data.partition.by=iidd", "data.partition.by: 'iidd' is not one of edge, iid, dirichlet"),
        ("data.partition.by=column", "data.partition.by: column needs partition.column, a column's name"),
        ("evaluate={every: 0, keep: best}", "evaluate: keep: best, patience and target need evaluate.every above 0"),
        ("evaluate.patience=0", "evaluate.patience: 0 must be above 0"),
        ("method.rank=0", "method.rank: 0 must be at least 1"),
        ("method.targets=[]", "method.targets: names no module; write all-linear or names such as"),
        # edges
        ("fleet.edges={a/b: {}}", "edge name 'a/b': use letters, digits, '.', '_' and '-'"),
        ("fleet.edges={..: {}}", "edge name '..': use letters, digits"),
        ("fleet.edges={server: {}}", "edge name 'server': it is the server's own; give the edge another name"),
        ("fleet.profiles=labtop.yaml", "fleet.profiles: no file labtop.yaml; ready ones: clusters/"),
        ("fleet.profiles=clusters/laptop.yaml", "fleet.edges: no edge a in clusters/laptop.yaml; it has tower, laptop"),
        # methods
        ("method.name=lorra", "method.name: no method 'lorra'; did you mean lora? There are: "),
        ("method.name=quagga", "method.name: no method 'quagga'; give module:Class for your own. There are: ... lora"),
        ("method.name=nowhere:Own", "method.name: cannot import 'nowhere:Own': No module named 'nowhere'; is its"),
        ("method.name=faulty:Own", "method.name: cannot import 'faulty:Own': module ... has no attribute 'Own'"),
        ("method.name=fractions:Fraction", "method.name: fractions:Fraction is no method: it has no start, plan,"),
        ("method.name=math:pi", "method.name: math:pi is no method: it has no start, plan"),
        ("method.name=3", "method.name: 3 is no name; there are ... lora"),
        ("method={rank: 3}", "method: needs a name; `fedpipe methods` lists them"),
        ("method.targets=[q_proj, qq_proj]", "method.targets: no module qq_proj; there are down_proj, gate_proj"),
        # models
        ("model.name=nobody/nothing", "model.name: cannot load 'nobody/nothing': ... HF_HUB_OFFLINE is set: give"),
        ("model.name=/nowhere/model", "model.name: cannot load '/nowhere/model': ... there is no such folder"),
        ("model.name=builtin:huge-llama", "no built-in model 'huge-llama'; known: tiny-llama, deep-llama"),
        ("model.name=package:nobody/x", "model.name: package nobody is not installed; pip install it"),
        ("model.name=package:yaml/x", "model.name: no folder 'x' in package yaml at "),
        ("model.device=warp", "edge a: model.device: 'warp' is no device; use auto, cpu, cuda or cuda:N"),
        # data
        ("data.source=/nowhere/x.jsonl", "edge a: no file /nowhere/x.jsonl; in /: "),
        ("data.response='{anser}'", "has no column 'anser'; its columns: 'question', ... did you mean 'answer'?"),
        ("data.prompt='{question'", "data.prompt: '{' at character 1 of '{question' stands alone"),
        ("data.response=hello", "data.response: 'hello' names no column, so all rows would be alike; write one"),
    ],
)  # fmt: skip
def test_overrides(override: str, says: str, assert_run_refused: Refuse) -> None:
    assert_run_refused(says, override)


def test_every_mistake_is_named(assert_run_refused: Refuse) -> None:
    assert_run_refused("rounds: 'x' is not valid ... unknown key local.stepz", "local.stepz=3", "rounds=x")


def test_profile_file(assert_run_refused: Refuse, tmp_path: Path) -> None:
    """Its mistakes are found as if it stood in the run file."""
    (tmp_path / "mine.yaml").write_text("defaults: {cpus: 1, uplink: 5}\nedges: {worker: {count: 2}}\n")
    says = "unknown key fleet.edges.worker-0.uplink; did you mean uplink_bps? ... worker-1.uplink"
    assert_run_refused(says, "fleet={profiles: mine.yaml}")
    (tmp_path / "mine.yaml").write_text("edges: {worker: {count: many}}\n")
    assert_run_refused(
        "mine.yaml: edges.worker.count: 'many' must be a whole number above 0", "fleet={profiles: mine.yaml}"
    )


def test_command_line(capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
    """argparse's own refusals have the same exit code."""
    for arguments, says in (
        (["rnu", run_file], "invalid choice: 'rnu' (choose from 'run'"),
        (["run", run_file, "--ouut", "x"], "unrecognized arguments: --ouut x"),
        (["run"], "the following arguments are required: CONFIG"),
        ([], "the following arguments are required: COMMAND"),
    ):
        with pytest.raises(SystemExit) as stopped:
            assert_refused(capsys, *arguments)
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err


def test_check_refuses_as_run_does(capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
    assert_refused(capsys, "check", run_file, "method.rnk=3", says="unknown key method.rnk; did you mean rank?")
    assert_refused(capsys, "check", run_file, "data.response='{anser}'", says="has no column 'anser'; ... 'answer'?")
    assert_refused(
        capsys, "check", run_file, "method.targets=[x]", says="method.targets: no module x; there are down_proj"
    )
    assert_refused(capsys, "check", run_file, *CLASSES, "data.labels=[x, y]", says="has 'z'; data.labels has x, y")


# -- a program of its own


def test_in_a_process_of_its_own(run_file: Path, tmp_path: Path) -> None:
    """What the shell sees: the message on standard error, exit code 2, no traceback; before torch is imported."""
    began = time.monotonic()
    done = fedpipe("run", run_file, "local.stepz=3", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedpipe: unknown key local.stepz; did you mean steps?\n"
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - began < 20


def test_another_package_in_the_way(run_file: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "actors"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    done = fedpipe("run", run_file, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"package 'actors' comes from {shadow}, not from {ROOT}; remove that one from the path" in done.stderr


# -- models and data that are there, and broken


@pytest.fixture
def broken_model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "the folder must hold config.json, weights and tokenizer"),
        ("config.json", b"not json", "not a valid JSON file. (the folder must hold config.json"),
        ("config.json", b"{}", "`model_type` key ... (the folder must hold config.json"),
        ("model.safetensors", None, "no file named model.safetensors ... (the folder must hold config.json"),
        ("model.safetensors", b"\x10", "SafetensorError: ... (the folder must hold config.json"),
        ("tokenizer.json", b"{}", "KeyError: ... (the folder must hold config.json"),
    ],
)
def test_broken_model(
    file: str, content: bytes | None, says: str, broken_model: Path, assert_run_refused: Refuse
) -> None:
    if content is None:
        (broken_model / file).unlink()
    else:
        (broken_model / file).write_bytes(content)
    assert_run_refused(f"model.name: cannot load '{broken_model}': ... {says}", f"model.name={broken_model}")


GOOD = '{"question": "one", "answer": "two", "kind": "x"}\n'


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("none.jsonl", "", "none.jsonl is empty (1 file(s) of 0 bytes); give data.source a file with rows"),
        ("blank.jsonl", "\n\n", "blank.jsonl holds no row; give data.source a file with rows"),
        ("head.csv", "question,answer\n", "head.csv holds no row; give data.source a file with rows"),
        ("torn.jsonl", GOOD + GOOD[:25], "torn.jsonl, line 2 is not a JSON object (Unterminated string"),
        ("rows.jsonl", GOOD + "\x00\x01\n", "rows.jsonl, line 2 is not a JSON object (Expecting value at character 1)"),
        ("list.jsonl", "[" + GOOD.strip() + "]", "list.jsonl, line 1 holds a JSON list, not an object; convert"),
        ("latin.jsonl", GOOD.replace("two", "zwölf").encode("latin-1"), "latin.jsonl, line 1 is not UTF-8; convert it"),
        ("wide.jsonl", GOOD.encode("utf-16"), "wide.jsonl, line 1 is not UTF-8; convert it, for example: iconv"),
        ("latin.csv", "question,answer\none,zwölf\n".encode("latin-1"), "latin.csv is not UTF-8; convert it"),
        ("ragged.csv", "question,answer\none\n", "ragged.csv: CSV parse error ... Expected 2 columns, got 1"),
        ("bad.parquet", "PAR1", "cannot read ... bad.parquet: "),
        ("rows.txt", GOOD, "the suffix of rows.txt does not tell its format; set data.format: jsonl, csv or parquet"),
        ("short.jsonl", GOOD.replace("two", ""), "no training row in ... dropped_empty 1 ... raise data.max_length"),
    ],
)  # fmt: skip
def test_broken_data(file: str, content: str | bytes, says: str, assert_run_refused: Refuse, tmp_path: Path) -> None:
    """Only the edge whose data it is has something to say."""
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = assert_run_refused(f"edge b: ... {says}", f"fleet.edges.b.data={path}")
    assert "edge a:" not in message
    assert "zw" not in message  # the rows' content stays on the edge


def test_divided_data(assert_run_refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text(GOOD * 2)
    (tmp_path / "many.jsonl").write_text(GOOD * 30)
    shared = f"data.source={tmp_path}/two.jsonl"
    assert_run_refused(
        "partition: 2 row(s) for 3 edges; give data.source at least 3 rows, or use", shared, "data.partition.by=iid"
    )
    shared = f"data.source={tmp_path}/many.jsonl"
    assert_run_refused(
        "no column 'flavour'; its columns: 'question'", shared, "data.partition={by: column, column: flavour}"
    )
    assert_run_refused(
        "partition.column: kind has 1 value(s) for 3 edges", shared, "data.partition={by: column, column: kind}"
    )
    assert_run_refused(
        "partition.shards: 20 x 3 edges make 60 pieces of 30 rows; use at most 10",
        shared,
        *CLASSES,
        "data.partition={by: shards, shards: 20}",
    )
    assert_run_refused(
        "partition.by: cannot import nowhere:f: ... on the path of every edge", shared, "data.partition.by=nowhere:f"
    )


def test_classes(assert_run_refused: Refuse, tmp_path: Path) -> None:
    rows = [f'{{"question": "one two {i}", "kind": "x"}}\n' for i in range(40)]
    (tmp_path / "one.jsonl").write_text("".join(rows))
    one = f"data.source={tmp_path}/one.jsonl"
    assert_run_refused("data.label: kind has 1 class(es) over all edges; a classifier needs two or more", *CLASSES, one)
    assert_run_refused("row 4 of ... a.jsonl has 'z'; data.labels has x, y", *CLASSES, "data.labels=[x, y]")
    assert_run_refused("data.labels: ['x'] must be two or more different names", *CLASSES, "data.labels=[x]", one)
    assert_run_refused(
        "data.labels: ['x', 'x'] must be two or more different names", *CLASSES, "data.labels=[x, x]", one
    )
    assert_run_refused("has no column 'kindd'; its columns: ... did you mean 'kind'?", *CLASSES, "data.label=kindd")


# -- the run folder


def test_out_is_taken(capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
    full, file, run = tmp_path / "full", tmp_path / "file", tmp_path / "run"
    for folder in (full, run):
        folder.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    (run / "config.yaml").write_text("rounds: 1")
    for out, says in (
        (full, f"{full} is not empty; give a new folder with --out"),
        (file, f"{file} is a file; give a new folder with --out"),
        (run, f"{run} holds another run; `fedpipe resume {run}`, or give another folder with --out"),
    ):
        assert_refused(capsys, "run", run_file, "--out", out, says=says)
    assert [path.name for path in (*full.iterdir(), *run.iterdir())] == ["notes.txt", "config.yaml"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("place", ["{file}/out", "{file}/deeper/out", "/proc/out", "/proc/self/out", "/dev/null/out"])
def test_out_cannot_be_written(place: str, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = Path(place.format(file=tmp_path / "file"))
    says = f"cannot write to {out}: ... give another folder with --out"
    assert_refused(capsys, "run", run_file, "--out", out, says=says)
    assert (tmp_path / "file").read_text() == "mine"
