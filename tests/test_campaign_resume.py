"""A driver that goes away: what a kill leaves, and that no trial is lost or doubled."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from campaigns_made import Curves, Stops, by_rate, campaign, carried_out, plan_of
from optuna.trial import TrialState
from runs import ROOT, command, env, here

from fedpipe_ray.errors import UserError
from fedpipe_ray.trial import Event
from tuning.study import RETRY_OF, mended, open_storage, recover, sampler_of
from tuning.tune import study_of


@pytest.mark.parametrize("events", [0, 1, 2, 3, 7, 8, 11])
def test_no_trial_is_lost_or_doubled_wherever_a_driver_goes_away(run_file: Path, tmp_path: Path, events: int) -> None:
    plan = plan_of(run_file, trials=6, parallel=3, pruner="none", enqueue=[{"local.lr": 0.05}, {"method.rank": 2}])
    with pytest.raises(KeyboardInterrupt):
        carried_out(plan, tmp_path, Stops(by_rate, events))
    before = {t.number: t for t in study_of(plan, tmp_path).trials}
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    tried_again = {t.user_attrs[RETRY_OF]: t for t in trials if RETRY_OF in t.user_attrs}
    running = {n for n, t in before.items() if t.state == TrialState.RUNNING}
    assert tried_again.keys() == running
    assert all(tried_again[n].params == before[n].params for n in running)
    assert all(trials[n].value == t.value for n, t in before.items() if t.state == TrialState.COMPLETE)
    assert [t.state for t in trials].count(TrialState.COMPLETE) == 6
    assert sum("enqueued" in t.user_attrs and t.state == TrialState.COMPLETE for t in trials) == 2
    assert carried_out(plan, tmp_path, Curves(by_rate)) == trials  # nothing is left to do


def test_a_kill_between_copy_and_failure_makes_no_second_copy(tmp_path: Path) -> None:
    study = optuna.create_study()
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.enqueue_trial(trial.params, user_attrs={RETRY_OF: 0})  # and here the driver was killed
    assert recover(study) == [0]
    assert recover(study) == []
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]
    assert study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params == trial.params


class Killed(BaseException):
    """Ends a driver that can do nothing more."""


def test_a_trial_that_kills_its_driver_is_not_tried_for_ever(run_file: Path, tmp_path: Path) -> None:
    """One retry: the second kill is the last of trial 0, and the others are done. Stops count for nothing."""

    class Kills(Curves):
        def next(self, timeout_seconds: float) -> Event | None:
            raise kind

    plan = plan_of(run_file, trials=3, retries=1, pruner="none")
    for kind in (KeyboardInterrupt, Killed, KeyboardInterrupt, Killed):
        with pytest.raises(kind):
            carried_out(plan, tmp_path, Kills(by_rate))
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    assert [(t.state.name, t.user_attrs.get(RETRY_OF)) for t in trials] == [
        ("FAIL", None), ("FAIL", 0), ("FAIL", 1), ("FAIL", 2), ("COMPLETE", None), ("COMPLETE", None)
    ]  # fmt: skip
    assert trials[3].user_attrs["reason"].startswith("2 drivers ended unasked while it was at work; `enqueue`")
    more = carried_out(plan_of(run_file, trials=3, enqueue=[trials[0].params]), tmp_path, Curves(by_rate))
    assert [t.state for t in more[6:]] == [TrialState.COMPLETE]


def test_a_torn_line_of_the_journal_is_taken_away(tmp_path: Path) -> None:
    plain = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    plain.tell(plain.ask(), 1.0)
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    os.symlink(path, tmp_path / "journal.log.lock")
    assert mended(path).read_bytes() == whole
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    again.tell(again.ask(), 2.0)
    assert [t.value for t in again.trials] == [1, 2]


@pytest.mark.parametrize("tail", [b'{"op_code": 4, "wor\n', b"\0" * 9 + b"\n", b"\xff\n", b"\0" * 9])
def test_a_damaged_last_line_of_the_journal_is_taken_away(run_file: Path, tmp_path: Path, tail: bytes) -> None:
    trials = carried_out(plan_of(run_file), tmp_path, Curves(by_rate))
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(tail)
    assert carried_out(plan_of(run_file), tmp_path, Curves(by_rate)) == trials


def test_another_damaged_line_is_named(run_file: Path, tmp_path: Path) -> None:
    carried_out(plan_of(run_file), tmp_path, Curves(by_rate))
    path = tmp_path / "journal.log"
    first, second, rest = path.read_bytes().split(b"\n", 2)
    path.write_bytes(first + b"\n" + second[:9] + b"\n" + rest)
    with pytest.raises(UserError, match=r"journal\.log: line 2 is damaged; bring the file back"):
        carried_out(plan_of(run_file), tmp_path, Curves(by_rate))
    (tmp_path / "study.json").write_text("")
    with pytest.raises(UserError, match=r"study\.json is damaged; remove it if"):
        carried_out(plan_of(run_file), tmp_path, Curves(by_rate))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file grows above so many bytes, as on a full disk."""
    handler, before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_journal_is_cut_and_not_written_anew(tmp_path: Path) -> None:
    """Where nothing can be written, nothing may be lost either."""
    path = tmp_path / "journal.log"
    path.write_bytes(b'{}\n{"op_')
    with files_of_at_most(1):
        mended(path)
    assert path.read_bytes() == b"{}\n"


