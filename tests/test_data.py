"""An edge's rows: which split they are in, which edge has them, what is dropped, and what is left behind."""

import resource
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

from fedpipe_ray.data import inspect, open_data
from fedpipe_ray.data.split import split_of
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data, Partition
from tests.rows import PAIRS, TOKENIZER, labelled, lines, opened, qa, texts, values


def write_csv(path: Path, table: pa.Table) -> None:
    pa.csv.write_csv(table, path)


# -- splits


def test_shares_are_kept_and_depend_on_the_prompt_alone() -> None:
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for i in range(20_000):
        counts[split_of(f"prompt {i}", 0.1, 0.2)] += 1
    assert abs(counts["validation"] - 2000) < 150
    assert abs(counts["test"] - 4000) < 200
    tests = [i for i in range(500) if split_of(str(i), 0.0, 0.2) == "test"]
    assert tests == [i for i in range(500) if split_of(str(i), 0.5, 0.2) == "test"]
    assert split_of("Two  words", 0.3, 0.3) == split_of("two words\n", 0.3, 0.3)


def test_all_answers_to_one_prompt_share_a_split(tmp_path: Path) -> None:
    rows = [{"q": f"{'Q' if j else 'q'} {i}", "a": f"answer {j}"} for j in range(3) for i in range(100)]
    data = opened(qa(lines(tmp_path / "a.jsonl", rows), validation=0.2, test=0.2))
    prompts = [
        {text.casefold().split("?")[0] for text, _ in texts(split)}
        for split in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, prompts)) == 100
    assert len(data.train) == 3 * len(prompts[0])
    assert len(data.train) + len(data.validation) + len(data.test) == 300 == data.counts["rows"]


def test_a_constant_prompt_does_not_put_all_rows_in_one_split(tmp_path: Path) -> None:
    data = opened(qa(lines(tmp_path / "a.jsonl", PAIRS), prompt="Write:", validation=0.2, test=0.2))
    assert min(len(data.train), len(data.validation), len(data.test)) > 30


def test_files_of_their_own_are_splits_without_what_stands_in_train(tmp_path: Path) -> None:
    held = [{"q": "new", "a": "x"}, {"q": "Question  1", "a": "ANSWER 1"}, {"q": "question 1", "a": "another"}]
    data = opened(qa(
        lines(tmp_path / "a.jsonl", PAIRS),
        validation=str(lines(tmp_path / "v.jsonl", held[:2])), test=str(lines(tmp_path / "t.jsonl", held)),
    ))  # fmt: skip
    assert data.counts == {
        "rows": 305, "train": 300, "validation": 1, "test": 2, "truncated": 0, "dropped_empty": 0, "dropped_leaked": 2
    }  # fmt: skip
    assert [data.test.text(i) for i in range(2)] == [("new?", " x"), ("question 1?", " another")]
    assert texts(data.test) == [("<s>new? x</s>", " x</s>"), ("<s>question 1? another</s>", " another</s>")]


def test_a_file_for_one_split_leaves_the_share_of_the_other(tmp_path: Path) -> None:
    own = lines(tmp_path / "t.jsonl", [{"q": "new", "a": "x"}])
    data = opened(qa(lines(tmp_path / "a.jsonl", PAIRS), validation=0.2, test=str(own)))
    assert (len(data.train) + len(data.validation), len(data.test)) == (300, 1)
    assert 30 < len(data.validation) < 90


def test_a_leaking_text_of_a_classifier(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"t": f"text {i}", "y": i % 2} for i in range(20)])
    own = lines(tmp_path / "t.jsonl", [{"t": "TEXT 3 ", "y": 0}, {"t": "text 33", "y": 0}])
    data = opened(labelled(source, validation=0.0, test=str(own)), classes=["0", "1"])
    assert (len(data.test), data.counts["dropped_leaked"]) == (1, 1)


def test_the_built_in_corpus_splits_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_corpus"
    package.mkdir()
    for i in range(60):
        (package / f"part{i}.py").write_text(f'def f{i}(x):\n    """Returns the sum of x and {i}."""\n')
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = "builtin:docstrings/tiny_corpus"
    data = opened(Data(source=source))
    wanted = [row[0] for row in values(source, ["split"])]
    assert [len(data.train), len(data.validation), len(data.test)] == [
        wanted.count(n) for n in ("train", "validation", "test")
    ]
    prompt, response = data.test.text(0)
    assert prompt.startswith("def f")
    assert prompt.endswith("(x) ->")
    assert response.startswith(" Returns the sum of x and ")
    own = opened(Data(source=source, test=str(lines(tmp_path / "t.jsonl", [{"signature": "g()", "sentence": "New."}]))))
    assert (len(own.test), len(own.train)) == (1, len(data.train) + len(data.test))


