"""What a run shows: a live table of the edges on a terminal, one plain line a round elsewhere."""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .config import edge_data
from .places import kinds_of
from .planning import EdgePlan
from .settings import Run

if TYPE_CHECKING:
    from .fleet import Fleet
    from .site import Ready

GIB = 1024**3


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        self.console.print(level + self.format(record).rstrip(), markup=False, soft_wrap=True)


class Display:
    """mode: `live`, `plain`, `none`, or `auto` = live if standard output is a terminal."""

    def __init__(self, mode: str = "auto") -> None:
        self.console = Console(highlight=False, soft_wrap=mode != "live")
        if mode == "auto":
            mode = "live" if self.console.is_terminal or widgets(self.console) else "plain"
        self.mode = mode
        self.console.quiet = mode == "none"
        self.console.soft_wrap = mode != "live"
        if not self.console.is_terminal:
            self.console.width = 120  # of tables; rich takes 80 for a pipe
        self.sources: dict[str, str] = {}
        self._found: list[object] = []
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=self.console,
        )  # fmt: skip

    def handler(self) -> logging.Handler:
        """A log handler that does not tear the live table, nor break the lines of a traceback."""
        return _Handler(self.console)

    def note(self, text: str) -> None:
        """One line of what happens now."""
        self.console.print(text, markup=False)

    @contextmanager
    def task(self, description: str) -> Iterator[Callable[..., None]]:
        """A bar for one long piece of work; call it with (done, total, info=""). Plain: a line every ten seconds."""
        if self.mode == "plain":
            yield self._plain_task(description)
            return
        bar = self._bar.add_task(description, total=None, info="")
        try:
            with Live(self._bar, console=self.console, refresh_per_second=4, transient=True):
                yield lambda done, total, info="": self._bar.update(bar, completed=done, total=total, info=info)
        finally:
            self._bar.remove_task(bar)

    def _plain_task(self, description: str) -> Callable[..., None]:
        last = [time.monotonic()]

        def update(done: int, total: int, info: str = "") -> None:
            if time.monotonic() - last[0] >= 10:
                last[0] = time.monotonic()
                self.note(f"{description}: {done}/{total} {info}".rstrip())

        return update

    @contextmanager
    def watching(self, fleet: Fleet, description: str = "preparing the edges") -> Iterator[None]:
        """The live table of the edges while something goes on; plain: what goes on."""
        if self.mode != "live":
            self.note(description)
            yield
            return
        live = Live(
            console=self.console,
            get_renderable=lambda: Group(self._edges(fleet), description),
            refresh_per_second=2,
            transient=True,
        )
        with live:
            yield

    @contextmanager
    def rounds(self, fleet: Fleet, total: int, done: int) -> Iterator[None]:
        """The live table and a bar of the rounds."""
        bar = self._bar.add_task("rounds", total=total, completed=done, info="")
        self._rounds = bar
        try:
            if self.mode == "live":
                with Live(
                    console=self.console,
                    get_renderable=lambda: Group(self._edges(fleet), self._bar),
                    refresh_per_second=2,
                    transient=True,
                ):
                    yield
            else:
                yield
        finally:
            self._bar.remove_task(bar)

    def _edges(self, fleet: Fleet) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("edge", "data", "status", "step", "loss", "tokens/s", "memory"):
            words = name in ("edge", "data", "status")
            # Names give way, figures do not.
            table.add_column(name, justify="left" if words else "right", no_wrap=name not in ("edge", "data"))
        for name, now in fleet.progress().items():
            table.add_row(
                name, self.sources.get(name, ""), now.status, f"{now.step}/{now.steps}" if now.steps else "",
                number(now.loss, 3), f"{now.tokens_per_second:,.0f}" if now.tokens_per_second else "",
                f"{now.memory_bytes / GIB:.2f} GiB" if now.memory_bytes else "",
            )  # fmt: skip
        return table

    def edges(self, run: Run, ready: Sequence[Ready]) -> None:
        """What the preflight found, a line an edge; nothing where it found the same before, for another run."""
        found: list[object] = [(one.edge, one.counts, one.device) for one in ready]
        if found == self._found:
            return
        self._found = found
        table = Table(box=None, pad_edge=False)
        for name in ("edge", "data", "train", "validation", "test", "cut", "dropped", "device"):
            table.add_column(
                name,
                justify="left" if name in ("edge", "data", "device") else "right",
                no_wrap=name not in ("edge", "data"),
            )
        for one in ready:
            self.sources[one.edge] = shortened(edge_data(run, one.edge, run.fleet.edges[one.edge]).source)
            counts = one.counts
            dropped = sum(value for key, value in counts.items() if key.startswith("dropped"))
            cells = [counts.get(key, 0) for key in ("train", "validation", "test", "truncated")]
            table.add_row(one.edge, self.sources[one.edge], *[str(c) for c in cells], str(dropped), one.device)
        if any(one.counts for one in ready):
            self.console.print(table)

    def base(self, metrics: Mapping[str, float]) -> None:
        """The base model's metrics, before round 1."""
        if metrics:
            self.note("base model on the edges' test rows: " + in_words(metrics))

    def round(self, record: Mapping[str, Any]) -> None:
        """One finished round: a plain line, and the bar moves."""
        missing = {
            status: ", ".join(name for name, edge in record["edges"].items() if edge["status"] == status)
            for status in ("late", "lost")
        }
        quality = in_words(record["eval"]["global"])
        line = (
            f"round {record['round']:>3}  train loss {number(record['train_loss'], 3)}"
            + (f"  validation: {quality}" if quality else "")
            + f"  {record['wall_seconds']:.1f} s (virtual {record['virtual_seconds']:.1f} s)"
            + f"  up {megabytes(record['bytes_up'])}  down {megabytes(record['bytes_down'])}"
            + "".join(f"  {status}: {names}" for status, names in missing.items() if names)
        )
        self.note(line)
        self._bar.update(self._rounds, completed=record["round"], info="")

    def finish(self, summary: Mapping[str, Any], out: str) -> None:
        """Base against tuned, an edge a line, and what to do next."""
        base, tuned = summary["base"], summary["tuned"]
        if tuned and base:
            self.console.print(comparison(base, tuned))
        totals = summary["totals"]
        self.note(
            f"{summary['status']} after {summary['rounds']} rounds: {totals['wall_seconds']:.0f} s "
            f"({totals['virtual_seconds']:.0f} s virtual), "
            f"up {megabytes(totals['bytes_up'])}, down {megabytes(totals['bytes_down'])}"
        )
        if tuned:
            self.note(
                f"{summary['export'].format(out=out)}\nreport:   {out}/report.html\n"
                f"go on:    fedpipe resume {out} rounds={2 * summary['rounds']}"
            )


