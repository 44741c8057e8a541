"""`fedpipe tune`: a campaign from its file to the best run file and a report, in a folder in which it can go on."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from sqlalchemy.exc import OperationalError

from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError
from fedpipe_ray.trial import Executor

from .campaign import Driver
from .claim import Claim, own_folder
from .plan import Plan
from .report import write_report
from .results import results
from .study import close_storage, enqueue, hidden, open_storage, open_study, pruner_of, sampler_of, with_driver
from .watch import Watch, counts_in_words

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk, or a limit, says


def study_of(plan: Plan, folder: Path) -> optuna.Study:
    """The campaign's study, new or as it was left. Raises UserError."""
    settings = plan.settings
    storage = open_storage(settings.storage, folder)
    with_pruner = pruner_of(settings.pruner_name, plan.most_rounds)
    study = open_study(
        storage, plan.name, plan.owner(), plan.ways, sampler_of(settings.sampler, settings.seed, 0, settings.parallel),
        with_pruner,
    )  # fmt: skip
    done = len(study.get_trials(deepcopy=False))
    study.sampler = sampler_of(settings.sampler, settings.seed, done, settings.parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(list(plan.objectives))
    return study


def carry_out(plan: Plan, folder: Path, make_executor: Callable[[], Executor], display: Display) -> optuna.Study:
    """Runs what is left of a campaign and writes its results. Raises UserError, also where no trial is feasible.

    A database that goes away, and a study that another driver took, end it with what to do.
    """
    if (track := plan.base.track).tensorboard or track.mlflow or track.wandb:
        display.note("track: trials go to no tracker; run the best one, best.yaml, to see its rounds there")
    settings = plan.settings
    where = hidden(settings.storage) if settings.storage else "journal.log"
    with told(plan.name, where, folder), own_folder(folder, plan.name, where), ExitStack() as stack:
        study = study_of(plan, folder)
        stack.callback(close_storage, study)
        claim = Claim(study, folder)
        stack.callback(claim.release)
        enqueue(study, plan.space, settings.enqueue)  # its faults before a worker starts
        watch = Watch(plan, study, display)

        def show(driver: Driver) -> None:
            claim.check()
            watch.show(driver)

        with closing(make_executor()) as executor, watch.showing():
            driver = Driver(plan, study, executor, folder, show)
            driver.go()
        _write_results(plan, study, folder, driver.last_failure, watch)
    return study


@contextmanager
def told(name: str, where: str, folder: Path) -> Iterator[None]:
    """Errors of what a campaign is stored in, `where` and `folder`, as UserError with what to do."""
    try:
        yield
    except (StorageInternalError, OperationalError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"storage: {where} went away: {why}; when it is back, the same command goes on") from None
    except UpdateFinishedTrialError:
        raise UserError(
            f"study {name!r} was taken over by another driver, which ended a trial of this one; let only one "
            "go on: the same command, when the other has ended"
        ) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; make room, then the same command goes on"
        ) from None


def _write_results(plan: Plan, study: optuna.Study, folder: Path, last_failure: str, watch: Watch) -> None:
    """The best run files and the report, and where they are. Raises UserError where no trial is feasible."""
    lines, storage = [counts_in_words(study.get_trials(deepcopy=False), plan)], plan.settings.storage
    dashboard = f"optuna-dashboard {with_driver(hidden(storage)) if storage else folder / 'journal.log'}"
    run_it = ""
    try:
        best = results(plan, study, folder, last_failure)
        lines += [watch.line(trial) for trial in best]
        run_it = f"\nrun it: fedpipe run {folder / 'best.yaml'}"
    finally:
        drawn = write_report(folder / "report.html", study, list(plan.objectives), lines, dashboard)
        report = f"report: {folder / 'report.html'}\n" if drawn else ""
        for line in [*lines, f"{report}live:   {dashboard}{run_it}"]:
            watch.display.note(line)
