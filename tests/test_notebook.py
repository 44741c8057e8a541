"""A run from Python: the names of the package, and the notebook of examples/, cell by cell in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, env, load, opened_run

import fedpipe_ray
from fedpipe_ray import federate, progress, quality
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost
from fedpipe_ray.run import server_site

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells() -> list[dict[str, object]]:
    """The code cells of the notebook."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def text(cell: dict[str, object]) -> str:
    source = cell["source"]
    assert isinstance(source, list)
    return "".join(source)


@pytest.mark.parametrize("name", fedpipe_ray.__all__)
def test_every_name_of_the_package_is_there(name: str) -> None:
    assert getattr(fedpipe_ray, name).__name__ == name


def test_the_notebook_is_kept_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


def test_the_notebook_runs(run_file: Path) -> None:
    """A tiny run in place of its cell tagged `parameters`; what stands last in a cell can show itself in a notebook."""
    tags = [cell["metadata"] for cell in cells()]
    assert tags.count({"tags": ["parameters"]}) == 1
    parts = [text(cell) for cell in cells() if cell["metadata"] != {"tags": ["parameters"]}]
    program = "\n\n".join([f"config, settings = {str(run_file)!r}, ['rounds=2']", *parts, SHOWN])
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:fedpipe_ray", "-c", program], cwd=NOTEBOOK.parent, env=env(),
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("round ")] == [["round", "1"], ["round", "2"]]
    shown = json.loads(lines[-1])
    assert shown["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert shown["model"].startswith("Peft")
    assert shown["quality"] == [2, 2, 2, 2]  # a point a round, on four axes
    assert shown["tuned"] < shown["base"]


SHOWN = """
assert hasattr(comparison(base, tuned), "_repr_mimebundle_")
assert hasattr(figures.quality([seen], "loss"), "_repr_mimebundle_")
print(json.dumps({
    "files": sorted(path.name for path in folder.iterdir()), "model": type(model).__name__,
    "quality": [len(trace.x) for trace in figures.quality([seen], "loss").data],
    "base": base["global"]["loss"], "tuned": tuned["global"]["loss"],
}))
""".replace("print(", "import json\nprint(", 1)


def test_progress_passes_the_rounds_on(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load(run_file)
    method = make_method(run.method)
    fleet = fedpipe_ray.open_fleet(run, method)
    assert isinstance(fleet, SerialFleet)
    server = server_site(run, method, fleet.classes)
    shown = list(progress(federate(method, fleet, server, rounds=2, seed=run.seed), fleet, 2))
    alone_fleet, alone_method, alone, _ = opened_run(run_file)
    alike = list(federate(alone_method, alone_fleet, alone, rounds=2, seed=run.seed))
    assert [one.train_loss for one in shown] == [one.train_loss for one in alike]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("round ") for line in lines) == 2
    assert any(line.split()[:1] == ["a"] for line in lines)  # the table of the edges and their rows
    found = fleet.evaluate(shown[-1].state, "test")
    assert not any(isinstance(one, Lost) for one in found.values())
    assert quality(fleet, server, shown[-1].state)["edges"] == found
    fleet.close()
