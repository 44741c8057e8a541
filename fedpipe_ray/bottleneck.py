"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751) in and out of a model; growing them.

    h + W_up f(W_down h + b_down) + b_up,    W_down [width, d], W_up [d, width]

stands on the output projections h of attention and of the MLP, before each is added to the residual, in the top `depth`
layers; W_up and b_up start at zero, so that a fresh adapter changes nothing. f is SiLU, as in AdapterHub's Houlsby
configuration. Ours, for PEFT has no such adapter (its AdaptionPrompt prepends prompts, the others change weights), and
the library that has them, `adapters` 1.3, needs transformers 4.57. A tensor's name is that of the model's parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import nn

from . import lora
from .errors import UserError
from .files import write_atomically
from .model import Base, head_names

if TYPE_CHECKING:
    from .site import Site

PART = ".bottleneck."
PLACES = (  # what ends attention and the MLP of a layer, by family
    ("self_attn.o_proj", "mlp.down_proj"),  # Llama, Mistral, Qwen, Gemma, Phi-3
    ("attn.c_proj", "mlp.c_proj"),  # GPT-2
    ("attention.output.dense", "output.dense"),  # BERT, MiniLM, RoBERTa
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("self_attn.out_proj", "fc2"),  # OPT
    ("attention.dense", "mlp.dense_4h_to_h"),  # GPT-NeoX
)


@dataclass(frozen=True)
class BottleneckSpec:
    """Adapters of `width` in the top `depth` layers; a classifier's head is trained with them."""

    depth: int
    width: int
    task: str = "causal"


def layers(model: Any) -> list[tuple[str, str]]:
    """(attention's, MLP's) output projection of every layer by name, bottom to top. Raises UserError if unknown."""
    names = {name for name, _ in model.named_modules()}
    for attention, mlp in PLACES:
        ends = {name.removesuffix(attention) for name in names if name.endswith(f".{attention}")}
        stems = [stem for stem in ends if stem + mlp in names and stem.split(".")[-2].isdigit()]
        if stems:
            stems.sort(key=lambda stem: int(stem.split(".")[-2]))
            return [(stem + attention, stem + mlp) for stem in stems]
    known = "; ".join(" and ".join(pair) for pair in PLACES)
    raise UserError(f"method.name: no place for bottlenecks in {type(model).__name__}; its layers must end in {known}")


def places(model: Any, depth: int) -> list[str]:
    """The projections of the top `depth` layers, bottom to top. Raises UserError if there are fewer layers."""
    found = layers(model)
    if depth > len(found):
        raise UserError(f"method.depth: {depth} is more than the model's {len(found)} layers; lower it")
    return [name for pair in found[len(found) - depth :] for name in pair]


