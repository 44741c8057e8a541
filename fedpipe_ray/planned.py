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
from .plan_lines import gathered, scattered

FILE = "plans.jsonl"
MOST = 16  # numbers of an order beyond which they are data, not settings


def told(orders: Mapping[str, Message]) -> dict[str, dict[str, Any]]:
    """Orders in short, by edge; what is one object is looked at once."""
    short = {id(order): in_short(order) for order in orders.values()}
    return {edge: short[id(order)] for edge, order in orders.items()}


def in_short(order: Message) -> dict[str, Any]:
    """Its numbers but for those with a slash, and as `ranks` the rank of every LoRA module that is to be trained."""
    ranks = {module_of(n): len(t) for n, t in order.tensors.items() if ".lora_A." in n and n.startswith("base_model.")}
    few = len(order.numbers) <= MOST
    plain = ((name, value) for name, value in order.numbers.items() if "/" not in name)  # as in rounds.jsonl
    numbers = {name: value for name, value in plain if few and math.isfinite(value)}
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

    A line has `round`, from 1, and what is new: `plans` (as `gathered` has it), `scores` (by edge and module).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.edges: dict[str, Any] = {}
        self.scores: dict[str, Any] = {}

    def rewind(self, rounds: int) -> None:
        """Drops the lines of rounds after the first `rounds`, which will be run again."""
        lines = [line for line in read_lines(self.path) if line["round"] <= rounds]
        self.edges, self.scores = {}, {}
        for line in lines:
            self.edges |= scattered(line.get("plans", []))
            self.scores |= line.get("scores", {})
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, round: int, plans: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        """Adds what is new after a round, counted from 1; numbers: of the state."""
        edges = {edge: plan for edge, plan in plans.items() if self.edges.get(edge) != plan}
        anew = {edge: own for edge, own in scores(numbers).items() if self.scores.get(edge) != own}
        self.edges |= edges
        self.scores |= anew
        new: dict[str, Any] = {**({"plans": gathered(edges)} if edges else {}), **({"scores": anew} if anew else {})}
        if new:
            with self.path.open("a") as file:
                file.write(json.dumps({"round": round, **new}) + "\n")