def widgets(console: Console) -> bool:
    """Whether this is a notebook in which rich can show something that changes."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def comparison(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Table:
    """Base -> tuned on the test rows: of every edge, of the fleet as a whole, and of the views that a server has."""
    columns = [
        key
        for key in ("loss", "perplexity", "token_accuracy", "accuracy", "macro_f1", "rouge_l", "exact_match")
        if key in tuned["global"]
    ]
    table = Table(box=None, pad_edge=False, title="test rows: base -> tuned", title_justify="left")
    table.add_column("edge", overflow="fold")
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    rows = {name: (base["edges"].get(name, {}), metrics) for name, metrics in tuned["edges"].items()}
    rows["all edges"] = base["global"], tuned["global"]
    for view in dict.fromkeys(key.rpartition(".")[0] for key in tuned.get("server", {})):
        both = (view_of(found.get("server", {}), view) for found in (base, tuned))
        rows[f"server, {view}" if view else "server"] = next(both), next(both)
    for name, (before, after) in rows.items():
        cells = [f"{number(before.get(key), 3)} -> {number(after.get(key), 3)}" for key in columns]
        table.add_row(name, *cells, end_section=name == "all edges")
    return table


def view_of(metrics: Mapping[str, float], view: str) -> dict[str, float]:
    """The metrics of one view, by their own names; "" is the first."""
    parts = {key: key.rpartition(".") for key in metrics}
    return {parts[key][2]: value for key, value in metrics.items() if parts[key][0] == view}


def plan_table(deadline: float, plans: Mapping[str, EdgePlan]) -> Table:
    """What each edge is given. weights: how many are adapted, of which kinds; seconds: of a round, on fleet.clock."""
    title = f"plan of the first round: at most {deadline:.3g} s"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", caption_justify="left")
    for name in ("edge", "bits", "batch", "steps", "ranks", "weights", "seconds", "MiB", "under-\ntrained"):
        table.add_column(name, justify="left" if name in ("edge", "weights") else "right", overflow="fold")
    kind_of = kinds_of({name: None for plan in plans.values() for name in plan.ranks})
    kinds = {edge: Counter(kind_of[name] for name in plan.ranks) for edge, plan in plans.items()}
    words = {edge: " ".join(f"{count} {kind}" for kind, count in found.items()) for edge, found in kinds.items()}
    if len(set(words.values())) == 1:  # said once
        table.caption = f"weights of every edge: {next(iter(words.values()))}"
        words = {edge: str(found.total()) for edge, found in kinds.items()}
    for edge, plan in plans.items():
        ranks = sorted(set(plan.ranks.values()))
        limit = "" if math.isinf(plan.capacity_bytes) else f" of {plan.capacity_bytes / 2**20:.0f}"
        table.add_row(
            edge, str(plan.bits), str(plan.batch), str(plan.steps), "-".join(map(str, ranks[:1] + ranks[1:][-1:])),
            words[edge], number(plan.seconds, 2), f"{plan.memory_bytes / 2**20:.0f}{limit}",
            f"{plan.under_training:.0%}",
        )  # fmt: skip
    return table


def in_words(metrics: Mapping[str, float]) -> str:
    """The metrics that matter most, on one line."""
    shown = ("loss", "perplexity") if "perplexity" in metrics else ("loss", "accuracy", "macro_f1")
    return ", ".join(f"{key.replace('_', ' ')} {number(metrics[key], 3)}" for key in shown if key in metrics)


def number(value: float | None, digits: int) -> str:
    """A number for people: `digits` decimals, fewer above 100; a dash for none or NaN."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def shortened(source: str, limit: int = 24) -> str:
    """The end of a source, which tells more than its beginning."""
    source = source.removeprefix("builtin:")
    return source if len(source) <= limit else "..." + source[-(limit - 3) :]
