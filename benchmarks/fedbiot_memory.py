"""What does an edge of FedBiOT need, beside one of federated LoRA with the whole model? Bar: within 10 % of the sizes.

    python -m benchmarks.fedbiot_memory [--quick]

A Llama of 12 layers and 87M parameters, float32 on one CPU thread, LoRA of rank 8 on q_proj and v_proj as in the paper;
an edge's round of three steps, each in a process of its own. MiB: the process's high-water mark above its level before
the model loads, the median of three processes. Expected: parameters that the edge holds over those of the whole model,
as the table of docs/methods/fedbiot.md has them for LLaMA-2-7B. With a row of 16 tokens weights are nearly all of it;
with 4 rows of 128 activations show, which are kept for the adapter's layers alone. GFLOP and bytes are counted, not
measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.table import RESULTS, parser, publish

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "a 2, beta 0.2": {"a": 2, "beta": 0.2},
    "a 2, beta 0.5": {"a": 2, "beta": 0.5},
    "a 4, beta 0.2": {"a": 4, "beta": 0.2},
    "a 4, beta 0.5": {"a": 4, "beta": 0.5},
    "ends, a 4, beta 0.2": {"a": 4, "beta": 0.2, "split": "ends"},
}
BATCHES = ((1, 16), (4, 128))
SHAPE: dict[str, Any] = {"vocab_size": 1600, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}


def write_run(folder: Path, rows: int, tokens: int, method: dict[str, Any]) -> Path:
    """The run file of one row."""
    given = method if "name" in method else {"name": "fedbiot", "prealign_steps": 0, **method}
    data = {"source": str(folder / "e0.jsonl"), "prompt": "{prompt}", "response": "{response}", "max_length": tokens}
    tree = {
        "model": {"name": str(folder / "large")}, "data": {**data, "validation": 0.0, "test": 0.0},
        "server": {"data": data}, "fleet": {"ray": False, "edges": {"e0": {}}},
        "method": {**given, "targets": ["q_proj", "v_proj"]},
        "local": {"steps": 3, "batch": rows, "threads": 1},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def write_model(folder: Path) -> None:
    """The model, its tokenizer, and rows of 128 tokens, in files."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from benchmarks import small_llama

    small_llama.TOKENS = 128
    small_llama.write_material(folder, 1, {"rank": 8, "alpha": 16.0})
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=8, pad_token_id=1, eos_token_id=2))
    model.save_pretrained(folder / "large")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "large")


def write_order(path: Path) -> None:
    """The order of round 1 as an edge gets it, in a process of its own: it has the whole model."""
    from fedpipe_ray.config import load_run
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.randomness import rng_for
    from fedpipe_ray.report import Lost
    from fedpipe_ray.run import server_site

    run = load_run(path, [], lambda name, _: {})
    method = make_method(run.method)
    server = server_site(run, method, [])
    state = method.start(server, rng_for(0, 0, "start"))
    order = method.plan(state, run.fleet.edges, server, 0, rng_for(0, 0, "plan"))["e0"]
    assert not isinstance(order, Lost), order.reason
    order.save(path.with_name("order.safetensors"))
    print(json.dumps({"payload": order.payload_bytes}))


def edge(path: Path) -> None:
    """One edge's round; the order is mapped from its file, as an actor maps it from the object store."""
    import torch
    from safetensors import safe_open

    from fedpipe_ray.config import load_run
    from fedpipe_ray.costs import give_back_freed_memory, status_bytes
    from fedpipe_ray.fleet import SerialFleet
    from fedpipe_ray.message import Message
    from fedpipe_ray.methods import make_method
    from fedpipe_ray.site import attempt

    torch.set_num_threads(1)
    run = load_run(path, [], lambda name, _: {})
    method = make_method(run.method)
    site = SerialFleet(run, method).sites["e0"]
    torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()
    len(site.data.train)
    give_back_freed_memory()
    level = status_bytes("VmRSS")
    with safe_open(path.with_name("order.safetensors"), "pt") as file:
        order = Message({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (a file of safetensors is no mapping)
    if site.sent:
        site.build(order)
    held = sum(p.numel() for p in site.base.model.parameters())
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # what loading took for a moment is left out, on both sides
    report, update = attempt(site, order, 0)
    assert update is not None, report
    print(json.dumps({
        "MiB": (status_bytes("VmHWM") - level) / 2**20,
        "held": held, "GFLOP": report.cost.flops / 1e9, "s a step": report.cost.step_seconds,
        "MB down once": sum(t.numel() * t.element_size() for t in order.kept.values()) / 1e6,
        "kB down a round": sum(t.numel() * t.element_size() for t in order.rest.values()) / 1e3,
        "kB up a round": update.payload_bytes / 1e3,
    }))  # fmt: skip


def process(kind: str, path: Path) -> dict[str, Any]:
    """What a process of this file says."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.fedbiot_memory", kind, str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main(quick: bool) -> None:
    """A row as it comes; rows that the last table has are not measured again."""
    name, question = f"fedbiot_memory{'_quick' if quick else ''}", "FedBiOT: an edge beside one with the whole model"
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder)
        for batch, tokens in BATCHES[: 1 if quick else 2]:
            for setting, method in list(SETTINGS.items())[: 3 if quick else None]:
                if any((row["setting"], row["rows"], row["tokens"]) == (setting, batch, tokens) for row in rows):
                    continue
                run = write_run(folder, batch, tokens, method)
                process("order", run)
                tries = [process("edge", run) for _ in range(1 if quick else 3)]
                found = {key: median(one[key] for one in tries) for key in tries[0]}
                whole = next((r for r in rows if r["setting"] == "lora" and r["rows"] == batch), None) or found
                held = found.pop("held") / 1e6
                rows.append({
                    "setting": setting, "rows": batch, "tokens": tokens, "M parameters": held,
                    "expected": held / whole.get("M parameters", held), "measured": found["MiB"] / whole["MiB"],
                    **found,
                })  # fmt: skip
                publish(name, question, rows, seed=0)


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a process of ours
        {"order": write_order, "edge": edge}[sys.argv[1]](Path(sys.argv[2]))
    else:
        options = parser(__doc__)
        options.add_argument("--quick", action="store_true")
        main(options.parse_args().quick)
