"""Numbers with units in configuration files: `4GiB`, `20Mbit/s`, `30ms`, `50GFLOP/s`, `20MHz`.

A plain number is in the base unit that the field's name states (bytes, bits a second, seconds, FLOP a second, hertz).
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

EXAMPLES = {"byte": "4GiB", "bit/second": "20Mbit/s", "second": "30ms", "flop/second": "50GFLOP/s", "hertz": "20MHz"}
UNITS: dict[str, dict[str, float]] = {
    "byte": {"B": 1, "byte": 1, "bytes": 1},
    "bit/second": {"bit/s": 1, "bits/s": 1, "bit/second": 1, "bps": 1, "B/s": 8, "byte/s": 8, "bytes/s": 8},
    "second": {"s": 1, "second": 1, "seconds": 1, "min": 60, "minutes": 60, "h": 3600, "hours": 3600},
    "flop/second": {"FLOP/s": 1, "FLOPs/s": 1, "FLOPS": 1, "flop/s": 1, "flops/s": 1, "flop/second": 1},
    "hertz": {"Hz": 1, "hertz": 1},
}
LARGE = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
SMALL = {"m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}
_FORM = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(\D.*)")


def parse_quantity(value: str, unit: str) -> float:
    """`value` in `unit`. Raises ValueError for a wrong unit, or none."""
    prefixes = {"": 1.0, **(SMALL if unit == "second" else LARGE | BINARY)}
    known = {prefix + name: size * factor for prefix, size in prefixes.items() for name, factor in UNITS[unit].items()}
    found = _FORM.fullmatch("".join(value.split()))
    amount = float(found[1]) * known.get(found[2], math.nan) if found else math.nan
    if not math.isfinite(amount):
        raise ValueError(f"{value!r} is not a quantity in {unit}; write for example {EXAMPLES[unit]}")
    return amount


def _quantity(unit: str) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_quantity(value, unit) if isinstance(value, str) else value)


def _whole_bytes(value: object) -> object:
    if isinstance(value, str):
        return int(parse_quantity(value, "byte"))
    return int(value) if isinstance(value, float) and value.is_integer() else value


Bytes = Annotated[int, BeforeValidator(_whole_bytes)]
BitsPerSecond = Annotated[float, _quantity("bit/second")]
Seconds = Annotated[float, _quantity("second")]
FlopPerSecond = Annotated[float, _quantity("flop/second")]
Hertz = Annotated[float, _quantity("hertz")]
