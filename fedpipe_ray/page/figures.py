"""The figures of a page: each from histories to a plotly figure, or None where a run has nothing to show there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from plotly import graph_objects as go
from plotly.colors import qualitative

from fedpipe_ray.places import kinds_of, layers_of
from fedpipe_ray.plan_lines import gathered

from .groups import grouped
from .history import CLOCKS, History, spaced

COLORS = qualitative.Safe  # told apart by the colour-blind
GRAY, RED = "#8a8a8a", "#c0392b"
MOST_EDGES = 40  # lines or bars of a figure beyond which nobody reads it
PARTS = {"down": COLORS[0], "compute": COLORS[4], "up": COLORS[2], "wait": "#e8e8e8", "lost": RED}


def quality(histories: Sequence[History], metric: str) -> go.Figure | None:
    """A validation metric over rounds, virtual time, bytes or wall time, which the reader chooses; a line a group."""
    figure, kinds, shown, groups = go.Figure(), list(CLOCKS), list[str](), grouped(histories)
    for kind in kinds:
        for number, group in enumerate(groups):
            x, y, spread = group.course(metric, kind)
            color, more = COLORS[number % len(COLORS)], {"visible": kind == kinds[0], "legendgroup": group.label}
            if group.seeds > 1:
                edge = [a + b for a, b in zip(y, spread)] + [a - b for a, b in zip(y, spread)][::-1]
                figure.add_scatter(
                    x=x + x[::-1], y=edge, fill="toself", fillcolor=faint(color), mode="lines", line={"width": 0},
                    hoverinfo="skip", showlegend=False, **more,
                )  # fmt: skip
                shown.append(kind)
            figure.add_scatter(
                x=x, y=y, name=group.label, mode="lines+markers", line={"color": color}, showlegend=len(groups) > 1,
                **more,
            )  # fmt: skip
            shown.append(kind)
    if not any(len(trace.x) for trace in figure.data):
        return None
    each = tick(histories)
    buttons = [
        {
            "label": kind, "method": "update",
            "args": [
                {"visible": [k == kind for k in shown]},
                {"xaxis.title.text": kind, "xaxis.dtick": each if kind == "round" else None},
            ],
        }
        for kind in kinds
    ]  # fmt: skip
    figure.update_layout(
        updatemenus=[menu(buttons)], xaxis_title=kinds[0], yaxis_title=f"{spaced(metric)} (validation)"
    )
    figure.update_xaxes(dtick=each)
    return laid_out(figure, top=70)


def edges_quality(history: History, metric: str) -> go.Figure | None:
    """The same of every edge over rounds; all edges together in black."""
    figure = go.Figure()
    for number, edge in enumerate(list(history.profiles)[:MOST_EDGES]):
        x, y = history.course(metric, "round", edge)
        if x:
            color = COLORS[number % len(COLORS)]
            figure.add_scatter(x=x, y=y, name=edge, mode="lines+markers", line={"color": color})
    x, y = history.course(metric, "round")
    if not figure.data:
        return None
    figure.add_scatter(x=x, y=y, name="all edges", mode="lines", line={"color": "black", "width": 3})
    figure.update_layout(xaxis_title="round", yaxis_title=f"{spaced(metric)} (validation)", xaxis_dtick=tick([history]))
    return laid_out(figure)


def base_and_tuned(history: History, metric: str) -> go.Figure | None:
    """Test rows of every edge before and after."""
    base, tuned = history.tested("base", "edges"), history.tested("tuned", "edges")
    names = [edge for edge in base if metric in base[edge] and metric in tuned.get(edge, {})][:MOST_EDGES]
    if not names:
        return None
    figure = go.Figure()
    for name, found, color in (("base", base, GRAY), ("tuned", tuned, COLORS[4])):
        figure.add_bar(x=names, y=[found[edge][metric] for edge in names], name=name, marker_color=color)
    figure.update_layout(yaxis_title=f"{spaced(metric)} (test)", barmode="group")
    return laid_out(figure)


def plan(history: History) -> go.Figure | None:
    """Layers x kinds of weight: the rank that each edge trains there, as told last; the reader chooses the edge."""
    told = distinct({edge: one for edge, one in history.planned.items() if one.get("ranks")})
    if not told:
        return None
    grids = grids_of({edge: one["ranks"] for edge, one in told.items()})
    kinds = list(dict.fromkeys(kind for _, found, _ in grids.values() for kind in found))
    layers = sorted({layer for found, _, _ in grids.values() for layer in found})
    highest = max(max(one["ranks"].values()) for one in told.values())
    figure = go.Figure()
    for number, edge in enumerate(told):
        ranks = grids[edge][2]
        figure.add_heatmap(
            x=kinds, y=[str(layer) for layer in layers], visible=number == 0, zmin=0, zmax=highest, colorscale="Blues",
            z=[[ranks.get((layer, kind), 0) for kind in kinds] for layer in layers], xgap=1, ygap=1,
            texttemplate="%{z}" if len(layers) * len(kinds) <= 400 else None, colorbar={"title": "rank"},
        )  # fmt: skip
    buttons = [
        {"label": described(edge, told[edge]), "method": "update", "args": [{"visible": [e == edge for e in told]}]}
        for edge in told
    ]
    figure.update_layout(
        updatemenus=[menu(buttons, "dropdown")], xaxis_title="weight", yaxis_title="layer", yaxis_type="category"
    )
    return laid_out(figure, height=max(320, 140 + 22 * len(layers)), top=70)


def importance(history: History) -> go.Figure | None:
    """The mean score of each kind of weight, over the rounds in which edges scored theirs."""
    courses: dict[str, list[tuple[int, float]]] = {}
    known: dict[str, dict[str, float]] = {}
    for line in history.plans:
        if "scores" not in line:
            continue
        known |= line["scores"]
        sums: dict[str, list[float]] = {}
        kinds = kinds_of({module: None for scores in known.values() for module in scores})
        for scores in known.values():
            whole = sum(scores.values()) or 1.0
            for module, value in scores.items():
                sums.setdefault(kinds[module], []).append(value / whole)
        for kind, values in sums.items():
            courses.setdefault(kind, []).append((line["round"], 100 * sum(values) / len(known)))
    if not courses:
        return None
    figure = go.Figure()
    for number, (kind, course) in enumerate(sorted(courses.items())):
        figure.add_scatter(
            x=[round for round, _ in course], y=[share for _, share in course], name=kind, mode="lines+markers",
            line={"color": COLORS[number % len(COLORS)]},
        )  # fmt: skip
    figure.update_layout(xaxis_title="round", yaxis_title="% of importance", xaxis_dtick=tick([history]))
    return laid_out(figure)


def memory(history: History) -> go.Figure | None:
    """The most that training took on each edge, beside what its profile allows."""
    peaks: dict[str, float] = {}
    for line in history.rounds:
        for edge, one in line["edges"].items():
            peaks[edge] = max(peaks.get(edge, 0.0), (one["training_memory_bytes"] or 0) / 2**20)
    peaks = {edge: peak for edge, peak in list(peaks.items())[:MOST_EDGES] if peak > 0}
    if not peaks:
        return None
    figure = go.Figure()
    figure.add_bar(x=list(peaks), y=list(peaks.values()), name="peak of training", marker_color=COLORS[4])
    profiles = history.profiles
    allowed = {edge: capacity_mib(profiles[edge]) for edge in peaks if edge in profiles}
    with_one = {edge: value for edge, value in allowed.items() if value is not None}
    figure.add_scatter(
        x=list(with_one), y=list(with_one.values()), name="capacity", mode="markers",
        marker={"symbol": "line-ew", "size": 34, "line": {"width": 3, "color": RED}},
    )  # fmt: skip
    figure.update_layout(yaxis_title="MiB", yaxis_rangemode="tozero")
    return laid_out(figure)


def time_line(history: History) -> go.Figure | None:
    """Who received, computed, sent and waited, when on the virtual clock; an edge a row."""
    bars: dict[str, list[tuple[str, float, float, str]]] = {part: [] for part in PARTS}
    edges = list(dict.fromkeys(edge for line in history.rounds for edge in line["edges"]))[:MOST_EDGES]
    begin, profiles = 0.0, history.profiles
    for line in history.rounds:
        length = line["virtual_seconds"] or 0.0
        for edge in edges:
            if edge in line["edges"] and edge in profiles:
                at = line["edges"][edge].get("started_seconds", begin)  # buffered: maybe some rounds before
                for part, seconds in phases(profiles[edge], line["edges"][edge], begin + length - at):
                    bars[part].append((edge, at, seconds, f"round {line['round']}: {seconds:.3g} s {part}"))
                    at += seconds
        begin += length
    if not any(bars.values()):
        return None
    figure = go.Figure()
    for part, found in bars.items():
        if found:
            names, starts, lengths, texts = zip(*found, strict=True)
            figure.add_bar(
                y=names, x=lengths, base=starts, orientation="h", name=part, marker_color=PARTS[part],
                hovertext=texts, hoverinfo="text+y",
            )  # fmt: skip
    ends = history.clock("virtual s")
    for end in ends if len(ends) <= 60 else ():
        figure.add_vline(x=end, line_width=1, line_color=GRAY)
    figure.update_layout(xaxis_title="virtual s", barmode="overlay", yaxis_autorange="reversed", bargap=0.35)
    return laid_out(figure, height=max(280, 140 + 26 * len(edges)))


def method_numbers(history: History) -> list[tuple[str, go.Figure]]:
    """What the method recorded of itself by round, such as `residual`, a figure each."""
    names = dict.fromkeys(name for line in history.rounds for name in line["method"])
    found = []
    for name in names:
        points = [(line["round"], line["method"][name]) for line in history.rounds if name in line["method"]]
        figure = go.Figure(go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers"))
        figure.update_layout(xaxis_title="round", yaxis_title=name, xaxis_dtick=tick([history]))
        found.append((name, laid_out(figure, height=260)))
    return found


def phases(profile: Mapping[str, Any], edge: Mapping[str, Any], length: float) -> list[tuple[str, float]]:
    """(part, virtual seconds) of an edge's round of `length` seconds: as costs.virtual_seconds adds them up.

    The upload is what is left after download and work, for some methods have a link of their own. An edge that was lost
    or too late is one red bar.
    """
    spent = edge["virtual_seconds"] or 0.0
    rest = [("wait", length - spent)] if length > spent else []
    if edge["status"] != "ok":
        return [("lost", min(spent, length)), *rest]
    down = min(spent, 8 * edge["bytes_down"] / profile["downlink_bps"] + profile["latency_seconds"])
    work = min(spent - down, edge["flops"] / profile["compute_flops"])
    return [("down", down), ("compute", work), ("up", spent - down - work), *rest]


def distinct(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The first MOST_EDGES unlike plans, each under the names of the edges that have it."""
    found = {}
    for one in gathered(told)[:MOST_EDGES]:
        names = one["edges"]
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        found[", ".join(names[:3]) + rest] = told[names[0]]
    return found


