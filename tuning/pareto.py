"""The allocations that were found, as a table in the terminal and as a page: the chosen one, the planner's own."""

from __future__ import annotations

import html
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from fedpipe_ray.display import megabytes, number
from fedpipe_ray.files import write_atomically
from fedpipe_ray.planning import Allocation

from .allocate import Candidate, covers
from .promotion import Measured

log = logging.getLogger("fedpipe")

COSTS = {"seconds": ("seconds of a round", 1), "memory_bytes": ("MiB", 2**20), "bytes_round": ("MB a round", 1e6)}
SEARCHED, CHOSEN, OWN = "searched", "chosen", "FedPipe's own planner"
MARKERS = {
    SEARCHED: ("circle", "#8a8a8a", 8), OWN: ("diamond", "#4477aa", 12), CHOSEN: ("star", "#c0392b", 15),
}  # fmt: skip


@dataclass(frozen=True)
class Pareto:
    """Candidates by rows, the best quality first, of a fleet in `classes`; a row's number is its place from 1.

    chosen, own: places of the chosen one and of the planner's, None where there is no such; measured: by place.
    """

    candidates: Sequence[Candidate]
    classes: Mapping[str, Sequence[str]]
    chosen: int
    own: int | None = None
    measured: Mapping[int, Measured] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """What the rows are; the planner's own stands among them even where another beats it."""
        if self.own is None:
            return "allocations that no other beats in all four"
        beaten = [n for n, one in enumerate(self.candidates, 1) if n - 1 != self.own and covers(one, self._own)]
        rank = f"FedPipe's own planner gives {self.own + 1}"
        if not beaten:
            return f"allocations that no other beats in all four; {rank}"
        return f"allocations that no other beats in all four, and what {rank}, which {beaten[0]} beats"

    @property
    def _own(self) -> Candidate:
        assert self.own is not None
        return self.candidates[self.own]

    @property
    def reason(self) -> str:
        """By what the chosen one was chosen."""
        return "by validation loss after all rounds" if self.measured else "by quality, for nothing was measured"

    def role(self, at: int) -> str:
        """What a row is."""
        kinds = ([CHOSEN] if at == self.chosen else []) + ([OWN] if at == self.own else [])
        return ", ".join(kinds) or SEARCHED

    def loss(self, at: int) -> str:
        """A row's validation loss, and after how many rounds it was stopped if these were not all."""
        if at not in self.measured:
            return "-"
        one = self.measured[at]
        if one.loss is None:
            return "failed"
        return number(one.loss, 4) + ("" if one.rounds == one.of else f", stopped after {one.rounds} of {one.of}")

    def figures(self, at: int) -> list[str]:
        """Quality, seconds of a round, MiB of the edge that takes most, and bytes of the fleet."""
        one = self.candidates[at].outcome
        mib = f"{one.memory_bytes / 2**20:.1f}"
        return [number(one.quality, 3), number(one.seconds, 2), mib, megabytes(one.bytes_round)]

    def given(self, at: int) -> dict[str, str]:
        """What each class of edges is given, in short."""
        plans = self.candidates[at].plans
        return {named(edges): in_short(plans[edges[0]]) for edges in self.classes.values()}


def in_short(plan: Allocation) -> str:
    """An allocation in a line: how many weights have which rank."""
    ranks = Counter(plan.ranks.values())
    each = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(ranks.items(), reverse=True))
    return f"{plan.bits} bits, batch {plan.batch}, weights: {each or 'none'}"


def named(edges: Sequence[str]) -> str:
    """Edges, such as those of a class, by the first three."""
    return ", ".join(edges[:3]) + (f" and {len(edges) - 3} more" if len(edges) > 3 else "")


HEAD = ("quality", "round s", "MiB", "bytes a round")


