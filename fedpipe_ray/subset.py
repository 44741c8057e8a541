"""Some of a model's own parameters, trained in copies; all others stay those of the shared frozen base.

Copies are float32 and keep the model's names. Where the base is stored in 16 bits, its modules see each copy rounded to
that dtype, and the gradient goes to the float32 one: many steps are less than half a unit in the last place of 16 bits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize

from . import lora
from .files import write_atomically
from .model import Base

if TYPE_CHECKING:
    from .site import Site

FILE = "parameters.safetensors"


class Stored(nn.Module):
    """A parameter as the modules of a model in 16 bits see it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """`parameter` in the model's dtype."""
        return parameter.to(self.dtype)


def names_under(model: Any, modules: Iterable[str]) -> list[str]:
    """Names of the parameters in these modules of `model` (also on the meta device), in its order."""
    under = tuple(f"{name}." for name in modules)
    return [name for name, _ in model.named_parameters() if name.startswith(under)]


def pretrained(base: Base, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copies of the base's own tensors of these names, on the CPU in float32."""
    own = dict(base.model.named_parameters())
    return {name: own[name].detach().to("cpu", torch.float32, copy=True) for name in names}


def replaced(base: Base, tensors: Mapping[str, torch.Tensor], make: Callable[[Any, torch.Tensor], Any]) -> Any:
    """The base's model with make(parameter, tensor) for each parameter named in `tensors`, wherever it is tied.

    Everything else is shared with the base, which stays as it is. Raises ValueError unless names and shapes match.
    """
    lora.detach(base)
    own = dict(base.model.named_parameters())
    for name, tensor in tensors.items():
        found = list(own[name].shape) if name in own else None
        if found != list(tensor.shape):
            raise ValueError(f"{name}: shape {list(tensor.shape)}, the model has {found or 'no such parameter'}")
    model = copy.deepcopy(base.model, {id(t): t for t in (*base.model.parameters(), *base.model.buffers())})
    fresh = {id(own[name]): make(own[name], tensor) for name, tensor in tensors.items()}
    for module in list(model.modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in fresh:
                setattr(module, leaf, fresh[id(parameter)])
                if fresh[id(parameter)].dtype != parameter.dtype:
                    parametrize.register_parametrization(module, leaf, Stored(parameter.dtype), unsafe=True)
    return model


def trainable(base: Base, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The base's model with float32 copies of `tensors` as its only parameters to train."""
    return replaced(base, tensors, lambda p, t: nn.Parameter(t.to(p.device, torch.float32, copy=True)))


def read(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what `trainable` made trainable, on the CPU in float32, by the plain model's names."""
    return {plain(name): tensor for name, tensor in lora.read(model).items()}


def plain(name: str) -> str:
    """The name in the plain model of a parameter that may be seen through `Stored`."""
    return name.replace(".parametrizations.", ".").removesuffix(".original") if ".parametrizations." in name else name


@dataclass(frozen=True)
class SubsetWeights:
    """A view for evaluation and export: some parameters of the model by name."""

    tensors: Mapping[str, torch.Tensor]
    task: str = "causal"

    folder: ClassVar[str] = "parameters"

    @property
    def hint(self) -> str:
        """Torch alone loads it into the plain model, and it can be written as a whole one."""
        return (
            f"weights:  {{out}}/{self.folder}   (model.load_state_dict(safetensors.torch.load_file("
            f'"{{out}}/{self.folder}/{FILE}"), strict=False))\n'
            "merge:    fedpipe export {out} --out MODEL --merge"
        )

    def on(self, base: Base) -> Any:
        """The model with these parameters, the others shared with the base; made anew each time."""
        return trainable(base, self.tensors)

    def save(self, folder: Path, server: Site) -> None:
        """One safetensors file; model and classes, in order, are in its metadata."""
        kept = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in self.tensors.items()}
        about = json.dumps({"base_model_name_or_path": server.run.model.name, "classes": server.classes})
        write_atomically(folder / FILE, save(kept, metadata={"fedpipe": about}))

    def merged(self, base: Base) -> Any:
        """A plain model in the base's dtype."""
        return replaced(base, self.tensors, lambda p, t: nn.Parameter(t.to(p.device, p.dtype), requires_grad=False))