def spec_of(tensors: Mapping[str, torch.Tensor], task: str) -> BottleneckSpec:
    """Depth and width as the tensors have them."""
    downs = [tensor for name, tensor in tensors.items() if name.endswith(f"{PART}down.weight")]  # [width, d]
    return BottleneckSpec(len(downs) // 2, len(downs[0]), task)


# -- tensors: fresh, deeper, wider


def fresh(model: Any, names: list[str], width: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """New adapters on these projections of `model` (also on the meta device): W_down Kaiming-uniform, the rest 0."""
    tensors = {}
    for name in names:
        size = width_of(model.get_submodule(name))
        tensors[f"{name}{PART}down.weight"] = _rows(width, size, rng)
        tensors[f"{name}{PART}down.bias"] = torch.zeros(width)
        tensors[f"{name}{PART}up.weight"] = torch.zeros(size, width)
        tensors[f"{name}{PART}up.bias"] = torch.zeros(size)
    return tensors


def deepened(
    tensors: Mapping[str, torch.Tensor], model: Any, depth: int, rng: torch.Generator
) -> dict[str, torch.Tensor]:
    """`tensors` with fresh adapters in the layers down to `depth`: the same function."""
    spec = spec_of(tensors, "")
    new = [name for name in places(model, depth) if f"{name}{PART}down.weight" not in tensors]
    return {**fresh(model, new, spec.width, rng), **tensors}


def widened(tensors: Mapping[str, torch.Tensor], width: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """`tensors` with more hidden units, whose columns in W_up are zero: the same function."""
    more = width - spec_of(tensors, "").width
    wide = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(f"{PART}down.weight"):
            wide[name] = torch.cat([tensor, _rows(more, tensor.shape[1], rng)])
        elif name.endswith(f"{PART}down.bias"):
            wide[name] = torch.cat([tensor, torch.zeros(more)])
        elif name.endswith(f"{PART}up.weight"):
            wide[name] = torch.cat([tensor, torch.zeros(len(tensor), more)], dim=1)
    return wide


def _rows(count: int, size: int, rng: torch.Generator) -> torch.Tensor:
    return torch.empty(count, size).uniform_(-(size**-0.5), size**-0.5, generator=rng)


def width_of(linear: Any) -> int:
    """Size of a projection's output; GPT-2's Conv1D calls it nf."""
    return int(getattr(linear, "out_features", None) or linear.nf)


# -- in a model


class Bottleneck(nn.Module):
    """One adapter; computes in its own dtype, or in autocast's, and answers in that of its input."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., size]."""
        change: torch.Tensor = self.up(nn.functional.silu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


class Bottlenecks:
    """`model` with adapters hooked into it, and otherwise itself: what is not here is asked of the model.

    A classifier's own layers are replaced by copies, which are trained; `unload` puts back what was there.
    """

    def __init__(self, model: Any, spec: BottleneckSpec) -> None:
        self.model, self.spec, self.active = model, spec, True
        device = next(model.parameters()).device
        self.carriers = [model.get_submodule(name) for name in places(model, spec.depth)]
        self.hooks = []
        for linear in self.carriers:
            linear.bottleneck = Bottleneck(width_of(linear), spec.width).to(device)
            self.hooks.append(linear.register_forward_hook(self._after))
        names = head_names(model) if spec.task == "classification" else []
        self.own = {name: model.get_submodule(name) for name in names}
        self.trained = {name: copy.deepcopy(head).requires_grad_(True) for name, head in self.own.items()}
        self._put(self.trained)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)

    def _after(self, linear: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = linear.bottleneck(output) if self.active else output
        return changed

    def _put(self, heads: Mapping[str, Any]) -> None:
        for name, head in heads.items():
            self.model.set_submodule(name, head)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, inside a `with` block."""
        self.active = False
        self._put(self.own)
        try:
            yield
        finally:
            self.active = True
            self._put(self.trained)

    def unload(self) -> Any:
        """Takes the adapters off; returns the model."""
        for hook in self.hooks:
            hook.remove()
        for linear in self.carriers:
            del linear.bottleneck
        self._put(self.own)
        return self.model


def attach(base: Base, spec: BottleneckSpec) -> Any:
    """The adapters of `spec` on `base`, made once and kept; one at a time is attached. `lora.load` and `read` fit."""
    if spec not in base.attached:
        lora.detach(base)
        base.attached[spec] = Bottlenecks(base.model, spec)
    return base.attached[spec]


# -- as a file


@dataclass(frozen=True)
class BottleneckWeights:
    """A view for evaluation and export: bottleneck adapters, and a classifier's head."""

    spec: BottleneckSpec
    tensors: Mapping[str, torch.Tensor]

    folder: ClassVar[str] = "adapter"

    @property
    def hint(self) -> str:
        """A function of this program loads it."""
        return 'adapter:  {out}/adapter   (fedpipe_ray.bottleneck.load_adapter(base, "{out}/adapter"), not PEFT)'

    def on(self, base: Base) -> Any:
        """The base with the adapters hooked in."""
        model = attach(base, self.spec)
        lora.load(model, self.tensors)
        return model

    def save(self, folder: Path, server: Site) -> None:
        """Writes `bottlenecks.safetensors` and `bottlenecks.json`, which `load_adapter` reads."""
        about = {**dataclasses.asdict(self.spec), "base_model_name_or_path": server.run.model.name}
        kept = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in self.tensors.items()}
        write_atomically(folder / "bottlenecks.safetensors", save(kept, metadata={"format": "pt"}))
        write_atomically(folder / "bottlenecks.json", json.dumps(about, indent=2, sort_keys=True) + "\n")

    def merged(self, base: Base) -> Any:
        """Raises UserError: between W_down and W_up stands a nonlinearity."""
        raise UserError("bottleneck adapters cannot be merged into the weights; export without --merge")


def load_adapter(model: Any, folder: str | Path) -> Bottlenecks:
    """A plain transformers `model` with the adapters that a run exported to `folder`, ready to compute; it is changed.

    Raises OSError if the files are not there, ValueError if they do not fit.
    """
    about = json.loads(Path(folder, "bottlenecks.json").read_text())
    spec = BottleneckSpec(about["depth"], about["width"], about["task"])
    found = Bottlenecks(model.requires_grad_(False), spec)
    lora.load(found, load_file(Path(folder, "bottlenecks.safetensors")))
    model.eval()
    return found
