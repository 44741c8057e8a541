"""Is one federated adapter better over everybody's text than any edge's own adapter?

    python -m benchmarks.federated_against_local [SEED ...]

The quickstart's run, in one process. Every edge also trains alone: as many steps, the same rows, rate and schedule. All
adapters are judged on the union of the edges' test rows: the mean over the edges of the loss per response token.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from benchmarks.table import publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.evaluate import combine
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def trained(run: Run, edges: list[str]) -> Message:
    """The state after all rounds with these edges only."""
    fleet_settings = dataclasses.replace(run.fleet, edges={name: run.fleet.edges[name] for name in edges})
    part = dataclasses.replace(run, fleet=fleet_settings)
    method = make_method(part.method)
    fleet = SerialFleet(part, method)
    fleet.open()
    *_, last = federate(
        method, fleet, server_site(part, method, []), rounds=part.rounds, seed=part.seed, evaluate_every=0
    )
    return last.state


def main(seeds: list[int]) -> None:
    """Measures every seed and publishes after each."""
    rows: list[dict[str, object]] = []
    for seed in seeds:
        run = load_run(QUICKSTART, [f"seed={seed}", "fleet.ray=false", "local.threads=2"], find_profiles)
        judge = SerialFleet(run, make_method(run.method))
        judge.open()
        names = list(run.fleet.edges)
        for who, edges in [("base", []), ("federated", names), *[(f"only {name}", [name]) for name in names]]:
            found = judge.evaluate(trained(run, edges) if edges else None, "test")
            metrics = {name: m for name, m in found.items() if not isinstance(m, Lost)}
            rows.append({
                "adapter": who, "seed": seed, "mean loss": combine(metrics)["loss"],
                "perplexity": combine(metrics)["perplexity"],
                **{f"loss on {name}": metrics[name]["loss"] for name in names},
            })  # fmt: skip
            print(rows[-1], flush=True)
        publish("federated_against_local", "Loss on the union of the edges' test rows", rows, seeds=seeds)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
