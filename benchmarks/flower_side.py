"""Flower's side of against_flower.py, run by the Python of Flower's own environment; and what both sides share.

    PYTHON -c "from benchmarks.flower_side import main; main()" WORK.json RESULT.jsonl

Only the standard library is imported at the top, for our side imports this file too. The app's functions stand in a
module that workers import, not in the script, or each call would unpickle them anew and nothing could be kept in a
worker. A line of the result is one round; a round is from the first message made to the last one averaged.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class AnonymousPeak:
    """The most private memory this process had since `start`, in bytes; shared mappings, such as Ray's store, left out.

    Sampled every 2 ms in a thread, as an update of 20 MB takes longer to copy.
    """

    def start(self) -> None:
        self.before = self.peak = self.now()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    @property
    def grown(self) -> int:
        return self.peak - self.before

    @staticmethod
    def now() -> int:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def die_once(place: str) -> None:
    """Kills this process, unless the file `place` says that it was done before; so a retry succeeds."""
    try:
        Path(place).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def note(place: Path, **facts: Any) -> None:
    """Adds a line to the result at once: a side that hangs later has still told what it did."""
    with place.open("a") as file:
        file.write(json.dumps(facts) + "\n")


# -- what a client does


def empty(content: Any, context: Any, work: dict[str, Any]) -> dict[str, Any]:
    """Answers with as many bytes of float32 as there are in an update."""
    import numpy as np

    edge, round = context.node_config["partition-id"], int(content["config"]["server-round"])
    if work["kill"] and round == work["kill"]["round"] and edge == 0:
        die_once(work["kill"]["done"])
    return {"w": np.full(work["update_bytes"] // 4, round + 0.5, np.float32)}


@functools.cache
def trained_model(folder: str, rank: int, alpha: float) -> Any:
    """The model with its adapter, kept in the worker."""
    return fresh_model(folder, rank, alpha)


def fresh_model(folder: str, rank: int, alpha: Any) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


@functools.cache
def kept_rows(folder: str, file: str) -> Any:
    """The edge's encoded rows, kept in the worker."""
    return encoded(folder, file)


def encoded(folder: str, file: str) -> Any:
    """(tokens, labels), [rows, length] each: all rows are of one length, so nobody pads; prompts have no label."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, labels = [], []
    for line in Path(file).read_text().splitlines():
        row = json.loads(line)
        prompt, response = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "response")
        )
        tokens.append([*prompt, *response, tokenizer.eos_token_id])
        labels.append([-100] * len(prompt) + tokens[-1][len(prompt) :])
    return torch.tensor(tokens), torch.tensor(labels)


def lora(content: Any, context: Any, work: dict[str, Any]) -> dict[str, Any]:
    """The steps of a round with AdamW, in float32, on one thread."""
    import torch

    torch.set_num_threads(1)
    edge, round = context.node_config["partition-id"], int(content["config"]["server-round"])
    model_of, rows_of = (trained_model, kept_rows) if work["cached"] else (fresh_model, encoded)
    model = model_of(work["model"], work["rank"], work["alpha"])
    tokens, labels = rows_of(work["model"], work["data"].format(edge=f"e{edge}"))
    own = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    given = content["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])
    weights = list(own.values())
    optimizer = torch.optim.AdamW(weights, lr=work["lr"], weight_decay=0.0, fused=True)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1000 * round + edge))
    model.train()
    for step in range(work["steps"]):
        drawn = order[step * work["batch"] : (step + 1) * work["batch"]]
        model(input_ids=tokens[drawn], labels=labels[drawn], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach().numpy() for name, parameter in own.items()}


# -- the two apps


def client_app(work: dict[str, Any]) -> Any:
    """Flower's ClientApp of a piece of work."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        update = (lora if work["kind"] == "lora" else empty)(message.content, context, work)
        arrays = ArrayRecord({name: Array(array) for name, array in update.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content=content, reply_to=message)

    return app


def server_app(work: dict[str, Any], result: Path) -> Any:
    """FedAvg over all nodes, every round timed and noted."""
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    memory = AnonymousPeak()

    class Timed(FedAvg):
        def configure_train(self, server_round: int, *rest: Any) -> Iterable[Any]:
            self.began = time.perf_counter()
            return super().configure_train(server_round, *rest)

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            kept = list(replies)
            averaged = super().aggregate_train(server_round, kept)
            usable = sum(not reply.has_error() for reply in kept)
            note(result, seconds=time.perf_counter() - self.began, reports=usable, grown=memory.grown)
            return averaged

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        memory.start()
        edges = work["edges"]
        if work["kind"] == "lora":
            from safetensors.numpy import load_file

            first = load_file(work["initial"])
        else:
            first = {"w": np.zeros(work["update_bytes"] // 4, np.float32)}
        strategy = Timed(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=edges, min_available_nodes=edges
        )  # fmt: skip
        initial = ArrayRecord({name: Array(array) for name, array in first.items()})
        del first
        done = strategy.start(grid, initial, num_rounds=work["rounds"], timeout=60)
        if work["kind"] == "lora":
            from safetensors.numpy import save_file

            final = {name: np.array(array.numpy(), np.float32) for name, array in done.arrays.items()}
            save_file(final, str(result.with_suffix(".safetensors")))

    return app


def main() -> None:
    """One piece of work as a simulation on two workers of one core each."""
    from flwr.simulation import run_simulation

    work, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    backend = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app(work, result), client_app(work), work["edges"], backend_config=backend)
