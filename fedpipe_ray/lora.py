"""LoRA adapters in and out of a model by name, in PEFT's own format.

A tensor's name is its key in PEFT's `adapter_model.safetensors`, so a state is an adapter and the other way round.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from .errors import UserError
from .files import write_atomically
from .model import Base, head_names

TASKS = {"causal": "CAUSAL_LM", "classification": "SEQ_CLS"}
LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
FROZEN = "frozen"  # PEFT's name of the adapter that acts and is not trained
Variant = Literal["plain", "rslora", "dora"]


@dataclass(frozen=True)
class LoraSpec:
    """Which adapter: rank and alpha (scale alpha / rank) of every target; targets: module names or `all-linear`.

    ranks: (whole module name, rank) of each target where they differ; the scale stays alpha / rank for all. variant:
    `rslora` has the scale alpha / sqrt(rank) (arXiv 2312.03732); `dora` has it act on the direction of each row of the
    weight, whose magnitude is trained beside it (arXiv 2402.09353).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    task: str = "causal"
    ranks: tuple[tuple[str, int], ...] = ()
    variant: Variant = "plain"

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    def alpha_of(self, rank: int) -> float:
        """The alpha that gives another rank this scale."""
        return self.scale * (math.sqrt(rank) if self.variant == "rslora" else rank)

    def at(self, rank: int) -> LoraSpec:
        """The same with `rank` of its rows and columns, at the same scale; itself if that is its rank."""
        return self if rank == self.rank else dataclasses.replace(self, rank=rank, alpha=self.alpha_of(rank))

    @classmethod
    def uneven(cls, like: LoraSpec, ranks: Mapping[str, int]) -> LoraSpec:
        """`like`, with these modules as targets and these ranks, at the same scale."""
        return dataclasses.replace(like, targets=tuple(ranks), ranks=tuple(ranks.items()))

    def peft_config(self, heads: Sequence[str] = ()) -> Any:
        """The equal `peft.LoraConfig`; `heads` are modules that are trained whole, without adapter."""
        targets: Any = "all-linear" if self.targets == ("all-linear",) else list(self.targets)
        whole: dict[str, Any] = {"modules_to_save": list(heads)} if heads else {}
        if heads and targets == "all-linear":
            whole["exclude_modules"] = rf"({'|'.join(map(re.escape, heads))})(\..+)?"
        alpha: Any = self.alpha  # PEFT says int and takes a float
        patterns: dict[str, Any] = {}
        if self.ranks:
            names = [(rf"^{re.escape(name)}$", rank) for name, rank in self.ranks]
            patterns = {"rank_pattern": dict(names), "alpha_pattern": {n: self.alpha_of(rank) for n, rank in names}}
        return peft.LoraConfig(
            r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=targets,
            task_type=TASKS[self.task], use_rslora=self.variant == "rslora", use_dora=self.variant == "dora",
            **patterns, **whole,
        )  # fmt: skip


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of the model's linear modules, sorted: what `targets` may hold."""
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ in LINEAR}
    )


def linear_targets(model: Any, spec: LoraSpec) -> tuple[str, ...]:
    """The linear layers of `all-linear` by name where PEFT adapts others with them: routers, experts as one tensor."""
    if all(parameter.ndim < 3 for parameter in model.parameters()):
        return ("all-linear",)
    return tuple(n for n, part in layers(inject(model, spec)) if type(part.get_base_layer()).__name__ in LINEAR)


def inject(model: Any, spec: LoraSpec) -> Any:
    """A PeftModel around `model` (also on the meta device). Raises UserError for a target that is not there."""
    names = [name for name, _ in model.named_modules()]
    missing = [t for t in spec.targets if t != "all-linear" and not any(n == t or n.endswith("." + t) for n in names)]
    if missing:
        raise UserError(f"method.targets: no module {', '.join(missing)}; there are {', '.join(linear_names(model))}")
    meta = next(model.parameters()).is_meta
    heads = head_names(model) if spec.task == "classification" else []
    try:
        return peft.get_peft_model(model, spec.peft_config(heads), low_cpu_mem_usage=meta)
    except ValueError as error:
        raise UserError(f"method.targets: {error}") from None


