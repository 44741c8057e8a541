"""A run step by step, in a notebook or a script: what `fedpipe run` does around the loop, without a run folder.

run = load("examples/quickstart.yaml", ["rounds=2"])
method = make_method(run.method)
fleet = open_fleet(run, method)
server = server_site(run, method, fleet.classes)
for done in progress(federate(method, fleet, server, rounds=run.rounds, seed=run.seed), fleet, run.rounds):
    ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .display import Display
from .evaluate import Metrics, combine
from .fleet import SerialFleet
from .loop import Round
from .message import Message
from .methods.base import Method, shown
from .record import finite, round_record
from .report import Lost
from .run import pretrain
from .settings import Run
from .site import Site

if TYPE_CHECKING:
    from .fleet import Fleet
    from .page.history import History

F = TypeVar("F", bound="Fleet")


def open_fleet(run: Run, method: Method, kind: Callable[[Run, Method], F] = SerialFleet) -> F:  # type: ignore[assignment]  # a default fits F only where F is left open
    """A fleet whose edges have model and rows: in this process, or of another kind, such as actors.fleet.RayFleet.

    Pretrains the built-in model where it is not in the cache. Shows what goes on. Close the fleet when you are done.
    Raises UserError, and EdgeError with a line an edge that cannot take part.
    """
    display = Display()
    if method.base != "none":
        pretrain(run, display)
    fleet = kind(run, method)
    try:
        with display.watching(fleet):
            ready = fleet.open()
    except BaseException:
        fleet.close()
        raise
    display.edges(run, ready)
    return fleet


def progress(rounds: Iterable[Round], fleet: Fleet, total: int) -> Iterator[Round]:
    """The rounds, shown as they come: a line each; in a terminal, and a notebook with ipywidgets, a live table, too."""
    display = Display()
    with display.rounds(fleet, total, 0):
        for done in rounds:
            display.round(round_record(done))
            yield done


def quality(fleet: Fleet, server: Site, state: Message | None = None, split: str = "test") -> dict[str, Any]:
    """Metrics of a state (None: the base model) on every edge's own rows: {"global": mean, "edges": {name: metrics}}.

    An edge that could not evaluate is left out. `display.comparison(base, tuned)` makes a table of two of these.
    """
    found = fleet.evaluate(shown(server.method, state, server), split)
    edges: dict[str, Metrics] = {name: one for name, one in found.items() if not isinstance(one, Lost) and one}
    return {"global": combine(edges), "edges": edges}


def history(
    run: Run, rounds: Iterable[Round], base: Mapping[str, Any] | None = None, tuned: Mapping[str, Any] | None = None
) -> History:
    """The rounds as page.figures takes them; base, tuned: by `quality`. Keeps no state."""
    from .page.history import History

    lines: list[dict[str, Any]] = [finite(round_record(done)) for done in rounds]
    return History("this run", dataclasses.asdict(run), {}, lines, [], {"base": base or {}, "tuned": tuned or {}})
