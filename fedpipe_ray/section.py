"""What the sections of a run file have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict


class Section:
    """Base of every section: pydantic checks its fields strictly and refuses keys it does not have."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless condition: for limits a type cannot say."""
    if not condition:
        raise ValueError(message)
