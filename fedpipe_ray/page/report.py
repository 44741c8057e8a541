"""Reads runs and writes their page: `fedpipe report`, and the end of every run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpipe_ray.display import Display
from fedpipe_ray.errors import UserError

from .history import History
from .page import write_page

if TYPE_CHECKING:
    from fedpipe_ray.record import RunFolder

FILE = "report.html"
log = logging.getLogger("fedpipe")


def write_report(places: Sequence[str], out: Path) -> None:
    """Writes the page of the runs in folders or under URLs to `out`. Raises UserError."""
    display, histories = Display(), []
    with display.task("reading the runs") as bar:
        for number, place in enumerate(places):
            bar(number, len(places), place)
            histories.append(History.read(place))
    if not any(one.rounds for one in histories):
        display.note(f"no round is done yet in {' '.join(places)}; the page has what there is")
    try:
        write_page(out, histories)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another file with --out") from None
    display.note(f"wrote {out}")


def add_report(folder: RunFolder) -> None:
    """Writes report.html of a run into its folder; a run does not fail for it."""
    try:
        write_page(folder.path / FILE, [History.of(folder.name, folder.path)])
        folder.publish()
    except Exception as error:
        log.warning("%s was not written: %s; try: fedpipe report %s", FILE, error, folder.name)
