"""`fedpipe compare`: the runs it makes are those of `fedpipe run`, what fails loses nothing else, and it goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import assert_refused
from runs import assert_like, fedpipe, here, summary, tiny_run
from safetensors.torch import load_file

from clusters import find_profiles
from fedpipe_ray.compare.asked import Asked, asked, entries_of, seeds_of
from fedpipe_ray.compare.figures import common_figures, over_seeds
from fedpipe_ray.errors import UserError
from fedpipe_ray.page.history import History

FAULTY = "{label: sick, name: 'faulty:Faulty', sick: [a, b, c], how: raise, cure: CURE}"


def sections(overrides: list[str], section: Any = None) -> dict[str, dict[str, Any]]:
    """label -> method section, of a run file with this section."""
    return {entry.label: entry.method for entry in entries_of(section, overrides)}


# -- what is asked


def test_methods_take_what_they_know_of_the_shared_section() -> None:
    section = {"name": "lora", "rank": 16, "alpha": 32, "residual": True}
    shared = {"rank": 16, "alpha": 32}
    assert sections(["method=lora,fedpipe, full"], section) == {
        "lora": {"name": "lora", **shared, "residual": True},
        "fedpipe": {"name": "fedpipe", **shared},
        "full": {"name": "full"},
    }
    assert [entry.left_out for entry in entries_of(section, ["method=lora,full"])] == [(), ("rank", "alpha")]
    assert sections([], section) == {"lora": {"name": "lora", **shared, "residual": True}}


def test_settings_of_one_method() -> None:
    found = sections(["method=lora,fedpipe", "method.rank=4", "method.fedpipe.preset=paper", "method.fedpipe.rank=2"])
    assert found == {"lora": {"name": "lora", "rank": 4}, "fedpipe": {"name": "fedpipe", "rank": 2, "preset": "paper"}}
    listed: list[Any] = ["lora", {"label": "small", "name": "lora", "rank": 2}]
    assert sections(["method.alpha=8", "method.small.dropout=0.1"], listed) == {
        "lora": {"name": "lora", "alpha": 8}, "small": {"name": "lora", "rank": 2, "alpha": 8, "dropout": 0.1}
    }  # fmt: skip
    assert sections(["method=fedpipe,lora", "method.preset=paper"])["fedpipe"] == {"name": "fedpipe", "preset": "paper"}
    assert list(sections(["method=own_methods:Held,lora"])) == ["Held", "lora"]


def test_seeds() -> None:
    assert [seeds_of(value) for value in ("0,1,2", [0, 1, 2], 3)] == [(0, 1, 2), (0, 1, 2), (3,)]


def plan(run_file: Path, *overrides: str) -> Asked:
    return asked(run_file, overrides, None, find_profiles)


def test_all_runs_have_fleet_and_settings_in_common(run_file: Path) -> None:
    found = plan(run_file, "method=lora,flora", "seeds=[4, 5]", "rounds=3")
    runs = [found.of(entry) for entry in found.entries]
    assert [run.method["name"] for run in runs] == ["lora", "flora"]
    assert {(run.seed, run.rounds, tuple(run.fleet.edges)) for run in runs} == {(4, 3, ("a", "b", "c"))}
    assert runs[0].local == runs[1].local
    run_file.write_text(run_file.read_text().replace("{name: lora, rank: 4, alpha: 8}", "[lora, flora]\nseeds: [7, 8]"))
    assert (len(plan(run_file).entries), plan(run_file).seeds) == (2, (7, 8))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "one method (lora) and one seed (0) are nothing to compare; write method=a,b or seeds=0,1,2"),
        (["method=lora,lorra"], "no method 'lorra'; did you mean lora?"),
        (["method=lora,lora"], "method: lora stands twice; give each a label"),
        (["method="], "method: names no method; write method=lora,fedpipe"),
        (["method=[lora, 3]"], "method: 3 is no method; write its name, or {name: lora, rank: 4}"),
        (["method=[{name: lora, label: a/b}, flora]"], "method: label 'a/b': use letters"),
        (["method=lora,flora", "method.rnk=3"], "unknown key method.rnk; none of lora, flora has it"),
        (["method=lora,flora", "method.flora.rnk=3"], "flora: unknown key method.rnk; did you mean rank?"),
        (["method=lora,flora", "flora.limit=3"], "unknown key flora; settings of one method are written method.flora."),
        (["method=fedpipe,central", "method.steps=1"], "method.steps: fedpipe, central have it ... say whose"),
        (["method=lora,flora", "method.ranks={a: 2}"], "lora: method.ranks: lora needs one rank for all edges"),
        (["method=lora,flora", "method.rank=0"], "lora: method.rank: 0 must be at least 1 ... flora: method.rank: 0"),
        (["method=lora,flora", "seeds=0,x"], "seeds: '0,x' are no seeds; write whole numbers, such as seeds=0,1,2"),
        (["method=lora,flora", "seeds=[1, 1]"], "seeds: 1 stands twice"),
        (["method=lora,flora", "seeds=-1"], "seeds: -1 are no seeds"),
        (["method=lora,flora", "seed=3", "seeds=0,1"], "seed, seeds: both are given; leave seed out"),
        (["method=lora,flora", "ronds=3"], "unknown key ronds; did you mean rounds?"),
        (["method=lora,flora", "method.targets=[x]"], "lora: method.targets: no module x ... flora: method.targets"),
        (["method=lora,head"], "head: method.name: head trains a classifier's head, and data.task is causal"),
        (["method=lora,flora", "data.source=/nowhere/{edge}.jsonl"], "edge a: no file /nowhere/a.jsonl"),
        (["method=lora,flora", "fleet.mode=buffered", "fleet.buffer=2"], "flora: ... fleet.mode"),
    ],
)  # fmt: skip
def test_everything_is_checked_before_the_first_run(
    overrides: list[str], says: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "compare", run_file, *overrides, says=says, out=tmp_path / "out")


# -- what comes out


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path) -> tuple[Path, list[str]]:
    """The folder of a comparison of three methods, of which `sick` lost all its edges; and its arguments."""
    folder = tmp_path_factory.mktemp("compare")
    file = tiny_run(folder, model_dir, data_dir)
    method = f"method=[lora, flora, {FAULTY.replace('CURE', str(folder / 'cure'))}]"
    file.write_text(file.read_text().replace("steps: 4", "steps: 1"))
    arguments = ["compare", str(file), method, "seeds=0,1", "--out", str(folder / "out")]
    assert here(*arguments) == 3
    return folder / "out", arguments


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "comparison.json").read_text()))


def test_figures_are_those_of_the_runs(compared: tuple[Path, list[str]]) -> None:
    folder, _ = compared
    found = told(folder)
    assert list(found["runs"]) == [f"{label}-{seed}" for seed in (0, 1) for label in ("lora", "flora", "sick")]
    losses = []
    for seed in (0, 1):
        run, own = found["runs"][f"flora-{seed}"], summary(folder / f"flora-{seed}")
        edges = {name: metrics["loss"] for name, metrics in own["tuned"]["edges"].items()}
        losses.append(own["tuned"]["global"]["loss"])
        assert (run["status"], run["loss"], run["base_loss"]) == ("finished", losses[-1], own["base"]["global"]["loss"])
        assert run["accuracy"] == own["tuned"]["global"]["token_accuracy"]
        assert edges[run["worst_edge"]] == run["worst_loss"] == max(edges.values())
        assert {key: run[key] for key in own["totals"]} == own["totals"]
        result = load_file(folder / f"flora-{seed}" / "adapter" / "adapter_model.safetensors")
        assert run["result_parameters"] == sum(tensor.numel() for tensor in result.values())
    over = found["over_seeds"]["flora"]["loss"]
    assert over["mean"] == pytest.approx(sum(losses) / 2)
    assert over["std"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))  # of two values, n - 1
    assert found["runs"]["sick-0"]["status"] == "lost"
    assert "every edge was lost" in found["runs"]["sick-0"]["reason"]
    assert found["over_seeds"]["sick"] == {}


def test_a_run_is_that_of_the_command_run(compared: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, arguments = compared
    assert here("run", arguments[1], "method.name=flora", "seed=1", "--out", tmp_path / "run") == 0
    assert_like(folder / "flora-1", tmp_path / "run")


@pytest.mark.services
def test_the_same_command_goes_on(
    compared: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished runs stay as they are, stopped ones go on, lost ones are tried again; then methods are added."""
    folder, arguments = compared
    kept = (folder / "lora-1" / "summary.json").stat().st_mtime_ns
    one = folder / "flora-0"
    before = summary(one)
    (one / "summary.json").unlink()  # as if killed after its first round
    shutil.rmtree(max((one / "checkpoint").glob("round-*")))
    shutil.rmtree(folder / "lora-0" / "checkpoint")  # as if killed before its first checkpoint
    (folder / "lora-0" / "summary.json").unlink()
    (folder.parent / "cure").touch()
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert here(*arguments) == 0
    said = capsys.readouterr().out
    assert "lora, seed 1: done before" in said
    assert "it goes on after round 1" in said
    assert (folder / "lora-1" / "summary.json").stat().st_mtime_ns == kept
    assert summary(one)["tuned"] == before["tuned"]
    assert {run["status"] for run in told(folder)["runs"].values()} == {"finished"}
    assert (folder / "report.html").stat().st_size > 10**6
    lines = said.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("test rows, mean")) :]
    assert max(map(len, table)) <= 80 or str(folder) in max(table, key=len)
    loss = told(folder)["over_seeds"]["sick"]["loss"]
    assert any(line.startswith("sick ") and f"{loss['mean']:.3f}" in line for line in table)

    more = [arguments[2].replace("[lora,", "[lora, fedex_lora,") if i == 2 else a for i, a in enumerate(arguments)]
    assert here(*more) == 0
    assert told(folder)["runs"]["fedex_lora-1"]["status"] == "finished"
    for changed, says in (
        ([*more[:-2], "local.lr=1"], "holds another comparison, with other local.lr; give another folder"),
        ([*more[:-2], "rounds=3"], "holds another comparison, with other rounds"),
        ([*arguments[:-2], "method.fedex_lora.rank=2"], "unknown key method.fedex_lora"),
        ([*more[:-2], "method.flora.alpha=1"], "holds another comparison, with other method.flora.alpha"),
        (
            [*arguments[:2], "method=lora", "seeds=1,2"],
            "holds a comparison with method fedex_lora, flora, sick and seed 0; name these too",
        ),
    ):
        assert_refused(capsys, *changed, *arguments[-2:], says=says)


