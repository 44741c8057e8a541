"""How do we compare with Flower 1.41's simulation, on the same two cores, in the same hour?

    python -m benchmarks.against_flower [--quick] [--only WORK ...] [--torch-index URL]

Five works (those that are not asked for keep their rows): round overhead with 4 empty edges; 100 empty logical edges
on 2 workers; 20 x 20 MB updates, the state sent to all as well, and what the driver holds; LoRA on 16 edges of a
0.86M-parameter Llama, 5 steps a round; reports a round after one worker was killed (SIGKILL) in round 2 of 6 with 6
edges. Both sides take turns, each repeat in a process and a Ray of its own; round 1, which starts workers, is left
out; medians over the repeats' medians. Loss: of both sides' last adapter, on the same held-out rows, by the same
evaluation. Driver peak: how much the private memory of the driver's process grew since before the first state, in
updates.

Flower runs in its best case: two workers of one core, the client's model and rows kept in the worker, one thread, plain
PyTorch; `template` is LoRA as its template for language models does it, model and rows made anew in every call. Its
environment is made under benchmarks/.cache at the first run. It waits for replies in steps of 0.1 s, so its short
rounds are multiples of that.

What Flower has and we do not: clients outside the cluster, behind firewalls, over connections of their own (SuperLink
and SuperNode) with an authentication of each node; any framework beside PyTorch; a large catalogue of strategies,
partitioners and baselines; differential privacy; secure aggregation. A simulation is a small part of it, and the only
one that can stand beside a fleet of Ray actors.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.empty import Empty
from benchmarks.flower_side import AnonymousPeak, die_once, note
from benchmarks.small_llama import TOKENS, write_material
from benchmarks.table import HERE, RESULTS, commit, publish
from fedpipe_ray.message import Message
from fedpipe_ray.settings import Profile
from fedpipe_ray.site import Site

ROOT = HERE.parent
FLOWER = HERE / ".cache" / "flower-env"
NEEDS = ["flwr[simulation]==1.41.0", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "safetensors==0.8.0"]
LIMIT_SECONDS = 900.0  # of one side's process
SIDES = ("ours", "flower", "flower template")


@dataclass(frozen=True)
class Work:
    """One comparison. target: what we promise, in seconds a round, or as text; template: Flower's second case too."""

    edges: int
    rounds: int
    target: float | str
    kind: str = "empty"
    update_bytes: int = 4
    kill_round: int = 0  # from 1
    packed: bool = False  # the edges share two workers
    template: bool = False


WORKS = {
    "4 empty edges": Work(4, 21, 0.020),
    "100 empty edges on 2 workers": Work(100, 21, 0.20, packed=True),
    "20 x 20 MB": Work(20, 11, "0.35, peak below 3", update_bytes=20_000_000, packed=True),
    "LoRA, 16 edges": Work(16, 11, 0.80, kind="lora", packed=True, template=True),
    "one worker killed": Work(6, 6, "6 >=5 6 6 6 6", kill_round=2),
}
QUICK = {
    "4 empty edges": Work(2, 3, 0.020),
    "100 empty edges on 2 workers": Work(10, 3, 0.20, packed=True),
    "20 x 20 MB": Work(3, 3, 0.35, update_bytes=2_000_000, packed=True),
    "LoRA, 16 edges": Work(2, 3, 0.80, kind="lora", packed=True, template=True),
    "one worker killed": Work(3, 4, "all but one", kill_round=2),
}
LORA: Mapping[str, Any] = {"rank": 8, "alpha": 16.0, "lr": 0.01, "steps": 5, "batch": 8}


# -- our side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange(Empty):
    """Empty edges that are sent the state, as Flower's are; one of them dies once, in round kill_round (from 1)."""

    kill_round: int = 0
    kill_done: str = ""

    def plan(
        self, state: Message, edges: Mapping[str, Profile], server: Site, round: int, rng: np.random.Generator
    ) -> dict[str, Message]:
        """Everybody gets the state."""
        return dict.fromkeys(edges, Message(state.tensors))

    def local_update(self, order: Message, site: Site, rng: np.random.Generator) -> Message:
        """The update, or the end of this process."""
        if site.round + 1 == self.kill_round and site.name == "e0":
            die_once(self.kill_done)
        return super().local_update(order, site, rng)


