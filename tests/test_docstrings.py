"""builtin:docstrings on a package written for the test: 60 files that share sentences, so that every rule is met."""

import gc
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pytest

from fedpipe_ray.data import docstrings
from fedpipe_ray.data.docstrings import PROMPT, RESPONSE, pairs_hash, public_docstrings, read_pairs, split_of

MODULE = '''"""The module number {n}."""

class Box(dict):
    """Holds what number {n} gives."""

    def __init__(self, size: int, *, deep=True):
        """Too short."""

    def __len__(self):
        """Return the LENGTH of   it."""

if True:
    async def fetch_{n}(a, b=1, /, *rest, key: str = "x"):
        """Fetches the item, e.g. number {n}. A second sentence is not read.

        Nor is a second paragraph.
        """
        def inner(cls):
            r"""Bad escape \\d in sentence {n}"""
    def wide({long}):
        """A signature as long as this is left out {n}."""
    def accent():
        """Not ASCII \u00e9 and so left out {n}."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `made`, which nobody may import, and an empty cache."""
    root = tmp_path / "site" / "made"
    (root / "deep" / "tests").mkdir(parents=True)
    for n in range(60):
        folder = root / "deep" if n % 2 else root
        text = MODULE.format(n=n, long=", ".join(f"argument_{i}" for i in range(20)))
        (folder / f"m{n}.py").write_text(text, encoding="utf-8")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "broken.py").write_text("def f(:\n")
    (root / "deep" / "tests" / "skipped.py").write_text('def f():\n    """Stands in a test folder."""\n')
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.*"))


def test_rows_hold_the_signature_and_the_first_sentence(package: Path) -> None:
    rows = read_pairs("made").to_pylist()
    of_file = [(row["signature"], row["sentence"]) for row in rows if row["file"] == "deep/m7.py"]
    assert ("Box(size: int, *, deep=True)", "Holds what number 7 gives.") in of_file
    assert ("fetch_7(a, b=1, /, *rest, key: str='x')", "Fetches the item, e.g. number 7.") in of_file
    assert ("inner()", "Bad escape \\d in sentence 7") in of_file
    assert not {"accent()", "f()"} & {row["signature"] for row in rows}
    assert not any(row["signature"].startswith("wide") for row in rows)
    assert (PROMPT + RESPONSE).format(**rows[0]).startswith("def Box(size: int, *, deep=True) -> Holds what number")


def test_rows_come_in_file_order_and_each_file_has_one_split(package: Path) -> None:
    rows = read_pairs("made").to_pylist()
    files = [row["file"] for row in rows]
    assert files == sorted(files)
    assert all(row["split"] == split_of("made", row["file"]) for row in rows)
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_the_split_is_a_fixed_tenth_and_twentieth() -> None:
    counts = Counter(split_of("p", f"file{i}.py") for i in range(10_000))
    assert counts["test"] == pytest.approx(1000, abs=100)
    assert counts["validation"] == pytest.approx(500, abs=70)
    assert [split_of("p", f"{n}.py") for n in (0, 7, 15)] == ["train", "validation", "test"]  # on every machine


def test_a_sentence_stands_three_times_and_never_on_both_sides(package: Path) -> None:
    splits = defaultdict(list)
    for row in read_pairs("made").to_pylist():
        splits[" ".join(row["sentence"].lower().split())].append(row["split"])
    assert splits["return the length of it."] == ["train"] * 3  # in all 60 files
    assert all("train" not in found or set(found) == {"train"} for found in splits.values())


def test_public_docstrings_are_the_train_files_alone(package: Path) -> None:
    texts = public_docstrings("made")
    assert len(texts) == len(set(texts))
    train = {n for n in range(60) if split_of("made", f"deep/m{n}.py" if n % 2 else f"m{n}.py") == "train"}
    assert {text for text in texts if text.startswith("The module")} == {f"The module number {n}." for n in train}
    assert sum("Nor is a second paragraph." in text for text in texts) == len(train)


def test_the_second_call_reads_the_cache(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    first = read_pairs("made", lambda *step: seen.append(step))
    assert seen == [("made", done, 62) for done in range(1, 63)]
    assert len(cache_files(tmp_path)) == 1  # no file left aside
    monkeypatch.setattr(docstrings, "_tables", None)
    assert read_pairs("made").equals(first, check_metadata=True)


def test_a_changed_file_is_read_again(package: Path) -> None:
    before = read_pairs("made")
    (package / "new.py").write_text('def fresh():\n    """Came after the first call."""\n')
    assert read_pairs("made").num_rows == before.num_rows + (split_of("made", "new.py") != "")
    assert pairs_hash(read_pairs("made")) != pairs_hash(before)


def test_a_large_package_gives_the_same_files_wherever_it_stands(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most MAX_FILES of it, the drawn ones not being those that come first."""
    monkeypatch.setattr(docstrings, "MAX_FILES", 20)
    drawn = set(read_pairs("made")["file"].to_pylist())
    assert 10 < len(drawn) <= 20
    assert drawn != set(sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))[:20])
    moved = tmp_path / "elsewhere"
    shutil.copytree(package, moved / "made")
    monkeypatch.syspath_prepend(str(moved))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert set(read_pairs("made")["file"].to_pylist()) == drawn


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other rows"])
def test_a_damaged_cache_is_rebuilt(package: Path, tmp_path: Path, damage: str) -> None:
    first = read_pairs("made")
    (file,) = cache_files(tmp_path)
    whole = file.read_bytes()
    at = whole.index(b"Holds what")
    other = pa.BufferOutputStream()
    with pa.ipc.new_file(other, first.schema) as writer:
        writer.write_table(first.slice(1))
    broken = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:at] + b"X" + whole[at + 1 :],
        "other rows": other.getvalue().to_pybytes(),
    }
    file.write_bytes(broken[damage])
    assert read_pairs("made").equals(first)
    assert file.read_bytes() == whole


def test_an_unwritable_cache_is_done_without(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert read_pairs("made").num_rows > 100


def test_processes_may_race(package: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); from fedpipe_ray.data.docstrings import *; "
    code += "print(pairs_hash(read_pairs('made')), 'torch' in sys.modules, 'ray' in sys.modules)"
    root = Path(docstrings.__file__).parents[2]
    racers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) for _ in range(2)]
    found = {racer.communicate()[0].decode().strip() for racer in racers}
    assert found == {f"{pairs_hash(read_pairs('made'))} False False"}
    assert len(cache_files(tmp_path)) == 1


@pytest.mark.parametrize("name", ["no_such_package", "os.path", "../made", "", "sys"])
def test_an_unknown_package_is_named_with_some_that_serve(name: str, package: Path) -> None:
    with pytest.raises(ValueError, match=r"stdlib.*torch") as caught:
        read_pairs(name)
    assert repr(name) in str(caught.value)


def test_garbage_collection_is_as_before(package: Path) -> None:
    enabled: list[bool] = []
    assert gc.isenabled()
    read_pairs("made", lambda *step: enabled.append(gc.isenabled()))
    assert gc.isenabled()
    assert not any(enabled)


def test_the_hash_sees_rows_order_and_split() -> None:
    table = pa.table({"signature": ["f()", "g()"], "sentence": ["One.", "Two."], "split": ["train", "test"]})
    swapped = table.set_column(2, "split", [["test", "train"]])
    hashes = {pairs_hash(t) for t in (table, table.take([1, 0]), swapped, table.slice(1))}
    assert len(hashes) == 4
    assert all(len(found) == 12 for found in hashes)
