"""Commands that need nothing of actors, tuning or clusters but what __main__ hands them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .process import clean_up_on_sigterm, set_up_logging

if TYPE_CHECKING:  # the command line starts without them
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from .config import FindProfiles
    from .run import MakeFleet
    from .settings import Run

    Around = Callable[[Run], AbstractContextManager[None]]


def evaluate(options: argparse.Namespace, load: Callable[[Path, Sequence[str]], Run], make_fleet: MakeFleet) -> None:
    """Base against tuned, one table. Raises UserError."""
    from .display import Display, comparison
    from .results import evaluate_adapter, evaluate_run

    given = [name for name in ("lm_eval_path", "limit", "batch_size", "out") if getattr(options, name) is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} goes with --lm-eval TASKS; leave it out, or name tasks")
    display, path = Display(), Path(options.what)
    set_up_logging(display, None)
    if "://" in options.what or (path / "config.yaml").is_file():
        base, tuned = evaluate_run(options.what, options.overrides, options.data, make_fleet, display)
    elif (path / "adapter_config.json").is_file():
        if options.config is None or options.data is None:
            raise UserError(
                f"{options.what} is an adapter; say how rows are read and which: --config CONFIG --data SOURCE"
            )
        base, tuned = evaluate_adapter(path, load(options.config, options.overrides), options.data, display)
    else:
        raise UserError(
            f"{options.what} is neither a run folder (config.yaml) nor a PEFT adapter (adapter_config.json)"
        )
    display.console.print(comparison(base, tuned))


def compare(
    options: argparse.Namespace, find_profiles: FindProfiles, make_fleet: MakeFleet, starting: Around, connected: Around
) -> int:
    """Several methods, one table; the exit code. starting: while torch is loaded; connected: one Ray for all runs."""
    from .compare.asked import asked

    wanted = asked(options.config, options.overrides, options.seeds, find_profiles)
    from .display import Display

    run = wanted.run
    display = Display(run.track.display)
    set_up_logging(display, None)
    display.note("loading torch and starting Ray" if run.fleet.ray else "loading torch")
    with starting(run):
        from .compare.carry import Comparison
        from .run import pretrain

        pretrain(run, display)
        out = options.out or Path("runs") / f"compare-{options.config.stem}"
        comparison = Comparison(wanted, out, make_fleet, display)
        comparison.check()
        with connected(run):
            return comparison.carry_out()


def plan(options: argparse.Namespace, run: Run, make_fleet: MakeFleet) -> None:
    """What each edge would be given, as a table and in --out. Raises UserError."""
    from .display import Display, plan_table
    from .results import plan_run, write_plan

    display = Display(run.track.display)
    set_up_logging(display, None)
    clean_up_on_sigterm()
    deadline, plans = plan_run(run, make_fleet, display, options.shapes)
    try:
        write_plan(options.out, deadline, plans)
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written: {error.strerror or error}") from None
    display.console.print(plan_table(deadline, plans))
    display.note(f"wrote {options.out}")


def export(options: argparse.Namespace) -> None:
    """The adapter of a run, or a merged model."""
    from .display import Display
    from .results import export_run

    display = Display()
    set_up_logging(display, None)
    clean_up_on_sigterm()
    what = export_run(options.folder, options.out, options.merge, options.edge)
    display.note(f"wrote the {what} to {options.out}")


def generate(options: argparse.Namespace) -> None:
    """What base and tuned model answer to prompts."""
    from .generate import command

    command(options)


def report(options: argparse.Namespace) -> None:
    """A page of one run or several."""
    from .page.report import write_report

    write_report(options.runs, options.out)


def watch(options: argparse.Namespace) -> None:
    """The page of a run in progress, live."""
    from .page.watch import serve_run

    serve_run(options.run, options.port)


def methods(options: argparse.Namespace) -> None:
    """The methods, a line each; or all about one."""
    from .methods import details, listing

    print("\n".join(listing() if options.name is None else details(options.name)))
