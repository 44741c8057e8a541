"""Traces: when an edge can be asked, as intervals of the virtual clock, in a profile or a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .errors import UserError

Trace: TypeAlias = str | list[tuple[float, float]] | None
Rows: TypeAlias = dict[str, list[list[str]]]  # of a file, by edge
COLUMNS = ("edge", "from", "to")


def trace_fault(trace: Trace, period: float | None) -> str | None:
    """What is wrong with a profile's trace and trace_period_seconds; None if they can be used."""
    if period is not None and not (period > 0 and trace is not None):
        return f"trace_period_seconds: {period:g} must be above 0, and there must be a trace to repeat"
    if trace is not None and len(trace) == 0:
        return "trace: has no interval; write null for always"
    for start, end in trace if isinstance(trace, list) else ():
        if not 0 <= start < end <= (period or math.inf):
            within = f" and within the {period:g} s of trace_period_seconds" if period else ""
            return f"trace: [{start:g}, {end:g}] must begin at 0 or later, end after its beginning{within}"
    return None


def next_seconds(trace: Trace, period: float | None, clock_seconds: float) -> float:
    """The first moment from `clock_seconds` on at which a trace has its edge there; infinity if there is none."""
    if trace is None:
        return clock_seconds
    assert not isinstance(trace, str), "load_run reads the files of traces"
    lap = period * (clock_seconds // period) if period else 0.0
    begins = [lap, lap + period] if period else [0.0]
    return min(
        (max(clock_seconds, begin + start) for begin in begins for start, end in trace if begin + end > clock_seconds),
        default=math.inf,
    )


def with_traces(edges: Mapping[str, Any], folder: Path, files: dict[str, Rows] | None = None) -> dict[str, Any]:
    """Profiles of a run file, as read, with the traces that they name as files written out. Raises UserError.

    A file is looked for in `folder`, then in the working directory. files: what was read before, by name; grows.
    """
    files = {} if files is None else files
    whole = dict(edges)
    for edge, profile in edges.items():
        if isinstance(profile, dict) and isinstance(name := profile.get("trace"), str):
            where = f"fleet.edges.{edge}.trace"
            if name not in files:
                files[name] = read_traces(name, folder, where)
            if edge not in files[name]:
                raise UserError(f"{where}: {name} has no row of edge {edge}; add one, or set trace to null")
            whole[edge] = {**profile, "trace": files[name][edge]}
    return whole


def read_traces(name: str, folder: Path, where: str) -> Rows:
    """Intervals by edge, as written, in a CSV file with the columns edge, from, to. Raises UserError."""
    path = next((place for place in (folder / name, Path(name)) if place.is_file()), None)
    if path is None:
        raise UserError(f"{where}: no file {name}, neither in {folder} nor in the working directory")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{where}: {path} has no column {missing[0]}; its first line must be edge,from,to")
            found: Rows = {}
            for row in reader:
                found.setdefault(row["edge"], []).append([with_unit(row[column] or "") for column in COLUMNS[1:]])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: cannot read {path}: {error}") from None
    return found


def with_unit(text: str) -> str:
    """A figure of a CSV file as a quantity: seconds where it names no unit."""
    text = text.strip()
    return f"{text} s" if text[-1:].isdigit() or text.endswith(".") else text
