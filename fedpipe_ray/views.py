"""What a state is evaluated and exported as at a site; and methods whose models stand on the edges, one an edge."""

from __future__ import annotations

from pathlib import Path

from .encoding import without_carried
from .errors import UserError
from .message import Message
from .methods.base import Method, Weights
from .record import Checkpoint
from .settings import Run
from .site import SERVER, Site

PERSONAL_HINT = (
    "models:   one an edge, in its private state; none for all\n"
    "export:   fedpipe export {out} --edge NAME --out DIR   (where the edge's private state is)"
)


def is_personal(method: Method) -> bool:
    """Whether each edge has a model of its own, and the server none."""
    return bool(getattr(method, "personal", False))


def check_personal(run: Run, method: Method) -> None:
    """Raises UserError for a setting that has no meaning where models stand on the edges."""
    if is_personal(method) and run.evaluate.keep == "best":
        raise UserError(
            f"evaluate.keep: best: {run.method['name']} keeps a model on each edge, and those of the last round alone; "
            "set evaluate.keep: last"
        )


def views_of(site: Site, state: Message) -> dict[str, Weights]:
    """The views of `state` for a site, by name. Raises UserError on the server if the models stand on the edges."""
    if is_personal(site.method) and site.name == SERVER:
        name = site.run.method["name"]
        raise UserError(
            f"{name} has no model for all edges: each keeps its own; fedpipe evaluate RUN measures each on its edge's "
            "rows, fedpipe export RUN --edge NAME --out DIR writes one"
        )
    return site.method.weights(state, site)


def first_view(site: Site, state: Message) -> Weights:
    """The view of `state` that is a run's result, or an edge's. Raises UserError as `views_of` does."""
    return next(iter(views_of(site, state).values()))


def edge_site(server: Site, point: Checkpoint, edge: str, private_dir: Path) -> Site:
    """An edge of a run with its private state as of a checkpoint. Raises UserError if it has none that can be had here.

    private_dir: that of the run folder.
    """
    run = server.run
    if not is_personal(server.method):
        raise UserError(f"--edge {edge}: {run.method['name']} has one result for all edges; leave it out")
    if edge not in run.fleet.edges:
        raise UserError(f"--edge {edge}: there is no such edge; the edges are {', '.join(run.fleet.edges)}")
    if edge not in point.start.private:
        raise UserError(f"--edge {edge}: it has trained in none of the {point.start.round} rounds and has no model")
    site = Site(edge, run, server.method, server.load_base, private_dir, classes=server.classes)
    site.restore(point.start.round, **point.start.private[edge])
    site.private, _ = without_carried(site.private_before(point.start.round))
    return site