def attach(base: Base, spec: LoraSpec, frozen: LoraSpec | None = None) -> Any:
    """The PeftModel of `spec` on `base`, made once and kept; one at a time is attached.

    frozen: a second adapter that acts beside the first and is not trained; `load` fills it.
    """
    if (spec, frozen) not in base.attached:
        detach(base)
        model = inject(base.model, spec)
        if frozen is not None:
            peft.PeftModel.add_adapter(model, FROZEN, frozen.peft_config())  # a classifier's own adds another head
            model.base_model.set_adapter(["default", FROZEN])
            for parameter in _of(model, FROZEN).values():
                parameter.requires_grad_(False)
        base.attached[spec, frozen] = model
    return base.attached[spec, frozen]


def attach_changed(base: Base, spec: LoraSpec, kind: str, change: Callable[[str, Any], None]) -> Any:
    """As `attach`, with PEFT's layers as `change(module name, layer)` leaves them; kept under `kind`."""
    if (spec, kind) not in base.attached:
        detach(base)
        model = inject(base.model, spec)
        for name, layer in layers(model):
            change(name, layer)
        base.attached[spec, kind] = model
    return base.attached[spec, kind]


def layers(model: Any) -> list[tuple[str, Any]]:
    """(name in the base model, PEFT's layer) of every adapted module."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
    return [(name.removeprefix("base_model.model."), part) for name, part in found]


def detach(base: Base) -> None:
    """Takes off what is attached; a module that was trained whole is the base's own again."""
    for attached in base.attached.values():
        parts = base.model.named_modules()
        own = {name: part.original_module for name, part in parts if isinstance(part, ModulesToSaveWrapper)}
        attached.unload()
        for name, part in own.items():
            base.model.set_submodule(name, part)  # PEFT leaves its trained copy there
    base.attached.clear()


def parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by their PEFT key."""
    return {key_of(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def key_of(name: str) -> str:
    """The PEFT key of a parameter of the trained adapter."""
    key = name.replace(".modules_to_save.default", "").replace(".default", "")
    return key.removesuffix(".weight") if ".lora_magnitude_vector." in key else key  # as PEFT's files have it


def _of(model: Any, adapter: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of another adapter than the trained one, by their PEFT key."""
    part = f".{adapter}."
    return {name.replace(part, "."): p for name, p in model.named_parameters() if part in name}


def module_of(key: str) -> str:
    """The module that a PEFT key such as `base_model.model.X.lora_A.weight` belongs to: X."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


def load(model: Any, tensors: Mapping[str, torch.Tensor], frozen: bool = False) -> None:
    """Copies `tensors` into the adapter, or into the frozen one. Raises ValueError unless names and shapes match."""
    own = _of(model, FROZEN) if frozen else parameters(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"adapter and model differ in {len(odd)} tensors, the first {odd[0]}")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{name}: shape {list(tensors[name].shape)}, the model has {list(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def read(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the adapter's tensors on the CPU, float32, by PEFT key."""
    return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in parameters(model).items()}


def initial(shapes: Mapping[str, Sequence[int]], rng: torch.Generator) -> dict[str, torch.Tensor]:
    """A fresh adapter, as LoRA starts: A Kaiming-uniform [rank, d_in], B zero [d_out, rank] (Hu et al. 2021, PEFT)."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.zeros(tuple(shape))
        if ".lora_A." in name:
            bound = tensor[0].numel() ** -0.5
            tensor.uniform_(-bound, bound, generator=rng)
        elif ".lora_embedding_B" in name:
            tensor.normal_(generator=rng)
        tensors[name] = tensor
    return tensors


def save_adapter(
    folder: Path, spec: LoraSpec, shapes_of: Any, tensors: Mapping[str, torch.Tensor], base_name: str
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads.

    shapes_of: the PeftModel (meta or real) whose resolved targets and saved modules go into the configuration.
    """
    from safetensors.torch import save

    kept = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(folder / "adapter_model.safetensors", save(kept, metadata={"format": "pt"}))
    save_config(folder, shapes_of, base_name)


def save_config(folder: Path, shapes_of: Any, base_name: str) -> None:
    """Writes `adapter_config.json` alone."""
    resolved = shapes_of.peft_config["default"]
    config = dataclasses.replace(resolved, base_model_name_or_path=base_name, inference_mode=True)
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        tree = json.loads(Path(scratch, "adapter_config.json").read_text())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(tree.get(key), list):
            tree[key] = sorted(tree[key])
    write_atomically(folder / "adapter_config.json", json.dumps(tree, indent=2, sort_keys=True) + "\n")