def pareto_table(shown: Pareto) -> Table:
    """A line an allocation, an arrow before the chosen one."""
    table = Table(box=None, pad_edge=False, title=shown.caption, title_justify="left")
    for name in ("", *HEAD, *(["loss"] if shown.measured else [])):
        table.add_column(name, justify="left" if name == "loss" else "right")
    for at in range(len(shown.candidates)):
        arrow = "-> " if at == shown.chosen else ""
        table.add_row(f"{arrow}{at + 1}", *shown.figures(at), *([shown.loss(at)] if shown.measured else []))
    return table


def write_plot(path: Path, shown: Pareto) -> bool:
    """The same as a page: quality over each cost, and what each class is given. False where plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        log.warning("no %s: plotly is not installed; pip install 'fedpipe-ray[tune]'", path.name)
        return False
    from fedpipe_ray.page.page import Section, shell
    from fedpipe_ray.page.tables import table

    head = ["", *HEAD, *(["loss"] if shown.measured else []), "", *shown.given(0)]
    rows = [
        [
            str(at + 1), *shown.figures(at), *([shown.loss(at)] if shown.measured else []),
            shown.role(at), *shown.given(at).values(),
        ]
        for at in range(len(shown.candidates))
    ]  # fmt: skip
    note = "Memory of the edge that takes most, bytes of all edges, up and down. A figure's points show more on hover."
    parts = [
        Section("title", "Allocations", level=1, body=f"<p>{html.escape(sentence(shown))}</p>"),
        Section("front", "Quality and costs", note, figure_of(shown), table(head, rows)),
    ]
    data = json.dumps([part.data() for part in parts]).replace("</", "<\\/")
    write_atomically(path, shell("Allocations", f"show({data});"))
    return True


def sentence(shown: Pareto) -> str:
    """The caption and the choice, as text."""
    return f"{shown.caption[0].upper()}{shown.caption[1:]}. Chosen {shown.reason}: {shown.chosen + 1}."


def figure_of(shown: Pareto) -> Any:
    """Quality over each of the three costs; every point has its row's number, and all about it on hover."""
    from plotly.subplots import make_subplots

    from fedpipe_ray.page.figures import laid_out

    figure: Any = make_subplots(rows=1, cols=len(COSTS), shared_yaxes=True, horizontal_spacing=0.04)
    roles = {role: [at for at in range(len(shown.candidates)) if shown.role(at) == role] for role in roles_of(shown)}
    for column, (name, (title, unit)) in enumerate(COSTS.items(), 1):
        for role, places in roles.items():
            symbol, color, size = MARKERS[role.partition(", ")[0]]
            figure.add_scatter(
                x=[getattr(shown.candidates[at].outcome, name) / unit for at in places],
                y=[shown.candidates[at].outcome.quality for at in places], mode="markers+text", name=role,
                text=[str(at + 1) for at in places], textposition="top center", legendgroup=role,
                hovertext=[hover(shown, at) for at in places], hoverinfo="text", showlegend=column == 1,
                marker={"symbol": symbol, "color": color, "size": size}, row=1, col=column,
            )  # fmt: skip
        figure.update_xaxes(title_text=title, row=1, col=column)
    figure.update_yaxes(title_text="quality", row=1, col=1)
    return laid_out(figure, height=460)


def roles_of(shown: Pareto) -> list[str]:
    """The roles there are, what is drawn last on top."""
    there = {shown.role(at) for at in range(len(shown.candidates))}
    return sorted(there, key=lambda role: (CHOSEN in role, OWN in role))


def hover(shown: Pareto, at: int) -> str:
    """All about a row."""
    lines = [f"{at + 1}: {shown.role(at)}"]
    lines += [f"{name} {figure}" for name, figure in zip(HEAD, shown.figures(at), strict=True)]
    lines += [f"loss {shown.loss(at)}"] if at in shown.measured else []
    lines += [f"{edges}: {given}" for edges, given in shown.given(at).items()]
    return "<br>".join(map(html.escape, lines))
