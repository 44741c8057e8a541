"""Whether the `server` section, the method and the number of edges fit together."""

from __future__ import annotations

from .errors import UserError
from .loop import counts
from .methods import declaring
from .methods.base import Method
from .settings import Run

# Why server.optimizer would do harm, by method.
UNFIT = {
    "central": "no update of an edge is joined",
    "fedadapter": "the winner of a trial takes the names of the others, and its numbers are another adapter's",
    "fedbiot": "the emulator is aligned with the very adapter that was averaged, before an optimizer could move it",
    "fedex_lora": "what is kept beside the base is what the averaged factors themselves miss, and wrong beside others",
    "fedpipe": "SVD gives the factors a new basis in every round (with join: pad, a baseline, it does not)",
    "flexlora": "SVD gives the factors a new basis in every round",
    "flora": "every round trains a fresh adapter, and what came of the one before is frozen",
    "local": "no update of an edge is joined",
    "lora_fair": "B is corrected for the very A that was averaged, before an optimizer could move it",
}


def check_server(run: Run, method: Method) -> None:
    """Raises UserError if the method has nothing that server.optimizer or server.aggregator could act on.

    Or if a round cannot have as many updates as the aggregator needs, though every edge were there.
    """
    name, optimizer, aggregator = type(method).__name__, run.server.optimizer, run.server.aggregator
    if optimizer is not None and not getattr(method, "pseudo_gradient", False):
        why = UNFIT.get(run.method["name"], "its class does not declare pseudo_gradient (fedpipe_ray/methods/base.py)")
        raise UserError(
            f"server.optimizer: {optimizer.name} does not fit {run.method['name']}: {why}; methods that it fits: "
            f"{declaring('pseudo_gradient')}; or leave it out"
        )
    if aggregator.name == "mean":
        return
    if not getattr(method, "averaging", False):
        raise UserError(
            f"server.aggregator: {aggregator.name} takes the place of a mean of whole updates, and {name} takes none; "
            f"methods that do: {declaring('averaging')}; or leave it out"
        )
    fleet, edges = run.fleet, len(run.fleet.edges)
    used = fleet.buffer or edges if fleet.mode == "buffered" else counts(edges, fleet.fraction)[0]
    short = aggregator.shortage(used)
    if short is not None:
        where = f"fleet.buffer: {used}" if fleet.mode == "buffered" else f"fleet.fraction: {fleet.fraction:g}"
        raise UserError(f"{short}, or have more than {used} of the {edges} edges in a round ({where})")
