"""Is one federated adapter better over everybody's text than any edge's own, and how far is it from pooled rows?

    python -m benchmarks.federated_against_local [SEED ...] [--rounds N] [--rows N]

The quickstart's run, in one process, by three methods: `lora`; `local`, every edge alone with as many steps, the same
rows, rate and schedule; `central`, one adapter on all rows, with as many steps as all edges together. All adapters are
judged on the union of the edges' test rows: the mean over the edges of the loss per response token. A run with fewer
rounds or rows than the quickstart's is printed and not published.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.evaluate import combine
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.report import Lost
from fedpipe_ray.run import rounds_of, server_site
from fedpipe_ray.settings import Run

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def adapters(run: Run) -> Iterator[tuple[str, Message | None]]:
    """(whose, adapter) after all rounds of each method; None: the base model."""
    yield "base", None
    for who in ("federated", "central", "local"):
        name = "lora" if who == "federated" else who
        method = make_method({**run.method, "name": name})
        fleet = SerialFleet(run, method)
        fleet.open()
        *_, last = rounds_of(run, method, fleet, server_site(run, method, []))
        if who == "local":
            yield from ((f"only {edge}", site.private) for edge, site in fleet.sites.items())
        else:
            yield who, last.state


def main() -> None:
    """Measures every seed and publishes after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--rounds", type=int, help="default: the quickstart's")
    parser.add_argument("--rows", type=int, help="test rows an edge; default: the quickstart's")
    options = parser.parse_args()
    seeds, rows = options.seeds or [0, 1, 2], list[dict[str, object]]()
    reduced = {"rounds": options.rounds, "evaluate.rows": options.rows}
    changes = [f"{key}={value}" for key, value in reduced.items() if value is not None]
    for seed in seeds:
        settings = [f"seed={seed}", "fleet.ray=false", "local.threads=2", "evaluate.every=0", *changes]
        run = load_run(QUICKSTART, settings, find_profiles)
        judge = SerialFleet(run, make_method(run.method))
        judge.open()
        for who, adapter in adapters(run):
            found = judge.evaluate(adapter, "test")
            metrics = {name: m for name, m in found.items() if not isinstance(m, Lost)}
            rows.append({
                "adapter": who, "seed": seed, "mean loss": combine(metrics)["loss"],
                "perplexity": combine(metrics)["perplexity"],
                **{f"loss on {name}": one["loss"] for name, one in metrics.items()},
            })  # fmt: skip
            print(rows[-1], flush=True)
        if not changes:
            publish("federated_against_local", "Loss on the union of the edges' test rows", rows, seeds=seeds)


if __name__ == "__main__":
    main()