def run_settings(work: Work, given: Mapping[str, Any]) -> dict[str, Any]:
    """A run of ours that does the work."""
    profile = {"cpus": 1.0 if work.packed else math.floor(2e4 / work.edges) / 1e4}  # together what Flower has
    fleet = {"ray": True, "edges": {f"e{i}": profile for i in range(work.edges)}}
    if work.packed:
        fleet["placement"] = "packed"
    settings: dict[str, Any] = {"rounds": work.rounds, "fleet": fleet, "evaluate": {"every": 0}}
    if work.kind != "lora":
        kill = {"kill_round": work.kill_round, "kill_done": given["kill"]["done"] if given["kill"] else ""}
        name = "benchmarks.against_flower:Exchange"
        return {**settings, "method": {"name": name, "update_bytes": work.update_bytes, **kill}}
    data = {"source": given["data"], "prompt": "{prompt}", "response": "{response}", "test": given["test"]}
    method = {"name": "lora", "rank": LORA["rank"], "alpha": LORA["alpha"]}
    local = {key: LORA[key] for key in ("steps", "batch", "lr")} | {"schedule": "constant"}
    return {
        **settings, "model": {"name": given["model"]}, "method": method, "local": local,
        "data": {**data, "validation": 0.0, "max_length": TOKENS},
    }  # fmt: skip


def our_side(work: Work, given: Mapping[str, Any], result: Path) -> None:
    """The work on a Ray of its own; a line a round, as Flower's side writes them."""
    from actors.connect import set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.config import build, resolve
    from fedpipe_ray.loop import Start, federate
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.run import server_site
    from fedpipe_ray.settings import Run

    run = build(Run, run_settings(work, given))
    run = resolve(run) if work.kind == "lora" else run  # empty edges have no data
    method, memory = make_method(run.method), AnonymousPeak()
    fleet = RayFleet(run, method)
    try:
        fleet.open()
        memory.start()
        server, state = server_site(run, method, []), Message()
        start = Start(Message.load(Path(given["initial"]))) if work.kind == "lora" else None
        for done in federate(method, fleet, server, rounds=work.rounds, seed=0, evaluate_every=0, start=start):
            note(result, seconds=done.wall_seconds, reports=len(done.reports), grown=memory.grown)
            state = done.state
        if work.kind == "lora":
            state.save(result.with_suffix(".safetensors"))
    finally:
        fleet.close()


def loss_of(work: Work, given: Mapping[str, Any], adapter: Path) -> float:
    """Mean loss of an adapter on the held-out rows, whoever trained it."""
    from fedpipe_ray.config import build, resolve
    from fedpipe_ray.fleet import SerialFleet
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.report import Lost
    from fedpipe_ray.settings import Run

    run = resolve(build(Run, run_settings(dataclasses.replace(work, edges=1, packed=False), given)))
    fleet = SerialFleet(run, make_method(run.method))
    fleet.open()
    found = fleet.evaluate(Message.load(adapter), "test")["e0"]
    assert not isinstance(found, Lost), found
    return float(found["loss"])


# -- both sides in turn


