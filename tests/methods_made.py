"""What a tiny run of each method needs beside its name."""

from __future__ import annotations

from pathlib import Path

from runs import emulated, labelled
from test_export import model_folder


def needs_of(name: str, folder: Path, model_dir: Path, data_dir: Path, deep_dir: Path, public_file: Path) -> list[str]:
    """What a run of the method in tiny.yaml needs, its name among it; folder: where a model of its own may go."""
    needs = {
        "bitfit": ["method={name: bitfit}", f"model.name={model_folder('gpt2', folder, model_dir)}"],
        "fedbiot": emulated(deep_dir, public_file),
        "head": ["method={name: head}", labelled(data_dir)],
    }
    return needs.get(name, [f"method={{name: {name}}}"])