# -- shared sources


@pytest.mark.parametrize(
    "partition", [Partition(by="iid"), Partition(by="dirichlet", column="c"), Partition(by="size")]
)
def test_edges_share_a_source_without_gap_or_overlap(tmp_path: Path, partition: Partition) -> None:
    rows = [{**pair, "c": f"class {i % 4}"} for i, pair in enumerate(PAIRS)]
    source = lines(tmp_path / "a.jsonl", [*rows, {"q": "beyond", "a": "the limit", "c": "x"}])
    settings = qa(source, partition=partition, limit=300, validation=0.0, test=0.0)
    found = [texts(opened(settings, edge=edge).train) for edge in ("e0", "e1", "e2")]
    assert sorted(row for rows in found for row in rows) == sorted(
        (f"<s>{r['q']}? {r['a']}</s>", f" {r['a']}</s>") for r in rows
    )
    assert sum(inspect(settings, edge, ["e0", "e1", "e2"], 0).rows for edge in ("e0", "e1", "e2")) == 300
    assert opened(settings, edge="").counts["rows"] == 300  # the server
    with pytest.raises(UserError, match="edge 'e9' has no share"):
        opened(settings, edge="e9")


def test_a_column_that_names_the_edges(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"t": f"{i}", "y": i % 2, "edge": f"e{i % 3}"} for i in range(30)])
    settings = labelled(source, partition=Partition(by="column", column="edge"), validation=0.0, test=0.0)
    assert inspect(settings, "e1", ["e0", "e1", "e2"], 0).sizes == {"0": 5, "1": 5}
    first = [
        ids.tolist() for ids, _ in (opened(settings, edge="e1", classes=["0", "1"]).train.example(i) for i in range(2))
    ]
    assert [TOKENIZER.decode(ids) for ids in first] == ["<s>1", "<s>4"]


# -- where rows rest


def test_encoded_rows_are_mapped_from_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    source, seen = lines(tmp_path / "a.jsonl", PAIRS * 10), []

    def progress(rows: int) -> None:
        seen.append((rows, list(folder.iterdir())))

    data = open_data(qa(source), "e0", ["e0"], 0, TOKENIZER, [], progress)
    assert seen == [(1024, []), (2048, []), (3000, [])]
    assert list(folder.iterdir()) == []
    ids, labels = data.train.example(1500)
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    again = data.train.example(1500)[0]
    assert ids.__array_interface__["data"] == again.__array_interface__["data"]  # a view, not a copy
    assert len(ids) == len(labels)
    deleted = Path("/proc/self/maps").read_text().count(f"{folder}/")
    assert deleted == 3  # one map a split; each says (deleted)


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    first = opened(qa(lines(tmp_path / "a.jsonl", PAIRS)))
    write_csv(tmp_path / "b.csv", pa.Table.from_pylist(PAIRS))
    assert opened(qa(tmp_path / "b.csv")).fingerprint == first.fingerprint
    assert opened(qa(tmp_path / "b.csv", response="{a}")).fingerprint != first.fingerprint
    assert opened(qa(tmp_path / "b.csv", test=0.11)).fingerprint != first.fingerprint
    assert len(first.fingerprint) == 16


def test_the_fingerprint_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path / "a.jsonl", PAIRS)
    first = opened(qa(source))
    monkeypatch.setattr("fedpipe_ray.data.tables.BATCH_ROWS", 7)
    monkeypatch.setattr("fedpipe_ray.data.split.BATCH_ROWS", 11)
    second = opened(qa(source))
    assert second.fingerprint == first.fingerprint
    assert texts(second.train) == texts(first.train)


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    """No file may grow beyond 16 KiB: a full disk, as write() sees it. Lifted before pytest itself writes again."""
    source = lines(tmp_path / "a.jsonl", PAIRS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot keep encoded rows in /.*File too large; .*TMPDIR"):
            opened(qa(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_edge_without_a_training_row(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"q": "a long enough question", "a": "x"}])
    with pytest.raises(UserError, match=r"no training row in .*rows 1, .*dropped_empty 1.*; raise data.max_length \(8"):
        opened(qa(source, max_length=8))
    rows = [{"q": f"q{i}", "a": "x"} for i in range(50) if split_of(f"q{i}?", 0.0, 0.5) == "test"]
    with pytest.raises(UserError, match=r"no training row .*lower data.validation \(0.05\) and data.test \(0.5\)"):
        opened(qa(lines(tmp_path / "b.jsonl", rows), test=0.5), edge="")