def test_folders_of_others_are_left_alone(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    both = ("compare", run_file, "method=lora,flora", "--out", folder)
    assert_refused(capsys, *both, says=f"{folder} is not empty and holds no comparison; give another folder with --out")
    (folder / "comparison.json").write_text("{")
    assert_refused(capsys, *both, says="comparison.json is damaged")
    assert (folder / "notes.txt").read_text() == "mine"


def test_ctrl_c_stops_after_the_round(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stopping_rounds.py").write_text(STOPPING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STOP", "1")
    out = tmp_path / "out"
    arguments = ("compare", run_file, "method=[lora, {name: 'stopping_rounds:Stopping'}, flora]", "--out", out)
    assert here(*arguments) == 130
    assert f"stopped; the same command goes on in {out}" in capsys.readouterr().out
    found = {name: run["status"] for name, run in told(out)["runs"].items()}
    assert found == {"lora-0": "finished", "Stopping-0": "interrupted", "flora-0": "to do"}
    monkeypatch.delenv("STOP")
    assert here(*arguments) == 0
    assert here("run", run_file, "--out", tmp_path / "run") == 0
    assert summary(out / "Stopping-0")["tuned"] == summary(tmp_path / "run")["tuned"]


STOPPING = '''
import os
import signal
from dataclasses import dataclass

from fedpipe_ray.methods.lora import Lora


@dataclass(frozen=True, kw_only=True)
class Stopping(Lora):
    """LoRA that is interrupted in its first round."""

    def local_update(self, order, site, rng):
        if "STOP" in os.environ and (site.name, site.round) == ("b", 0):
            os.kill(os.getpid(), signal.SIGINT)
        return super().local_update(order, site, rng)
'''


@pytest.mark.services
def test_kill_9(run_file: Path, tmp_path: Path) -> None:
    """The process is killed in the second run; in the same folder the same command then does what was left."""
    out, path = tmp_path / "out", str(Path(__file__).parent)
    method = f"method=[lora, {{name: 'own_methods:Deadly', flag: {tmp_path / 'flag'}}}]"
    arguments = ("compare", run_file, method, "--out", out)
    assert fedpipe(*arguments, PYTHONPATH=f"{path}:{Path(path).parent}").returncode == -9
    done = fedpipe(*arguments, PYTHONPATH=f"{path}:{Path(path).parent}")
    assert done.returncode == 0, done.stderr
    assert "lora, seed 0: done before" in done.stdout
    assert {run["status"] for run in told(out)["runs"].values()} == {"finished"}


@pytest.mark.services
def test_on_one_ray(ray_here: None, run_file: Path, tmp_path: Path) -> None:
    """The figures are those in one process."""
    both = ("compare", run_file, "method=lora,flora")
    assert here(*both, "fleet.ray=true", "--out", tmp_path / "ray") == 0
    assert here(*both, "--out", tmp_path / "serial") == 0
    for label in ("lora-0", "flora-0"):
        assert summary(tmp_path / "ray" / label)["tuned"] == summary(tmp_path / "serial" / label)["tuned"]


# -- figures


def test_spread_over_seeds() -> None:
    """Of 1, 2 and 6: mean 3, squares 4 + 1 + 9 = 14, over n - 1 = 2: sqrt(7). One of three has no second figure."""
    found = over_seeds([{"x": 1, "y": 5.0}, {"x": 2, "y": None}, {"x": 6, "y": 7.0, "name": "a"}])
    assert found["x"] == {"mean": 3.0, "std": pytest.approx(math.sqrt(7)), "seeds": 3}
    assert found["y"] == {"mean": 6.0, "std": pytest.approx(math.sqrt(2)), "seeds": 2}
    assert "name" not in found


def history(losses: list[float], seconds: float, megabytes: float) -> History:
    """A run whose rounds take so long and send so much up."""
    rounds = [
        {
            "round": i + 1, "eval": {"global": {"loss": loss}}, "virtual_seconds": seconds,
            "bytes_up": megabytes * 1e6, "bytes_down": 0,
        }
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    return History("x", {"method": {"name": "lora"}}, {}, rounds, [], {})


def test_budget_and_target() -> None:
    """fast ends after 4 s, so that is the budget; slow has then done two rounds. The worse best is fast's, 3."""
    common, found = common_figures({"fast": history([5, 4, 3.5, 3], 1, 1), "slow": history([5, 4.5, 2, 1], 2, 10)})
    assert common == {"virtual_seconds": 4.0, "loss": 3}
    assert found["fast"] == {"loss_within_budget": 3, "virtual_seconds_to_target": 4.0, "bytes_to_target": 4e6}
    assert found["slow"] == {"loss_within_budget": 4.5, "virtual_seconds_to_target": 6.0, "bytes_to_target": 3e7}
    assert common_figures({"fast": history([5], 1, 1), "blind": history([], 1, 1)}) == ({}, {})


def test_a_list_of_methods_needs_names() -> None:
    with pytest.raises(UserError, match="names no method"):
        entries_of(None, [])
