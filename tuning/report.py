"""report.html: Optuna's own plots of a study on one page that needs no network."""

from __future__ import annotations

import html
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna import visualization as plots

from fedpipe_ray.files import write_atomically

log = logging.getLogger("fedpipe")


def write_report(
    path: Path, study: optuna.Study, objectives: Sequence[str], lines: Sequence[str], dashboard: str
) -> bool:
    """Writes the page; False, with a line in the log, where plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        log.warning("no report.html: plotly is not installed; pip install 'fedpipe-ray[tune]'")
        return False
    parts = [f"<pre>{html.escape(line)}</pre>" for line in lines]
    parts.append(f"<p>Live, with every trial: <code>pip install optuna-dashboard; {html.escape(dashboard)}</code></p>")
    first = True
    for title, draw in _plots(study, objectives):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure: Any = draw()
        except (ValueError, RuntimeError, ImportError, ZeroDivisionError) as error:
            parts.append(f"<p>{html.escape(title)}: nothing to draw ({html.escape(str(error))})</p>")
            continue
        parts.append(f"<h2>{html.escape(title)}</h2>" + figure.to_html(full_html=False, include_plotlyjs=first))
        first = False
    body = f"<title>{html.escape(study.study_name)}</title><h1>{html.escape(study.study_name)}</h1>{''.join(parts)}"
    write_atomically(path, f'<!doctype html><meta charset="utf-8"><body style="font-family: sans-serif">{body}</body>')
    return True


def _plots(study: optuna.Study, objectives: Sequence[str]) -> list[tuple[str, Callable[[], Any]]]:
    """What is drawn, by title."""
    found: list[tuple[str, Callable[[], Any]]] = []
    if 2 <= len(objectives) <= 3:
        found.append(("Pareto front", lambda: plots.plot_pareto_front(study, target_names=list(objectives))))
    for index, name in enumerate(objectives):

        def target(trial: Any, index: int = index) -> float:
            return float(trial.values[index])

        chosen: dict[str, Any] = (
            {"target": target, "target_name": name} if len(objectives) > 1 else {"target_name": name}
        )
        for title, plot in (
            ("history", plots.plot_optimization_history), ("importances", plots.plot_param_importances),
            ("parallel coordinates", plots.plot_parallel_coordinate),
        ):  # fmt: skip
            found.append((f"{name}: {title}", partial(plot, study, **chosen)))
    if len(objectives) == 1:
        found.append((f"{objectives[0]}: by round", lambda: plots.plot_intermediate_values(study)))
    return found
