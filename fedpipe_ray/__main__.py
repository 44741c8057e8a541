"""The command line, and the one place that puts the parts together: configuration, fleet, run folder, display."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import commands
from .arguments import parse
from .errors import AllEdgesLost, Interrupted, UserError
from .process import REPOSITORY, Stoppable, clean_up_on_sigterm, close_log, closing, set_up_logging, siblings

if TYPE_CHECKING:
    from .fleet import Fleet
    from .methods.base import Method
    from .settings import Run
    from .trackers import Trackers
    from .trial import Executor

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled, and bitsandbytes would load the compiler: 1.5 s a process
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 a bug, 2 bad input, 3 every edge lost, 128 + signal when stopped."""
    options = parse(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        siblings()
        return int(COMMANDS[options.command](options) or 0)
    except UserError as error:
        print(f"fedpipe: {error}", file=sys.stderr)
        return 2
    except AllEdgesLost as error:
        print(
            f"fedpipe: {error}\nThe checkpoint before this round is kept: mend the cause on the edges and "
            "fedpipe resume, or start a new run with other settings",
            file=sys.stderr,
        )
        return 3
    except Interrupted as error:
        return 128 + error.signum
    except SystemError as error:  # what an exception out of a signal's handler becomes within Ray's calls
        if not isinstance(error.__cause__, Interrupted):
            raise
        return 128 + error.__cause__.signum
    except KeyboardInterrupt:
        print("fedpipe: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fedpipe methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report it once more
        return 141
    finally:
        close_log()


def starting_ray(run: Run) -> contextlib.AbstractContextManager[None]:
    """Ray, if the run wants it, starts while the block imports torch and looks at the model.

    Not where the built-in model must be pretrained first: beside Ray's processes that takes a quarter longer.
    """
    from .data.docstrings import cache_folder

    cached = not run.model.name.startswith("builtin:") or any((cache_folder() / "models").glob("llama-*"))
    if not (run.fleet.ray and cached):
        return contextlib.nullcontext()
    from actors.connect import starting, without_gpus

    return starting(run.fleet.address, without_gpus(run))


def make_fleet(run: Run, method: Method, private_dir: Path) -> Fleet:
    """Ray actors, or this process."""
    if run.fleet.ray:
        from actors.connect import set_environment

        set_environment(run.fleet.address)
        from actors.fleet import RayFleet

        return RayFleet(run, method, private_dir.resolve())
    from .fleet import SerialFleet

    return SerialFleet(run, method, private_dir.resolve())


def make_trackers(run: Run) -> Trackers:
    """Where a run's figures go beside its folder, not opened yet. Raises UserError if a package is missing."""
    from actors.metrics import RayMetrics

    from .trackers import Trackers, chosen

    return Trackers([*chosen(run.track), *([RayMetrics()] if run.fleet.ray and run.track.ray_metrics else [])])


def one_cluster(run: Run) -> contextlib.AbstractContextManager[None]:
    """One Ray for all fleets that a command makes, if the run wants it."""
    if not run.fleet.ray:
        return contextlib.nullcontext()
    from actors.connect import connected, without_gpus

    return connected(run.fleet.address, without_gpus(run))


def make_executor(run: Run, parallel: int, own_fleet: bool) -> Executor:
    """Ray workers for the trials of a search that starts from `run`, or this process."""
    if run.fleet.ray:
        from actors.pool import TrialPool

        return Stoppable(TrialPool(run, parallel, own_fleet))
    from .trial import SerialExecutor

    return SerialExecutor()


def load(config: Path | str, overrides: Sequence[str] = ()) -> Run:
    """The resolved run of a file and its overrides. Raises UserError."""
    return loader(config)(overrides)


def loader(config: Path | str) -> Callable[[Sequence[str]], Run]:
    """As `load`, of a file that is read once, with other overrides each time."""
    from clusters import find_profiles

    from .config import run_file
    from .methods import make_method

    read = run_file(Path(config), find_profiles)

    def checked(overrides: Sequence[str]) -> Run:
        run = read(overrides)
        make_method(run.method)  # its faults before anything is loaded or pretrained
        return run

    return checked


def new_folder(run: Run, options: argparse.Namespace) -> str:
    """Path or URL where a run goes: --out, the configuration's `out`, or runs/ with name and time."""
    return options.out or run.out or f"runs/{options.config.stem}-{datetime.now():%Y%m%d-%H%M%S}"


def command_run(options: argparse.Namespace) -> None:
    """A new run."""
    from .display import Display

    run = load(options.config, options.overrides)
    place, trackers = new_folder(run, options), make_trackers(run)
    display = Display(run.track.display)
    display.note("loading torch and starting Ray" if run.fleet.ray else "loading torch")
    with starting_ray(run):
        from .config import training_hash
        from .record import RunFolder
        from .run import Experiment, go_on, settled

        RunFolder.check_free(place)
        run, method = settled(run)
        folder = RunFolder.create(place, run)
    set_up_logging(display, folder.path / "log.txt")
    display.note(f"run folder {folder.name}")
    try:
        experiment = Experiment(run, method, folder, make_fleet, display, trackers)
        with closing(experiment.fleet), trackers:
            experiment.begin(training_hash(run))
            summary = go_on(experiment, display)
    except BaseException:
        folder.discard_if_not_begun()
        raise
    finally:
        folder.close()
    display.finish(summary, folder.name)


def command_resume(options: argparse.Namespace) -> None:
    """A run goes on from its last checkpoint."""
    from .display import Display
    from .record import RunFolder, environment_changes
    from .run import Experiment, extended, go_on, preflight

    with contextlib.closing(RunFolder.open(options.folder)) as folder:
        run = folder.run(options.overrides)
        display = Display(run.track.display)
        set_up_logging(display, None)
        folder.lock()
        set_up_logging(display, folder.path / "log.txt")
        trackers, point = make_trackers(run), folder.load_checkpoint()
        run = extended(run, folder, point)
        for change in environment_changes(folder, run):
            logging.getLogger("fedpipe").warning("the environment changed, bits may differ: %s", change)
        display.note(f"resuming {folder.name} after round {point.start.round}")
        experiment = Experiment(run, preflight(run), folder, make_fleet, display, trackers)
        with closing(experiment.fleet), trackers:
            experiment.resume(point)
            folder.rewrite_config(run)
            summary = go_on(experiment, display)
    display.finish(summary, folder.name)


def command_evaluate(options: argparse.Namespace) -> None:
    """Base against tuned, one table; or both on public benchmarks."""
    if options.lm_eval is not None:
        from .harness import command

        command(options)
    else:
        commands.evaluate(options, load, make_fleet)


def command_compare(options: argparse.Namespace) -> int:
    """Several methods, one table."""
    from clusters import find_profiles

    return commands.compare(options, find_profiles, make_fleet, starting_ray, one_cluster)


def command_submit(options: argparse.Namespace) -> int:
    """A run as a job of a cluster; returns the exit code of its driver."""
    run = load(options.config, options.overrides)  # a mistake shows here, before anything is sent
    config = options.config.resolve()
    if not config.is_relative_to(REPOSITORY):
        raise UserError(f"{options.config} is not in {REPOSITORY}, the folder that is sent; copy it there")
    out = options.out or run.out
    if not out or not ("://" in out or out.startswith("/")):
        print(
            "fedpipe: warning: without --out URL or --out /shared/DIR the run folder is in the job's own copy of the "
            "code on the head, and goes with it", file=sys.stderr,
        )  # fmt: skip
    from actors.submit import submit

    command = ["python", "-m", "fedpipe_ray", "run", config.relative_to(REPOSITORY).as_posix(), *options.overrides]
    command += ["--out", options.out] if options.out else []
    return submit(options.address, command, REPOSITORY, options.env)


def command_check(options: argparse.Namespace) -> None:
    """Configuration, model, targets and the data this machine can see, or a cluster file; no actor, no training."""
    if options.cluster is not None:
        from actors.placement import pools_of, unplaceable
        from clusters import find_profiles
        from clusters.files import room

        from .config import load_run

        fleet = load_run(options.config, options.overrides, find_profiles).fleet
        print(room(options.cluster, {pool.name: pool.profile for pool in pools_of(fleet)}, unplaceable))
        return
    run = load(options.config, options.overrides)  # before torch is imported, so that a mistake shows at once
    from .display import Display
    from .results import check_data
    from .run import preflight

    display = Display()
    set_up_logging(display, None)
    method = preflight(run)
    make_trackers(run)
    for line in check_data(run, method):
        display.note(line)
    display.note(
        f"{options.config}: {len(run.fleet.edges)} edges, {run.rounds} rounds of {run.method['name']}: no fault found"
    )


def command_plan(options: argparse.Namespace) -> None:
    """What each edge would be given; trains nothing."""
    commands.plan(options, load(options.config, options.overrides), make_fleet)


def command_allocate(options: argparse.Namespace) -> None:
    """Searches what each class of edges is given, under budgets."""
    own = {"name": "fedpipe", "deadline_seconds": options.latency}
    run = load(options.config, [*options.overrides, *(f"method.{key}={value}" for key, value in own.items())])
    from .display import Display

    display = Display(run.track.display)
    set_up_logging(display, None)
    from tuning.allocation import allocate

    out = options.out or Path("runs") / f"allocate-{options.config.stem}"
    with starting_ray(run):
        clean_up_on_sigterm()  # Ray has taken the signal
        measure = partial(make_executor, run, 1, False)
        allocate(run, options, out, make_fleet, measure, display)


def command_tune(options: argparse.Namespace) -> None:
    """A campaign of trials, new or from where it was left."""
    from tuning.plan import load_plan

    plan = load_plan(options.config, options.overrides, loader)
    run, settings = plan.base, plan.settings
    if not run.fleet.ray and (settings.parallel > 1 or settings.fleet == "own"):
        raise UserError(f"parallel: {settings.parallel}, fleet: {settings.fleet}: only on Ray; set fleet.ray: true")
    from .display import Display

    display = Display(run.track.display)
    set_up_logging(display, None)
    make = partial(make_executor, run, settings.parallel, settings.fleet == "own")
    out = options.out or Path("runs") / plan.name
    try:
        with starting_ray(run):
            clean_up_on_sigterm()  # Ray has taken the signal
            from tuning.tune import carry_out

            from .run import pretrain

            pretrain(run, display)
            carry_out(plan, out, make, display)
    except (Interrupted, KeyboardInterrupt):
        display.note(f"stopped; the same command goes on from {out}")
        raise


COMMANDS = {
    "allocate": command_allocate,
    "tune": command_tune,
    "plan": command_plan,
    "run": command_run,
    "resume": command_resume,
    "compare": command_compare,
    "evaluate": command_evaluate,
    "export": commands.export,
    "report": commands.report,
    "watch": commands.watch,
    "generate": commands.generate,
    "submit": command_submit,
    "methods": commands.methods,
    "check": command_check,
}

if __name__ == "__main__":
    sys.exit(main())
