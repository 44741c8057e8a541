"""Models in 4 and 8 bits, packed once a node and kept: edges there map one file, and on the CPU share its pages.

On a GPU a kept model saves packing it again and reading it in 16 bits; each process has its copy.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .data.docstrings import cache_folder
from .errors import UserError

log = logging.getLogger("fedpipe")

NOTE = "packed.json"  # written last: a folder that has it is whole
READ_BY = ("bitsandbytes", "torch", "transformers")  # a kept model is not trusted to their next versions


def packed(about: Mapping[str, Any], pack: Callable[[], tuple[Any, list[str]]], load: Callable[[Path], Any]) -> Any:
    """(the model that `about` describes to the last bit, weights its checkpoint lacks), packed now or before.

    pack: makes it; load: reads it from a folder. Where nothing can be written it is packed for this process alone.
    """
    text = json.dumps([*sorted(about.items()), *map(version, READ_BY)], default=str)
    folder = cache_folder() / "packed" / hashlib.sha256(text.encode()).hexdigest()[:24]
    if not (folder / NOTE).is_file():
        model, lacking = pack()
        try:
            _keep(model, {"lacking": lacking, "about": text}, folder)
        except (OSError, RuntimeError, ValueError) as error:  # no room, or a kind of model that cannot be saved packed
            log.info("%s: packed for this process alone (%s)", folder.parent, error)
            gc.collect()
            return model, lacking
        del model
        gc.collect()  # what packing left in cycles holds the checkpoint's pages, all of its 16 or 32 bits
    try:
        return load(folder), json.loads((folder / NOTE).read_text())["lacking"]
    except (UserError, OSError, ValueError) as error:
        log.warning("%s is damaged (%s): packed anew", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return pack()


def source_of(place: str, commit: str | None) -> list[Any] | None:
    """What identifies the weights at `place`: a folder's files, a hub's commit; None if nothing does."""
    folder = Path(place)
    if folder.is_dir():
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        return [str(folder.resolve()), *[(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]]
    return [place, commit] if commit else None


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of tensors on the CPU, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _keep(model: Any, note: Mapping[str, Any], folder: Path) -> None:
    """Written aside and renamed: of processes that race, one's folder stands."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(aside)
        (aside / NOTE).write_text(json.dumps(note) + "\n")
        aside.chmod(0o755)  # mkdtemp gives 0o700
        if folder.is_dir() and not (folder / NOTE).is_file():  # files were deleted by hand
            shutil.rmtree(folder)
        if not folder.is_dir():
            os.rename(aside, folder)
    except OSError:
        if not (folder / NOTE).is_file():  # else another process was first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
