"""Weights & Biases: a run in the run folder's `wandb/`, sent by `wandb sync` or, in mode online, at once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from . import Begun
from .series import hyperparameters

UPLOAD_SECONDS = 60.0  # at the end, then the rest is left to `wandb sync`


class WandB:
    """mode: offline writes files only and reaches nobody.

    W&B's own process holds rows back for a long time and loses them if the run is killed. So a resumed run writes once
    more what a process before it did not close, and removes what of that lies there.
    """

    name = "Weights & Biases"

    def __init__(self, mode: Literal["offline", "online"], project: str) -> None:
        self.mode, self.project = mode, project

    def start(self, begun: Begun) -> None:
        """Opens the run; of a run that goes on, the same one by its id."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._kept = begun.kept
        unclosed = begun.kept.pop("open", None)
        if unclosed is not None:
            shutil.rmtree(begun.folder / "wandb" / unclosed, ignore_errors=True)
            begun.kept.pop("round", None)
            begun.kept.update({"round": begun.kept["closed"]} if "closed" in begun.kept else {})
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True,
            x_save_requirements=False, finish_timeout=UPLOAD_SECONDS,
        )  # fmt: skip
        self._run = wandb.init(
            project=self.project, name=begun.name, id=begun.kept.setdefault("run", secrets.token_hex(4)),
            resume="allow", mode=self.mode, dir=str(begun.folder), force=self.mode == "online", settings=quiet,
            config=hyperparameters(begun.run), allow_val_change=True, job_type=str(begun.run.method["name"]),
        )  # fmt: skip
        begun.kept["open"] = Path(self._run.dir).parent.name

    def round(self, round: int, values: Mapping[str, float], record: Mapping[str, Any]) -> None:
        """Adds the figures, the round as their step."""
        self._run.log(dict(values), step=round, commit=True)

    def finish(self, status: str, round: int, values: Mapping[str, float]) -> None:
        """Ends the run; the last figures stand in its summary, for its last step is closed."""
        self._run.summary.update(dict(values))
        self._run.finish(exit_code=0 if status in ("finished", "stopped_early") else 1)
        self._kept["closed"] = self._kept["round"]
        del self._kept["open"]
