"""Federated parameter-efficient fine-tuning of language models over unequal edge servers.

Names load on first use, so that `import fedpipe_ray` costs nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .__main__ import load
    from .display import comparison
    from .fleet import SerialFleet
    from .loop import Round, federate
    from .message import Message
    from .methods import make_method
    from .notebook import history, open_fleet, progress, quality
    from .run import rounds_of, server_site
    from .views import first_view

# Set before anything imports bitsandbytes, which else warns every process that the package `kernels` is missing (with
# it, code would be downloaded at import).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "Message", "Round", "SerialFleet", "comparison", "federate", "first_view", "history", "load", "make_method",
    "open_fleet", "progress", "quality", "rounds_of", "server_site",
]  # fmt: skip

_HOME = {
    "Message": ".message", "Round": ".loop", "SerialFleet": ".fleet", "comparison": ".display", "federate": ".loop",
    "first_view": ".views", "history": ".notebook", "load": ".__main__", "make_method": ".methods",
    "open_fleet": ".notebook", "progress": ".notebook", "quality": ".notebook", "rounds_of": ".run",
    "server_site": ".run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
