"""What edges were told to train, and what scores their weights have: plans.jsonl, for those who look at a run later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .facts import MEAN
from .files import read_lines, write_atomically
from .lora import module_of
from .message import Message

FILE = "plans.jsonl"
MOST = 16  # numbers of an order beyond which they are data, not settings


def told(orders: Mapping[str, Message]) -> dict[str, dict[str, Any]]:
    """Orders in short, by edge; what is one object is looked at once."""
    short = {id(order): in_short(order) for order in orders.values()}
    return {edge: short[id(order)] for edge, order in orders.items()}


def in_short(order: Message) -> dict[str, Any]:
    """Its numbers, and as `ranks` the rank of every LoRA module that is to be trained."""
    ranks = {module_of(n): len(t) for n, t in order.tensors.items() if ".lora_A." in n and n.startswith("base_model.")}
    few = len(order.numbers) <= MOST
    numbers = {name: value for name, value in order.numbers.items() if few and math.isfinite(value)}
    return {**numbers, **({"ranks": ranks} if ranks else {})}


def scores(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Importance by edge and module, of a state in which edges told theirs."""
    found: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        edge, _, module = name.partition(f"/{MEAN}")
        if module and math.isfinite(value):
            found.setdefault(edge, {})[module] = value
    return found


class Plans:
    """plans.jsonl of a run folder: a line for each round in which an edge was told other than before, or scored anew.

    A line has `round`, from 1, and by edge what is new: `edges` (as `in_short` has it), `scores` (by module).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.known: dict[str, dict[str, Any]] = {"edges": {}, "scores": {}}

    def rewind(self, rounds: int) -> None:
        """Drops the lines of rounds after the first `rounds`, which will be run again."""
        lines = [line for line in read_lines(self.path) if line["round"] <= rounds]
        self.known = {"edges": {}, "scores": {}}
        for line in lines:
            for part, known in self.known.items():
                known.update(line.get(part, {}))
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, round: int, plans: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        """Adds what is new after a round, counted from 1; numbers: of the state."""
        now: dict[str, Mapping[str, Any]] = {"edges": plans, "scores": scores(numbers)}
        new = {part: {e: v for e, v in edges.items() if self.known[part].get(e) != v} for part, edges in now.items()}
        new = {part: edges for part, edges in new.items() if edges}
        if new:
            with self.path.open("a") as file:
                file.write(json.dumps({"round": round, **new}) + "\n")
        for part, edges in new.items():
            self.known[part].update(edges)