def faint(color: str) -> str:
    """An rgb(...) color, nearly transparent."""
    return color.replace("rgb", "rgba").replace(")", ", 0.15)")


def capacity_mib(profile: Mapping[str, Any]) -> float | None:
    """What an edge's training may take; None where nothing limits it."""
    limit = profile.get("training_memory_bytes") or profile.get("gpu_memory_bytes")
    return float(limit) / 2**20 if limit else None


Grid = tuple[list[int], list[str], dict[tuple[int, str], int]]


def grids_of(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Grid]:
    """(layers, kinds, rank by layer and kind) by edge, of ranks by edge and module."""
    names = {module: None for own in ranks.values() for module in own}
    kinds, layers = kinds_of(names), layers_of(names)
    found = {}
    for edge, own in ranks.items():
        places = {(layers[module], kinds[module]): rank for module, rank in own.items()}
        found[edge] = sorted({layer for layer, _ in places}), list(dict.fromkeys(kind for _, kind in places)), places
    return found


def described(edge: str, told: Mapping[str, Any]) -> str:
    """An edge with the numbers of its plan."""
    numbers = [f"{name} {told[name]:g}" for name in ("bits", "batch", "steps") if name in told]
    return ": ".join([edge, ", ".join(numbers)]) if numbers else edge


def tick(histories: Sequence[History]) -> int:
    """Whole rounds between two ticks, so that there are at most twelve."""
    return max(1, math.ceil(max((len(one.rounds) for one in histories), default=1) / 12))


def menu(buttons: list[dict[str, Any]], kind: str = "buttons") -> dict[str, Any]:
    """A row of buttons, or a list to choose from, above a figure."""
    return {
        "type": kind, "direction": "right" if kind == "buttons" else "down", "buttons": buttons, "x": 0, "y": 1,
        "xanchor": "left", "yanchor": "bottom", "pad": {"b": 8}, "showactive": True, "font": {"size": 12},
    }  # fmt: skip


def laid_out(figure: go.Figure, height: int = 360, top: int = 20) -> go.Figure:
    """The look that all figures share."""
    figure.update_layout(
        template="simple_white", height=height, margin={"l": 60, "r": 20, "t": top, "b": 50}, hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}, font={"size": 13},
    )  # fmt: skip
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure
