"""Commands that need nothing of actors, tuning or clusters: they look at what runs have left."""

from __future__ import annotations

import argparse

from .process import clean_up_on_sigterm, set_up_logging


def export(options: argparse.Namespace) -> None:
    """The adapter of a run, or a merged model."""
    from .display import Display
    from .results import export_run

    display = Display()
    set_up_logging(display, None)
    clean_up_on_sigterm()
    what = export_run(options.folder, options.out, options.merge, options.edge)
    display.note(f"wrote the {what} to {options.out}")


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
