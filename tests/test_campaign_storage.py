"""Campaigns stored in a real PostgreSQL and a real MariaDB on loopback, from Debian's packages."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from campaigns_made import Curves, Stops, by_rate, campaign, carried_out, plan_of
from databases import SERVERS, Server
from optuna.trial import TrialState
from runs import ROOT, command, env, here

from fedpipe_ray.errors import UserError
from fedpipe_ray.trial import Event
from tuning.study import RETRY_OF, open_storage

pytestmark = pytest.mark.services


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server without databases; it is ended by its own process id."""
    kind = request.param
    if not kind.installed():
        pytest.skip(kind.missing)
    with kind() as one:
        yield one


@pytest.fixture
def database(server: Server, request: pytest.FixtureRequest) -> str:
    """The URL of a database of the test's own."""
    name = f"d{abs(hash(request.node.name)) % 10**9}"
    server.create(name)
    return f"{server.url}/{name}"


@pytest.mark.parametrize("events", [1, 8])
def test_a_driver_that_goes_away(run_file: Path, tmp_path: Path, database: str, events: int) -> None:
    plan = plan_of(run_file, trials=5, parallel=3, pruner="none", storage=database)
    with pytest.raises(KeyboardInterrupt):
        carried_out(plan, tmp_path, Stops(by_rate, events))
    trials = carried_out(plan, tmp_path, Curves(by_rate))
    assert [trial.state for trial in trials].count(TrialState.COMPLETE) == 5
    left = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    assert sorted(trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs) == left
    assert left


def test_kill_minus_nine_and_go_on(run_file: Path, tmp_path: Path, database: str) -> None:
    out, path = tmp_path / "out", campaign(run_file, trials=4, storage=database, constraints={"bytes": "1GB"})
    with (tmp_path / "log").open("w") as file:
        process = subprocess.Popen(command("tune", path, "--out", out), cwd=ROOT, env=env(), stdout=file, stderr=file)
    deadline = time.monotonic() + 240
    while not list((out / "trials").glob("*.jsonl")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert here("tune", path, "--out", out) == 0
    trials = optuna.load_study(study_name="campaign", storage=open_storage(database, out)).trials
    tried_again = sum(RETRY_OF in trial.user_attrs for trial in trials)
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials) == 4
    assert len(trials) == 4 + tried_again
    assert not (out / "journal.log").exists()


class At(Curves):
    """Does something at its second event."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(by_rate)
        self.action, self.events = action, 0

    def next(self, timeout_seconds: float) -> Event | None:
        self.events += 1
        if self.events == 2:
            self.action()
        return super().next(timeout_seconds)


def test_a_second_driver_is_refused(run_file: Path, tmp_path: Path, database: str) -> None:
    """With another folder, while the first has a trial at work: that goes on to its end."""
    plan, told = plan_of(run_file, storage=database, pruner="none"), []

    def second() -> None:
        with pytest.raises(UserError) as caught:
            carried_out(plan, tmp_path / "two", Curves(by_rate))
        told.append(str(caught.value))

    trials = carried_out(plan, tmp_path / "one", At(second))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert "study 'campaign' is being carried out by another driver (process" in told[0]
    assert str(tmp_path / "one") in told[0]
    assert carried_out(plan, tmp_path / "two", Curves(by_rate)) == trials  # the first has ended


def test_a_lost_claim_ends_with_a_plain_message(run_file: Path, tmp_path: Path, database: str) -> None:
    """Another driver failed the trial at work, as it would when our connection was lost."""
    plan = plan_of(run_file, storage=database, pruner="none")

    def other() -> None:
        optuna.load_study(study_name="campaign", storage=open_storage(database, tmp_path)).tell(
            0, state=TrialState.FAIL
        )

    with pytest.raises(UserError, match="was taken over by another driver, which ended a trial of this one"):
        carried_out(plan, tmp_path, At(other))


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_goes_away(run_file: Path, tmp_path: Path, kind: type[Server]) -> None:
    if not kind.installed():
        pytest.skip(kind.missing)
    with kind() as server:
        server.create("gone")
        plan = plan_of(run_file, storage=f"{server.url}/gone", pruner="none")

        def stop() -> None:
            server.process.send_signal(server.stop)
            server.process.wait(60)

        with pytest.raises(UserError, match=r"went away: .*; when it is back, the same command goes on") as caught:
            carried_out(plan, tmp_path, At(stop))
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_said_without_it(run_file: Path, tmp_path: Path, database: str) -> None:
    plan = plan_of(run_file, storage=database.replace("secret", "wrong"))
    with pytest.raises(UserError, match=r"password authentication failed|Access denied for user") as caught:
        carried_out(plan, tmp_path, Curves(by_rate))
    assert ":wrong" not in str(caught.value)


def test_two_campaigns_of_one_name_in_one_database(run_file: Path, tmp_path: Path, database: str) -> None:
    carried_out(plan_of(run_file, storage=database), tmp_path / "one", Curves(by_rate))
    other = plan_of(run_file, storage=database, constraints={"loss": 3.0})
    with pytest.raises(UserError, match="belongs to another campaign: constraints differ"):
        carried_out(other, tmp_path / "two", Curves(by_rate))
