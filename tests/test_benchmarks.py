"""Every benchmark says what it measures when asked, instead of measuring."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if '__name__ == "__main__"' in path.read_text())
OURS = {"flower_side"}  # run by against_flower in Flower's own environment


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OURS])
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    asked = (HERE / f"{name}.py").read_text().split('"""')[1].splitlines()[0]
    assert asked in said