def flower_python(torch_index: str | None) -> Path:
    """The Python of Flower's environment, made if it is missing or of other versions."""
    python, stamp = FLOWER / "bin" / "python", FLOWER / "needs.json"
    if stamp.exists() and json.loads(stamp.read_text()) == NEEDS:
        return python
    shutil.rmtree(FLOWER, ignore_errors=True)
    venv.create(FLOWER, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if torch_index:
        subprocess.run([*install, "--index-url", torch_index, NEEDS[1]], check=True)
    subprocess.run([*install, *NEEDS], check=True)
    stamp.write_text(json.dumps(NEEDS))
    return python


def one_side(
    side: str, name: str, work: Work, given: Mapping[str, Any], folder: Path, quick: bool
) -> list[dict[str, Any]]:
    """The rounds that one side noted, in a process with its own home and Ray; ended with all it started."""
    place, result = folder / "work.json", folder / "result.jsonl"
    facts = {"kind": work.kind, "edges": work.edges, "rounds": work.rounds, "update_bytes": work.update_bytes}
    place.write_text(json.dumps({**facts, **given, "cached": side != "flower template"}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "FLWR_"))}
    environment |= {
        "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if side == "ours":
        command = [sys.executable, "-m", "benchmarks.against_flower", "--side", name, str(place), str(result)]
        command += ["--quick"] if quick else []
    else:
        environment |= {"RAY_ADDRESS": "local", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(folder / "flower")}
        begin = "from benchmarks.flower_side import main; main()"
        command = [str(FLOWER / "bin" / "python"), "-c", begin, str(place), str(result)]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{name}, {side}: ended after {LIMIT_SECONDS:g} s", file=sys.stderr)
        finally:
            end(process)
    rounds = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    if len(rounds) < 2 or (process.returncode and not work.kill_round):
        raise RuntimeError(f"{name}, {side}: exit code {process.returncode}\n{log.read_text()[-3000:]}")
    return rounds


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that has not, with its children, by their own ids."""
    import psutil

    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.send_signal(signal.SIGTERM)
        for member in psutil.wait_procs(family, timeout=10)[1]:
            member.kill()
    process.wait()


def compare(name: str, work: Work, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A row a side; the sides take turns, and in who is first."""
    sides = [side for side in SIDES if work.template or side != "flower template"]
    found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    faults: dict[str, str] = {}
    for repeat in range(repeats):
        for side in sides[:: 1 if repeat % 2 == 0 else -1]:
            if side in faults:
                continue
            folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))  # short: Ray puts sockets in it
            try:
                given = {**LORA, **write_material(folder, work.edges, LORA)} if work.kind == "lora" else {}
                given["kill"] = {"round": work.kill_round, "done": str(folder / "killed")} if work.kill_round else None
                found[side].append(one_side(side, name, work, given, folder, quick))
                if work.kind == "lora":
                    losses[side].append(loss_of(work, given, folder / "result.safetensors"))
            except RuntimeError as error:  # the other works' figures are worth keeping
                print(error, file=sys.stderr)
                faults[side] = f"failed: {str(error).splitlines()[0]}"
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return [row(name, side, work, found[side], losses[side], faults.get(side)) for side in sides]


def row(
    name: str, side: str, work: Work, repeats: list[list[dict[str, Any]]], losses: Iterable[float], fault: str | None
) -> dict[str, Any]:
    """One line of the table; of seconds without the first round."""
    about = {"work": name, "side": side, "commit": commit()}
    if fault:
        gap = dict.fromkeys(("median s", "best s", "worst s", "driver peak, updates", "loss"), "-")
        return {**about, **gap, "reports a round": fault, "target": work.target}
    medians = [median(round["seconds"] for round in rounds[1:]) for rounds in repeats]
    peaks = [rounds[-1]["grown"] / work.update_bytes for rounds in repeats]
    reports = sorted({" ".join(str(round["reports"]) for round in rounds) for rounds in repeats})
    same = str(work.edges) if reports == [" ".join([str(work.edges)] * work.rounds)] else " | ".join(reports)
    return {
        **about, "median s": median(medians), "best s": min(medians), "worst s": max(medians),
        "driver peak, updates": median(peaks) if work.update_bytes > 1_000_000 else "-",
        "loss": median(losses) if work.kind == "lora" else "-", "reports a round": same, "target": work.target,
    }  # fmt: skip


def main() -> None:
    """Compares, or does our side of one work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, one repeat: does it run at all?")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), metavar="WORK")
    parser.add_argument("--torch-index", metavar="URL", help="install Flower's torch from here, such as a CPU build")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    works = QUICK if options.quick else WORKS
    if options.side:
        name, given, result = options.side
        # The method's class by its importable name, for workers; here it is of __main__.
        module = importlib.import_module("benchmarks.against_flower")
        module.our_side(works[name], json.loads(Path(given).read_text()), Path(result))
        return
    flower_python(options.torch_index)
    repeats = 1 if options.quick else 5
    rows = [line for name in options.only for line in compare(name, works[name], repeats, options.quick)]
    facts = {"repeats": repeats, "seed": 0, "flower": NEEDS}
    question = "fedpipe-ray and Flower 1.41's simulation, seconds a round"
    if options.quick:
        publish("against_flower_quick", f"{question}; only a few edges and rounds, to see that it runs", rows, **facts)
    else:
        kept = RESULTS / "against_flower.json"
        before = json.loads(kept.read_text())["rows"] if kept.exists() else []
        rows += [row for row in before if row["work"] not in options.only]
        publish("against_flower", question, sorted(rows, key=lambda row: list(WORKS).index(row["work"])), **facts)


if __name__ == "__main__":
    main()