def test_a_full_disk_ends_the_driver_with_what_to_do(run_file: Path, tmp_path: Path) -> None:
    plan, said = (
        plan_of(run_file, pruner="none"),
        "cannot write to .*: File too large; make room, then the same command goes on",
    )
    with files_of_at_most(3000), pytest.raises(UserError, match=said):
        carried_out(plan, tmp_path, Curves(by_rate))
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    assert [trial.state for trial in trials].count(TrialState.COMPLETE) == 4


def test_a_sampler_that_goes_on_does_not_begin_again() -> None:
    draws = {
        done: optuna.create_study(sampler=sampler_of("random", 0, done, 1)).ask().suggest_float("x", 0, 1)
        for done in (0, 1, 2)
    }
    assert len(set(draws.values())) == 3


@pytest.mark.services
def test_sigterm_while_ray_works_is_a_stop(run_file: Path, tmp_path: Path, ray_folder: Path) -> None:
    """Ray takes the signal when it starts."""
    out, path = tmp_path / "out", campaign(run_file, trials=99, pruner="none", set={"rounds": 3, "fleet.ray": True})
    surroundings = env(RAY_TMPDIR=str(ray_folder))
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(
            command("tune", path, "--out", out), cwd=ROOT, env=surroundings, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 240
    while not list((out / "trials").glob("*.jsonl")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert f"stopped; the same command goes on from {out}" in (tmp_path / "log").read_text()
    trials = optuna.load_study(study_name="campaign", storage=open_storage(None, out)).trials
    assert [t.user_attrs.get("stopped") for t in trials if t.state == TrialState.RUNNING] == [True]


@pytest.mark.services
def test_kill_minus_nine_and_go_on(run_file: Path, tmp_path: Path) -> None:
    """A driver in a process of its own, killed while it trains; then the same command."""
    out, path = tmp_path / "out", campaign(run_file, trials=6, pruner="none", set={"rounds": 3})
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(command("tune", path, "--out", out), cwd=ROOT, env=env(), stdout=file, stderr=file)
    deadline = time.monotonic() + 240
    while len(list((out / "trials").glob("*.jsonl"))) < 2:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert here("tune", path, "--out", out) == 0
    trials = optuna.load_study(study_name="campaign", storage=open_storage(None, out)).trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(done) == 6
    assert len(trials) - 6 == sum(RETRY_OF in trial.user_attrs for trial in trials) <= 1
    assert sorted(int(file.stem) for file in (out / "trials").glob("*.jsonl")) == [trial.number for trial in done]
    assert all(len(file.read_text().splitlines()) == 3 for file in (out / "trials").glob("*.jsonl"))
