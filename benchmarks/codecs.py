"""What does a codec of updates save, and what does it cost in validation loss, with and without error feedback?

    python -m benchmarks.codecs [SEED ...]

The quickstart's run in one process, shorter: 4 rounds of 12 steps. Bytes are those of an edge's update as sent, header
included, the mean over edges and rounds; the loss is that of the edges' validation rows after the last round.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.table import parser, publish
from clusters import find_profiles
from fedpipe_ray.config import load_run
from fedpipe_ray.fleet import Kept, SerialFleet
from fedpipe_ray.loop import federate
from fedpipe_ray.methods import make_method
from fedpipe_ray.run import server_site
from fedpipe_ray.settings import Run

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
ROUNDS, STEPS = 4, 12
SETTINGS = [f"rounds={ROUNDS}", f"local.steps={STEPS}", "fleet.ray=false", f"evaluate={{rows: 50, every: {ROUNDS}}}"]
PLAIN = ["null", "{name: bf16}", "{name: int8}", "{name: nf4}", "{name: nf4, double: true}"]
LOSSY = ["{name: nf4}", "{name: topk, share: 0.01}", "{name: topk, share: 0.1}", "{name: randomk, share: 0.1}",
         "{name: lowrank, rank: 2}"]  # fmt: skip
ARMS = [*((codec, False) for codec in [*PLAIN, *LOSSY[1:]]), *((codec, True) for codec in LOSSY)]


def measured(run: Run, kept: Kept) -> tuple[float, float]:
    """(bytes of an update, validation loss at the end)."""
    method = make_method(run.method)
    fleet = SerialFleet(run, method, kept=kept)
    fleet.open()
    rounds = list(
        federate(method, fleet, server_site(run, method, []), rounds=ROUNDS, seed=run.seed, evaluate_every=ROUNDS)
    )
    sent = sum(one.bytes_up for one in rounds) / sum(len(one.reports) for one in rounds)
    return sent, rounds[-1].quality["loss"]


def main(seeds: list[int]) -> None:
    """Measures every arm, and publishes after each seed."""
    rows: list[dict[str, object]] = []
    for seed in seeds:
        kept, whole, usual = Kept(), 0.0, 0.0
        for codec, feedback in ARMS:
            wire = f"wire={{codec: {codec}, error_feedback: {str(feedback).lower()}}}"
            run = load_run(QUICKSTART, [*SETTINGS, f"seed={seed}", wire], find_profiles)
            sent, loss = measured(run, kept)
            whole, usual = whole or sent, usual or loss
            rows.append({
                "codec": codec.strip("{}").replace("name: ", "").replace("null", "none"),
                "error feedback": "yes" if feedback else "no", "seed": seed, "bytes up": round(sent),
                "times fewer": whole / sent, "validation loss": round(loss, 4), "above none": round(loss - usual, 4),
            })  # fmt: skip
            print(rows[-1], flush=True)
        publish("codecs", "Bytes of an update and the loss after 4 short rounds", rows, seeds=seeds)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("seeds", nargs="*", type=int, default=[0, 1], metavar="SEED")
    main(options.parse_args().seeds)
