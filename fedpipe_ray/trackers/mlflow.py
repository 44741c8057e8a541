"""MLflow: a run in a tracking store, a database or a server, through MLflow's client alone."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from . import Begun
from .series import hyperparameters

log = logging.getLogger("fedpipe")
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is gone must not hold up the rounds: MLflow's own defaults wait for many minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "interrupted": "KILLED"}
ALWAYS = "cost/bytes_up"  # which every round has
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000  # what one call may hold


class MLflow:
    """uri: of the store, such as sqlite:///mlflow.db; project: the experiment's name."""

    name = "MLflow"

    def __init__(self, uri: str, project: str) -> None:
        self.uri, self.project = uri, project

    def start(self, begun: Begun) -> None:
        """Goes on with the run it had, from the last round that the store has; or makes one."""
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        log.info("opening MLflow at %s", self.uri)  # seconds: the import, and a new database's tables
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._metric, self._param = Metric, Param
        self._client = MlflowClient(self.uri)
        if not self._continued(begun):
            self._made(begun)

    def _continued(self, begun: Begun) -> bool:
        """Whether the store has the run of before."""
        from mlflow.exceptions import MlflowException

        if "run" not in begun.kept:
            return False
        self._run = begun.kept["run"]
        try:
            self._client.get_run(self._run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow at %s has no run %s; it gets a new one", self.uri, self._run)
            return False
        self._client.update_run(self._run, status="RUNNING")
        begun.kept["round"] = max((one.step for one in self._client.get_metric_history(self._run, ALWAYS)), default=0)
        return True

    def _made(self, begun: Begun) -> None:
        """A new run with its hyperparameters."""
        found = self._client.get_experiment_by_name(self.project)
        experiment = self._client.create_experiment(self.project) if found is None else found.experiment_id
        tags = {"fedpipe.method": str(begun.run.method["name"]), "fedpipe.folder": begun.name}
        made = self._client.create_run(experiment, run_name=begun.name, tags=tags)
        begun.kept.pop("round", None)
        begun.kept["run"] = self._run = made.info.run_id
        params = [self._param(key, str(value)[:LONGEST_PARAM]) for key, value in hyperparameters(begun.run).items()]
        for some in pieces(params, MOST_PARAMS):
            self._client.log_batch(self._run, params=some)

    def round(self, round: int, values: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Adds the figures, the round as their step."""
        now = int(time.time() * 1000)
        found = [self._metric(name, value, now, round) for name, value in values.items()]
        for some in pieces(found, MOST_METRICS):
            self._client.log_batch(self._run, metrics=some)

    def finish(self, status: str, round: int, values: Mapping[str, float]) -> None:
        """Ends the run: FINISHED, KILLED by a signal, or FAILED."""
        self.round(round, values, {})
        self._client.set_terminated(self._run, STATUS.get(status, "FAILED"))


def pieces(all: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """`all` in their order, in pieces of at most `most`."""
    return [all[at : at + most] for at in range(0, len(all), most)]
