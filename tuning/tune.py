"""`fedpipe tune`: a campaign from its file to the best run file and a report, in a folder in which it can go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning

from fedpipe_ray.display import Display
from fedpipe_ray.files import locked
from fedpipe_ray.trial import Executor

from .campaign import Driver
from .plan import Plan
from .report import write_report
from .results import results
from .study import close_storage, enqueue, hidden, open_storage, open_study, pruner_of, sampler_of
from .watch import Watch, counts_in_words


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
    """Runs what is left of a campaign and writes its results. Raises UserError, also where no trial is feasible."""
    if (track := plan.base.track).tensorboard or track.mlflow or track.wandb:
        display.note("track: trials go to no tracker; run the best one, best.yaml, to see its rounds there")
    with locked(folder, "a campaign"), ExitStack() as stack:
        study = study_of(plan, folder)
        stack.callback(close_storage, study)
        enqueue(study, plan.space, plan.settings.enqueue)  # its faults before a worker starts
        watch = Watch(plan, study, display)
        with closing(make_executor()) as executor, watch.showing():
            driver = Driver(plan, study, executor, folder, watch.show)
            driver.go()
        trials = study.get_trials(deepcopy=False)
        lines = [counts_in_words(trials, plan)]
        where = hidden(plan.settings.storage) if plan.settings.storage else str(folder / "journal.log")
        dashboard = f"optuna-dashboard {where}"
        try:
            best = results(plan, study, folder, driver.last_failure)
            lines += [watch.line(trial) for trial in best]
        finally:
            drawn = write_report(folder / "report.html", study, list(plan.objectives), lines, dashboard)
            for line in lines:
                display.note(line)
        report = f"report: {folder / 'report.html'}\n" if drawn else ""
        display.note(f"{report}live:   {dashboard}\nrun it: fedpipe run {folder / 'best.yaml'}")
    return study
