"""Sources of every kind as batches of text, and what is said of those that cannot be read."""

import bz2
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpipe_ray.data.tables import BATCH_ROWS, column_names, read
from fedpipe_ray.errors import UserError
from tests.rows import lines, values


def write_jsonl(path: Path, table: pa.Table) -> None:
    lines(path, table.to_pylist())


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=2)


def write_csv(path: Path, table: pa.Table) -> None:
    pa.csv.write_csv(table, path)


def write_gzip(path: Path, table: pa.Table) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()))


def write_bz2_tsv(path: Path, table: pa.Table) -> None:
    rows = [table.column_names, *(["" if v is None else str(v) for v in row.values()] for row in table.to_pylist())]
    path.write_bytes(bz2.compress("\n".join("\t".join(row) for row in rows).encode()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.parquet", write_parquet),
        ("a.csv", write_csv),
        ("a.json.gz", write_gzip),
        ("a.tsv.bz2", write_bz2_tsv),
    ],
)
def test_every_format_gives_the_same_text(tmp_path: Path, name: str, write: Callable[[Path, pa.Table], None]) -> None:
    table = pa.table({"x": ["ä", "b c", None], "unused": [1, 2, 3], "n": [1, -2, None], "f": [0.5, 2.25, None]})
    write(tmp_path / name, table)
    assert values(tmp_path / name, ["n", "x", "f"]) == [("1", "ä", "0.5"), ("-2", "b c", "2.25"), ("", "", "")]
    assert column_names(str(tmp_path / name)) == ["x", "unused", "n", "f"]


def test_folder_glob_and_url_read_sorted_files_and_skip_hidden_and_empty_ones(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl", ".hidden.jsonl", "_draft.jsonl", "deep/d.jsonl", "deep/er/e.jsonl"):
        lines(tmp_path / name, [{"x": name}])
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "README.md").write_text("what this is")
    assert values(tmp_path, ["x"]) == [("a.jsonl",), ("b.jsonl",)]
    assert values(tmp_path / "[b-z]*.jsonl", ["x"]) == [("b.jsonl",)]
    assert values(tmp_path / "*" / "?.jsonl", ["x"]) == [("deep/d.jsonl",)]
    assert [row[0][-7:] for row in values(f"{tmp_path}/**/*.jsonl", ["x"])] == [
        "a.jsonl",
        "b.jsonl",
        "d.jsonl",
        "e.jsonl",
    ]
    assert values(f"file://{tmp_path}/deep/*.jsonl", ["x"]) == [("deep/d.jsonl",)]


def test_csv_with_byte_order_mark_quotes_newlines_and_other_separators(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufeffx,y\r\n"two\r\nlines","say ""hi"""\r\nNA,\r\n'.encode())
    assert values(tmp_path / "a.csv", ["x", "y"]) == [("two\r\nlines", 'say "hi"'), ("NA", "")]
    (tmp_path / "b.csv").write_text("x;y\n1,5;2\n")
    assert values(tmp_path / "b.csv", ["y", "x"]) == [("2", "1,5")]


def test_csv_row_longer_than_a_block(tmp_path: Path) -> None:
    rows = [*(f"{i:09}" for i in range(150_000)), "long" * 1_000_000, "last"]
    write_csv(tmp_path / "a.csv", pa.table({"x": rows}))
    assert [x for (x,) in values(tmp_path / "a.csv", ["x"])] == rows


def test_jsonl_columns_may_come_late_change_type_nest_and_hold_half_an_emoji(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"x": i} for i in range(2 * BATCH_ROWS)]
    late = [{"x": 1.5, "late": True}, {"x": "text"}, {"x": ["a", {"b": None}]}, {"x": "\ud83d!"}, {"x": float("nan")}]
    found = values(lines(tmp_path / "a.jsonl", rows + late), ["x", "late"])
    assert found[: 2 * BATCH_ROWS] == [(str(i), "") for i in range(2 * BATCH_ROWS)]
    assert found[-5:] == [("1.5", "true"), ("text", ""), ('["a", {"b": null}]', ""), ("?!", ""), ("", "")]


