"""A run's result opened for use: base model, tuned model, and of which round it is. Runs in progress too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .methods.base import Weights
from .model import Base
from .record import Checkpoint, RunFolder
from .run import preflight, server_site
from .settings import Run
from .site import Site
from .views import edge_site, first_view, is_personal
from .virtual import VirtualSpec


@dataclass(frozen=True)
class Opened:
    """A run folder's result. site: where it is computed, the server or an edge; weights: the view that is exported."""

    folder: RunFolder
    run: Run
    point: Checkpoint
    site: Site
    weights: Weights

    @property
    def base(self) -> Base:
        """The base model; loaded at first use. `weights.on(base)` is the tuned one, and may change `base.model`."""
        return self.site.base

    @property
    def round(self) -> int:
        """Of the state that is used: the best, or the last that was saved."""
        best = self.point.best if self.run.evaluate.keep == "best" else None
        return int(best["round"]) if best else self.point.start.round

    @property
    def status(self) -> str:
        """Which state this is, in words."""
        done, rounds = self.point.start.round, self.run.rounds
        kept = f"its best, round {self.round}" if self.round != done else f"round {done}"
        if self.folder.complete(done):
            return f"{self.folder.name}: {kept} of {done}"
        return f"{self.folder.name}: {kept} of {rounds}; the run has not ended, this is its checkpoint"

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for beside those of a trained prompt or prefix; None: no limit known."""
        config = self.base.model.config
        config = getattr(config, "text_config", None) or config
        found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0
        spec = getattr(self.weights, "spec", None)
        return int(found) - (spec.count if isinstance(spec, VirtualSpec) else 0) if found > 0 else None


@contextmanager
def opened(place: Path | str, edge: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Opened]:
    """What a run would export now. edge: whose, where each has its own. Raises UserError."""
    with closing(RunFolder.open(place)) as folder:
        run = folder.run(overrides)
        state, point = folder.final_state(run)
        method = preflight(run)
        if method.base == "none":
            raise UserError(f"method.name: {run.method['name']} has no model")
        if is_personal(method) and edge is None:
            raise UserError(
                f"{run.method['name']} has no model for all edges, each has its own; fedpipe generate takes --edge, of "
                f"{', '.join(sorted(point.start.private) or run.fleet.edges)}"
            )
        site = server_site(run, method, point.classes)
        if edge is not None:
            site = edge_site(site, point, edge, folder.path / "private")
        yield Opened(folder, run, point, site, first_view(site, state))
