"""What do edges of one node hold together, and does it stay the same over many rounds?

    python -m benchmarks.fleet_memory [node] [flat]

node: 1, 2 and 4 edges with a Llama of 0.86M and one of 59M parameters, shipped by the driver, when all are ready and
after a round of LoRA. Memory is the proportional set size of the driver and all processes under it, Ray's own included,
so that what they share counts once; `a further edge` is what each edge beyond the first added, `its process` what it
adds with a model of no size (a method without one), and `its share` the difference, when ready: to be small beside the
base. `after a round` has the gradients, moments and activations of its training on top, as far as its
process keeps them.

flat: 4 edges, 100 rounds of LoRA on the small one, on Ray and packed on two workers. Private memory of the driver and
of the largest worker after 10, 55 and 100 rounds, and processes left when the driver has ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.small_llama import TOKENS, VOCABULARY, write_material
from benchmarks.table import parser, publish

EDGES, ROUNDS, LOOKS = (1, 2, 4), 100, (10, 55, 100)
LARGE: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
}


def add_large(folder: Path) -> None:
    """A model of 59M parameters with the small one's tokenizer, as `large`."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=1, eos_token_id=2, **LARGE)
    LlamaForCausalLM(config).save_pretrained(folder / "large")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "large")


def family() -> list[psutil.Process]:
    """This process and all under it."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def memory(process: psutil.Process, key: str) -> int:
    """`pss` or `uss` of a process in bytes; 0 if it has ended."""
    try:
        return int(getattr(process.memory_full_info(), key))
    except psutil.Error:
        return 0


def settings(folder: Path, model: str, edges: int, rounds: int, **fleet: Any) -> dict[str, Any]:
    """A run of ours; model "": a method without one."""
    profiles = {f"e{i}": {"cpus": 0.25} for i in range(edges)}
    tree: dict[str, Any] = {"rounds": rounds, "fleet": {"ray": True, "edges": profiles, **fleet}}
    if not model:
        return {**tree, "method": {"name": "benchmarks.empty:Empty"}}
    data = {"source": f"{folder}/{{edge}}.jsonl", "prompt": "{prompt}", "response": "{response}", "validation": 0.0}
    return {
        **tree, "method": {"name": "lora"}, "model": {"name": str(folder / model), "load": "driver"},
        "local": {"steps": 2, "batch": 2}, "data": {**data, "test": f"{folder}/test.jsonl", "max_length": TOKENS},
    }  # fmt: skip


def measure(tree: dict[str, Any]) -> dict[str, Any]:
    """Runs it. Bytes of the whole family when ready and at the end, and by round those of driver and largest worker."""
    from actors.connect import connect, set_environment

    set_environment(None)
    from actors.fleet import RayFleet
    from fedpipe_ray.config import build, resolve
    from fedpipe_ray.loop import federate
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.run import server_site
    from fedpipe_ray.settings import Run

    connect(None)
    run = build(Run, tree)
    run = resolve(run) if run.method["name"] == "lora" else run
    method = make_method(run.method)
    fleet = RayFleet(run, method)
    fleet.open()
    ready = sum(memory(process, "pss") for process in family())
    server, looks = server_site(run, method, []), []
    for done in federate(method, fleet, server, rounds=run.rounds, seed=0, evaluate_every=0):
        assert len(done.reports) == len(fleet.edges)
        if done.number + 1 in LOOKS:
            workers = [p for p in psutil.Process().children(recursive=True) if "EdgeActor" in " ".join(p.cmdline())]
            looks.append((memory(psutil.Process(), "uss"), max(memory(p, "uss") for p in workers)))
    total = sum(memory(process, "pss") for process in family())
    started = [(process.pid, process.create_time()) for process in family()]
    fleet.close()
    return {"ready": ready, "total": total, "looks": looks, "started": started}


def in_process(tree: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own; left: how many of the processes it started live 30 s after its end."""
    command = [sys.executable, "-m", "benchmarks.fleet_memory", "--one", json.dumps(tree)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = dict(json.loads(ended.stdout.splitlines()[-1]))
    alive = {process.pid: process for process in psutil.process_iter()}
    born = {pid: made for pid, made in found.pop("started") if pid in alive}
    ours = [alive[pid] for pid, made in born.items() if alive[pid].create_time() == made]
    return {**found, "left": len(psutil.wait_procs(ours, timeout=30)[1])}


def node(folder: Path) -> None:
    """The first table."""
    rows = []
    empty = {edges: in_process(settings(folder, "", edges, 1))["ready"] for edges in EDGES}
    process = (empty[EDGES[-1]] - empty[1]) / (EDGES[-1] - 1)
    for model in ("model", "large"):
        base = sum(file.stat().st_size for file in (folder / model).glob("*.safetensors"))
        found = {edges: in_process(settings(folder, model, edges, 1)) for edges in EDGES}
        for edges in EDGES:
            ready, total = ((found[edges][when] - found[1][when]) / max(1, edges - 1) for when in ("ready", "total"))
            rows.append({
                "model MiB": base / 2**20, "edges": edges, "all processes MiB": found[edges]["ready"] / 2**20,
                "a further edge MiB": ready / 2**20 if edges > 1 else "-",
                "its process MiB": process / 2**20 if edges > 1 else "-",
                "its share MiB": (ready - process) / 2**20 if edges > 1 else "-",
                "after a round MiB": total / 2**20 if edges > 1 else "-",
            })  # fmt: skip
    publish("node_memory", "What the edges of one node hold together", rows, seed=0)


def flat(folder: Path) -> None:
    """The second."""
    rows = []
    for placement, more in (("dedicated", {}), ("packed", {"workers": 2})):
        found = in_process(settings(folder, "model", 4, ROUNDS, placement=placement, **more))
        for number, (driver, worker) in zip(LOOKS, found["looks"], strict=True):
            rows.append({
                "placement": placement, "round": number, "driver MiB": driver / 2**20,
                "largest worker MiB": worker / 2**20, "processes left": found["left"],
            })  # fmt: skip
    publish("flat_memory", "Private memory over 100 rounds", rows, seed=0)


def main() -> None:
    """Both, or those that are named."""
    if sys.argv[1:2] == ["--one"]:  # a process of ours
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    options = parser(__doc__)
    options.add_argument("parts", nargs="*", help="node, flat; default: both")
    parts = options.parse_args().parts
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_material(folder, 4, {"rank": 8, "alpha": 16.0})
        add_large(folder)
        for name, part in (("node", node), ("flat", flat)):
            if name in (parts or [name]):
                part(folder)


if __name__ == "__main__":
    main()
