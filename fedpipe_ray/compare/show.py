"""The tables at the end of a comparison; each is at most 80 columns wide with names of up to 12 letters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from fedpipe_ray.display import number

Column = tuple[str, str, float, int]
COLUMNS: dict[str, list[Column]] = {  # title -> [(heading, figure, divided by, digits)]
    "test rows": [
        ("loss\nbase", "base_loss", 1, 3), ("loss\ntuned", "loss", 1, 3), ("accuracy\nbase", "base_accuracy", 1, 3),
        ("accuracy\ntuned", "accuracy", 1, 3), ("worst edge's\nloss", "worst_loss", 1, 3),
    ],
    "costs": [
        ("MB up", "bytes_up", 1e6, 2), ("MB down", "bytes_down", 1e6, 2), ("virtual s", "virtual_seconds", 1, 1),
        ("wall s", "wall_seconds", 1, 1), ("parameters\nof the result", "result_parameters", 1, 0),
    ],
    "validation rows": [
        ("loss within\n{virtual_seconds} virtual s", "loss_within_budget", 1, 3),
        ("virtual s\nto loss {loss}", "virtual_seconds_to_target", 1, 1),
        ("MB both ways\nto loss {loss}", "bytes_to_target", 1e6, 2),
    ],
}  # fmt: skip
WITHOUT_BASE = ("base_loss", "base_accuracy")  # means alone: their spread says nothing of a method


def tables(told: Mapping[str, Any]) -> Iterator[Table]:
    """Quality, costs, and what budget and target tell; without what no run has. told: as comparison.json."""
    found, seeds = told["over_seeds"], told["seeds"]
    common = {key: number(value, 3) for key, value in told["common"].items()}
    for title, columns in COLUMNS.items():
        shown = [column for column in columns if any(column[1] in figures for figures in found.values())]
        if not shown:
            continue
        spread = f", mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
        table = Table(box=None, pad_edge=False, title=title + spread, title_justify="left")
        table.add_column("method", overflow="fold", vertical="top")
        for heading, *_ in shown:
            table.add_column(heading.format(**common) if common else heading, justify="right", no_wrap=True)
        for label, figures in found.items():
            cells = [_cell(figures.get(name), name, unit, digits, len(seeds)) for _, name, unit, digits in shown]
            table.add_row(label, *cells)
        yield table


def _cell(value: Mapping[str, float] | None, name: str, unit: float, digits: int, seeds: int) -> str:
    """`4.720 ± 0.012`; without a spread that rounds to 0, and with how many seeds have it where not all do."""
    if value is None:
        return "-"
    mean, std = (value[key] / unit for key in ("mean", "std"))
    text = number(mean, digits) if digits else f"{mean:,.0f}"
    if round(std, digits) > 0 and name not in WITHOUT_BASE:
        text += f" ± {number(std, digits) if digits else f'{std:,.0f}'}"
    return text if value["seeds"] == seeds else f"{text} ({value['seeds']:.0f} of {seeds})"
