"""How long does FedKSeed's rebuild take, and what does a step need? Bars: 5 times the naive rebuild, one chunk.

    python -m benchmarks.fedkseed_rebuild [--quick]

Rebuild: w0 - sum_j c_j z_j with K = 4096 candidates, all with a coefficient, of which some have changed since the last
rebuild. Naive: equation E5 as it stands, a candidate after the other, each parameter's whole noise at a time, from the
same generator. Whole: every candidate by chunks, exactly. Taken: what a rebuild does, with the kept sum where that is
cheaper. A Llama of 0.86M parameters, one thread; CPU seconds, the best of three, for other work shares the cores.

Noise: nanoseconds a normal, by generator, and the FLOPs that a matrix product over 64 tokens does in that time.

Step: a Llama of 59M parameters, what one forward pass over a row of 64 tokens grows the process by, and what two whole
steps do; seconds of either, and of a rebuild with 3 x 200 changed candidates beside 200 steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.fleet_memory import add_large
from benchmarks.small_llama import TOKENS, write_material
from benchmarks.table import parser, publish
from fedpipe_ray.batches import Batch, sums
from fedpipe_ray.costs import PeakMemory
from fedpipe_ray.model import Base
from fedpipe_ray.noise import Flat, Noise, chunk_of
from fedpipe_ray.seed_sums import UNIT, rebuild
from fedpipe_ray.settings import Model
from fedpipe_ray.zeroth_order import Direction, search

CPU, SEED, REPEATS = torch.device("cpu"), 7, 3
SHARES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0)


def best(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """CPU seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


@torch.inference_mode()
def naive(base: Base, model: Any, coefficients: np.ndarray[Any, Any]) -> None:
    """E5, in float32."""
    flat, noise = Flat(model), Noise(SEED, CPU)
    model.load_state_dict(base.model.state_dict())
    for candidate in np.flatnonzero(coefficients).tolist():
        for name, p in flat.parameters.items():
            z = noise.of(candidate, flat.starts[name], p.numel()).view(p.shape)
            p.sub_(z, alpha=UNIT * int(coefficients[candidate]))


def rebuilds(folder: Path, count: int) -> None:
    """The first table."""
    base = Base.load(Model(name=str(folder / "model"), device="cpu"), "causal", [], 0)
    model, draw = base.writable(), np.random.default_rng(0)
    now = draw.integers(10**3, 10**5, count)
    slow = best(lambda: naive(base, model, now), 1 if count > 1000 else REPEATS)
    whole = best(lambda: rebuild(base, model, SEED, now, keep=False), 1 if count > 1000 else REPEATS)
    rebuild(base, model, SEED, now)
    rows = []
    for share in SHARES:
        changed, seconds = round(share * count), []
        for _ in range(REPEATS if share <= 0.2 else 1):
            chosen = draw.permutation(count)[:changed]
            now = now.copy()
            now[chosen] += draw.integers(1, 10**4, changed)
            seconds.append(best(partial(rebuild, base, model, SEED, now), 1))
        rows.append({
            "changed": changed, "of": count, "naive s": slow, "whole s": whole, "taken s": min(seconds),
            "times naive": slow / min(seconds), "kept sum": "used" if changed < count else "not used",
        })  # fmt: skip
    quick = "_quick" if count < 4096 else ""
    publish(
        f"fedkseed_rebuild{quick}", "FedKSeed: a rebuild of 0.86M weights", rows, parameters=Flat(model).size, seed=SEED
    )


def noises() -> None:
    """The second."""
    count, draw, noise = 2**18, np.random.Generator(np.random.Philox(key=SEED)), Noise(SEED, CPU)
    weight, x, total = torch.randn(512, 512), torch.randn(64, 512), torch.zeros(count, dtype=torch.float64)

    def box_muller() -> Any:
        u, v = draw.random((2, count // 2), dtype=np.float32)
        radius = np.sqrt(-2 * np.log1p(-u))
        return radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)

    product = best(lambda: functional.linear(x, weight), 50) / (2 * 64 * weight.numel())  # seconds a FLOP
    ways: dict[str, Callable[[], Any]] = {
        "looked up (ours)": lambda: noise.of(3, 0, count),
        "looked up and summed": lambda: total.add_(noise.of(3, 0, count), alpha=5),
        "numpy ziggurat, float32": lambda: draw.standard_normal(count, dtype=np.float32),
        "numpy Box-Muller, float32": box_muller,
        "torch normal_": lambda: torch.empty(count).normal_(),
    }
    rows = []
    for name, work in ways.items():
        each = best(work, 50) / count
        rows.append({"normals": name, "ns each": 1e9 * each, "as FLOPs of a product": each / product})
    publish("fedkseed_noise", "FedKSeed: what a normal costs", rows, seed=SEED)


def steps(folder: Path, model: str) -> None:
    """The third."""
    base = Base.load(Model(name=str(folder / model), device="cpu"), "causal", [], 0)
    copy = base.writable().requires_grad_(False)
    tokens = torch.randint(3, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, torch.ones_like(tokens), tokens.clone(), TOKENS - 1)
    direction = Direction(copy, SEED, CPU)

    def forward() -> None:
        with torch.inference_mode():
            sums(copy, batch, CPU)

    def step(count: int = 2) -> None:
        options: dict[str, Any] = {"eps": 5e-4, "lr": 1e-7, "weight_decay": 0.0, "precision": "float32"}
        search(direction, [batch] * count, range(count), **options)

    grown: dict[str, list[int]] = {"forward": [], "step": []}
    for _ in range(3):
        for name, work in (("forward", forward), ("step", step)):
            with PeakMemory(CPU) as peak:
                work()
            grown[name].append(peak.grown)
    pass_seconds, step_seconds = best(forward), best(lambda: step(1), 2)
    one = best(lambda: direction.noise.of(5, 0, 2**20)) / 2**20 * direction.flat.size
    few = np.arange(1, 13)  # a fiftieth of 600 candidates: a rebuild is linear in them
    rebuild(base, copy, SEED, 0 * few)
    twelve = best(lambda: rebuild(base, copy, SEED, few, keep=False), 1)
    rows = [{
        "weights M": direction.flat.size / 1e6, "weights MiB": 4 * direction.flat.size / 2**20,
        "forward grows MiB": median(grown["forward"][1:]) / 2**20, "step grows MiB": median(grown["step"][1:]) / 2**20,
        "chunk MiB": 4 * chunk_of(CPU) / 2**20, "forward s": pass_seconds, "step s": step_seconds,
        "of it noise s": 3 * one, "200 steps s": 200 * step_seconds, "rebuild, 600 changed s": 50 * twelve,
    }]  # fmt: skip
    publish("fedkseed_step", "FedKSeed: what a step needs", rows, seed=SEED)


def main() -> None:
    """All three; --quick: an eighth of the candidates."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true")
    quick = options.parse_args().quick
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_material(folder, 1, {"rank": 8, "alpha": 16.0})
        noises()
        rebuilds(folder, 512 if quick else 4096)
        add_large(folder)
        steps(folder, "large")


if __name__ == "__main__":
    main()
