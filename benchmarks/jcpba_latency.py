"""How much sooner does a round end by each allocation, how far is the descent from the optimum, how long is planning?

    python -m benchmarks.jcpba_latency [--quick]

Random instances of one setting (10 clients in a disc of 500 m, 23 dBm, 20 MHz, 2 to 10 TFLOP/s, a model of
1.3e9 weights, rho_bar 0.3, rho_max 0.7), and the same with 1 MHz, where the uplink takes longer than the work. of (i):
median latency over that of no pruning with equal bandwidth; bar: within 0.03 of `derived`, the medians of 30
instances that came with the derivation. paired: median of the ratios.
over, %: above the optimum of the same instance, median and 5 and 95 % quantiles. Rows stand in
.cache/jcpba_latency.jsonl as they come and are not measured again. Planning: CPU seconds for 1,000 clients,
the best of three, one core; bar 0.05.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from benchmarks.table import HERE, parser, publish
from fedpipe_ray.channel import Channel
from fedpipe_ray.planning.wireless import KINDS, Problem, allocate

DONE = HERE / ".cache" / "jcpba_latency.jsonl"
INSTANCES, CLIENTS = 1000, 1000
SETTINGS = {"defaults": 20e6, "bandwidth-bound": 1e6}  # Hz
DERIVED = {
    "unpruned-equal": 1.0, "unpruned": 0.863, "uniform-equal": 0.700, "uniform": 0.604, "pruning-equal": 0.353,
    "bcd": 0.352, "joint": 0.343,
}  # fmt: skip


def instance(seed: int, clients: int, bandwidth_hz: float) -> Problem:
    """One draw of speeds, places and fading."""
    speed = np.random.default_rng(seed).uniform(2e12, 10e12, clients)
    snr = np.array([Channel().snr_hz(seed, 0, f"e{k}") for k in range(clients)])
    work = 4 * 1.3e9 * 16 * 512 * 4 / speed
    return Problem(np.ones(clients), work, np.full(clients, 6.3e6 * 32), snr, bandwidth_hz, 0.3, 0.7)


def latencies(setting: str, seed: int) -> dict[str, Any]:
    """Seconds of a round by each allocation."""
    problem = instance(seed, 10, SETTINGS[setting])
    found: dict[str, float] = {kind: allocate(problem, kind, np.random.default_rng(seed)).seconds for kind in KINDS}
    return {"setting": setting, "seed": seed, **found}


def planning(kind: Any, bandwidth_hz: float) -> float:
    """CPU seconds of one plan."""
    seconds = []
    for seed in range(3):
        problem = instance(seed, CLIENTS, bandwidth_hz)
        began = time.process_time()
        allocate(problem, kind)
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    """Both tables; --quick: 30 instances of either setting."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    count = 30 if options.parse_args().quick else INSTANCES
    known = [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    rows = []
    DONE.parent.mkdir(exist_ok=True)
    for setting in SETTINGS:
        own = {one["seed"]: one for one in known if one["setting"] == setting}
        with DONE.open("a") as file:
            for seed in range(count):
                if seed not in own:
                    own[seed] = latencies(setting, seed)
                    file.write(json.dumps(own[seed]) + "\n")
        table = {kind: np.array([own[seed][kind] for seed in range(count)]) for kind in KINDS}
        for kind, seconds in table.items():
            over = 100 * (seconds / table["joint"] - 1)
            rows.append({
                "setting": setting, "allocation": kind, "instances": count, "median s": float(np.median(seconds)),
                "of (i)": float(np.median(seconds) / np.median(table[KINDS[0]])),
                "derived": DERIVED.get(kind, "") if setting == "defaults" else "",
                "paired": float(np.median(seconds / table[KINDS[0]])), "over, %": float(np.median(over)),
                "5 %": float(np.quantile(over, 0.05)), "95 %": float(np.quantile(over, 0.95)),
            })  # fmt: skip
    quick = "_quick" if count < INSTANCES else ""
    publish(f"jcpba_latency{quick}", "JCPBA: latency of a round by allocation", rows)
    speeds = [
        {"clients": CLIENTS, "MHz": hertz / 1e6, "allocation": kind, "CPU s": planning(kind, hertz), "bar": 0.05}
        for hertz in (20e6, 2e9)
        for kind in ("joint", "bcd", "unpruned")
    ]  # fmt: skip
    publish(f"jcpba_planning{quick}", "JCPBA: one plan", speeds)


if __name__ == "__main__":
    main()
