"""What every benchmark prints and writes: one table, with the commit, machine, date and seeds it was measured with."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def parser(text: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's options; `text`, its docstring, is what --help says."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def publish(name: str, question: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Prints `rows` as a table and writes them with their circumstances to results/NAME.json."""
    table = Table(title=question, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    Console(width=max(140, 12 * len(rows[0]))).print(table)
    record = {
        "question": question,
        "date": date.today().isoformat(),
        "commit": commit(),
        **machine(),
        **facts,
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def commit() -> str:
    """The commit measured, with `+` if the tree differs from it."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=HERE, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """The machine measured on, and how busy it was when the benchmark ended."""
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