def test_parquet_types_become_text(tmp_path: Path) -> None:
    table = pa.table(
        {"d.t": pa.array(["u", "v", "u"]).dictionary_encode(), "b": [b"1", b"2", None], "t": [True, None, False]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", ["d.t", "b", "t"]) == [("u", "1", "true"), ("v", "2", ""), ("u", "", "false")]


def test_batches_are_small_in_rows_and_bytes(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", pa.table({"x": ["y" * 50_000] * 40}))
    assert [batch.num_rows for batch in read(str(tmp_path / "a.csv"), ["x"])] == [10, 10, 10, 10]


def test_limit_counts_over_all_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", [{"x": f"{name}{i}"} for i in range(3)])
    assert values(tmp_path, ["x"], limit=4) == [("a0",), ("a1",), ("a2",), ("b0",)]
    assert values(tmp_path, ["x"], limit=3)[-1] == ("a2",)


MISSING = r"a\.\w+ has no column 'anwser'; its columns: 'q', 'answer'; did you mean 'answer'\?"


def _folder(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1, "answer": 2}\n', MISSING),
        ("a.csv", b"q,answer\n1,2\n", MISSING),
        ("a.jsonl", b'{"q": 1}\n{"q": \n', r"a.jsonl, line 2 is not a JSON object \(Expecting value at character"),
        ("a.json", b'[{"q": 1},\n{"q": 2}]\n', "one JSON array: jq -c"),
        ("a.json", b'[{"q": 1}]\n', "line 1 holds a JSON list, not an object"),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xe4"}\n', "a.jsonl, line 2 is not UTF-8; convert it"),
        ("a.csv", b"q,anwser\n" + b"1,2\n" * 4000 + b"1,\xe4\n", r"a.csv is not UTF-8 .*Row #4002.*iconv"),
        ("a.csv", "q,anwser\n1,2\n".encode("utf-16"), "a.csv is not UTF-8; convert it"),
        ("a.csv", b"q,anwser\n1,2\nsecret,3,4\n", r"cannot read .*a.csv: .*Row #3: Expected 2 columns, got 3$"),
        ("a.csv", b"q,anwser,q\n1,2,3\n", "more than one column 'q'"),
        ("a.csv", b"q,anwser\n", "holds no row"),
        ("a.jsonl", b"\n\n", "holds no row"),
        ("a.jsonl", b"", "is empty"),
        ("a.parquet", b"PAR1 but not really PAR1", "cannot read .*a.parquet"),
        ("a.csv.gz", b"no gzip at all", "cannot read .*a.csv.gz"),
        ("a.txt", b"1", "the suffix of a.txt does not tell its format; set data.format"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_row_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = _folder(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        values(path, ["q", "anwser"])
    assert "secret" not in str(caught.value)


def test_a_missing_column_is_seen_although_a_limit_stops_the_reading(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"q": i} for i in range(3 * BATCH_ROWS)])
    for limit in (1, BATCH_ROWS, BATCH_ROWS + 1):
        with pytest.raises(UserError, match="no column 'a'"):
            values(path, ["q", "a"], limit=limit)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", [{"x": 1}])
    with pytest.raises(UserError, match=r"no file .*trian.jsonl; in .*: train.jsonl"):
        values(tmp_path / "no" / "trian.jsonl", ["x"])
    with pytest.raises(UserError, match=r"no file .*\*.csv; in .*: train.jsonl"):
        values(tmp_path / "*.csv", ["x"])
    with pytest.raises(UserError, match="cannot open ftp://x/y"):
        values("ftp://x/y", ["x"])
    with pytest.raises(UserError, match="use builtin:docstrings/PACKAGE"):
        values("builtin:poems", ["x"])
    with pytest.raises(UserError, match="no package 'no_such_package'"):
        values("builtin:docstrings/no_such_package", ["signature"])


def test_mixed_formats_and_folders_of_folders_need_a_word(tmp_path: Path) -> None:
    lines(tmp_path / "in" / "a.jsonl", [{"x": 1}])
    (tmp_path / "in" / "b.csv").write_text("x\n2\n")
    with pytest.raises(UserError, match=r"mixes csv, jsonl files; name one kind: .*/in/\*.jsonl"):
        values(tmp_path / "in", ["x"])
    assert values(tmp_path / "in", ["x"], format="csv") == [("2",)]
    with pytest.raises(UserError, match=r"holds no file; in .*: in; .*/\*\*/\*.jsonl"):
        values(tmp_path, ["x"])


def test_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    lines(folder / "train.jsonl", [{"x": i, "m": [{"role": "user"}]} for i in range(3)])
    lines(folder / "test.jsonl", [{"x": 9, "m": []}])
    assert values(f"hf:{folder}", ["x", "m"]) == [(str(i), '[{"role": "user"}]') for i in range(3)]
    assert values(f"hf:{folder}:test", ["x"]) == [("9",)]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) == 0  # locks, but no private row
    assert column_names(f"hf:{folder}") == ["x", "m"]
    datasets.Dataset.from_dict({"x": [1, 2]}).save_to_disk(saved)
    assert values(f"hf:{saved}", ["x"], limit=1) == [("1",)]
    with pytest.raises(UserError, match="has no column 'y'; its columns: 'x', 'm'"):
        values(f"hf:{folder}", ["y"])
    with pytest.raises(UserError, match=r"cannot load .*no_split"):
        values(f"hf:{folder}:no_split", ["x"])


def test_hugging_face_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fedpipe-ray\[hf\]'"):
        values("hf:openai/gsm8k/main", ["question"])
