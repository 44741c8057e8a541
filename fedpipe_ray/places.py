"""Where a weight stands in a model, by its name: its layer, and its kind among the weights of a layer. Ours."""

from __future__ import annotations

import re
from collections.abc import Iterable

LAYER = re.compile(r"\.(\d+)\.")


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Of weights by name: the place in a layer, without numbers, in as few last parts as tell it from the others.

    q_proj of Llama; attn.c_proj and mlp.c_proj of GPT-2, whose last parts alone would make them one kind.
    """
    places = {}
    for name in names:
        number = LAYER.search(f".{name}.")
        inside = name[number.end() - 1 :] if number else name
        places[name] = tuple(part for part in inside.split(".") if not part.isdigit())
    distinct = set(places.values())

    def short(place: tuple[str, ...]) -> str:
        ends = (place[-count:] for count in range(1, len(place)))
        return ".".join(next((end for end in ends if sum(o[-len(end) :] == end for o in distinct) == 1), place))

    return {name: short(place) for name, place in places.items()}


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """The first number in each name, in the model's order; of one without, such as a pooler, that of the one before."""
    found, last = {}, 0
    for name in names:
        number = LAYER.search(f".{name}.")
        found[name] = last = int(number[1]) if number else last
    return found
