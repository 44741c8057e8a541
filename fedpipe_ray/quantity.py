"""Numbers with units in configuration files: `4GiB`, `20Mbit/s`, `30ms`, `50GFLOP/s`.

A plain number is in the base unit that the field's name states (bytes, bits a second, seconds, FLOP a second).
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator

EXAMPLES = {"byte": "4GiB", "bit/second": "20Mbit/s", "second": "30ms", "flop/second": "50GFLOP/s"}


@cache
def _registry() -> Any:
    import pint

    units = pint.UnitRegistry(cache_folder=None)
    for line in ("flop = [operations] = FLOP = flops = FLOPs", "bps = bit / second", "FLOPS = flop / second"):
        units.define(line)
    return units


def parse_quantity(value: object, unit: str) -> object:
    """`value` in `unit` as a float; what is not a string is returned unchanged. Raises ValueError on a wrong unit."""
    if not isinstance(value, str):
        return value
    try:
        amount = _registry().Quantity(value)
        return float(amount.to(unit).magnitude)
    except Exception as error:  # pint raises its own tree, tokenize errors and AttributeError for unknown units
        raise ValueError(f"{value!r} is not a quantity in {unit}; write for example {EXAMPLES[unit]}") from error


def _quantity(unit: str) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_quantity(value, unit))


def _whole_bytes(value: object) -> object:
    amount = parse_quantity(value, "byte")
    return int(amount) if isinstance(amount, float) and amount == int(amount) else amount


Bytes = Annotated[int, BeforeValidator(_whole_bytes)]
BitsPerSecond = Annotated[float, _quantity("bit/second")]
Seconds = Annotated[float, _quantity("second")]
FlopPerSecond = Annotated[float, _quantity("flop/second")]
