"""Virtual tokens before the rows of a frozen causal model, through PEFT: embeddings, or keys and values of all layers.

The state is one tensor, `prompt_embeddings`, as PEFT's own file has it: [count, d] of a prompt; of a prefix [count,
2 layers x key-value heads x head size], the key and the value of each layer in turn.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import peft
import torch
from safetensors.torch import save

from . import lora
from .costs import matmul_parameters
from .errors import UserError
from .files import write_atomically
from .model import Base, load_config

if TYPE_CHECKING:
    from .site import Site

KEY = "prompt_embeddings"


@dataclass(frozen=True)
class VirtualSpec:
    """`count` virtual tokens: embeddings before the first layer (prompt), or keys and values in each layer (prefix)."""

    kind: Literal["prompt", "prefix"]
    count: int

    def peft_config(self) -> Any:
        """The equal configuration of PEFT."""
        kind = peft.PromptTuningConfig if self.kind == "prompt" else peft.PrefixTuningConfig
        return kind(task_type="CAUSAL_LM", num_virtual_tokens=self.count)


def wrapped(model: Any, spec: VirtualSpec) -> Any:
    """A PeftModel around `model` (also on the meta device), which is not changed. Raises UserError if PEFT cannot."""
    try:
        return peft.get_peft_model(model, spec.peft_config())
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"method.name: {spec.kind}: PEFT cannot put virtual tokens before {type(model).__name__}: {error}; "
            "use method.name: lora"
        ) from None


def embeddings(model: Any) -> torch.nn.Parameter:
    """What is trained of a PeftModel of `wrapped`."""
    found: torch.nn.Parameter = model.prompt_encoder["default"].embedding.weight
    return found


def read(model: Any) -> dict[str, torch.Tensor]:
    """A copy of it on the CPU in float32."""
    return {KEY: embeddings(model).detach().to("cpu", torch.float32, copy=True)}


def check(site: Site, spec: VirtualSpec) -> None:
    """Raises UserError for a classifier, for a model without such a place, and for one with too few positions."""
    if site.task != "causal":
        raise UserError(
            f"method.name: {spec.kind} is for data.task: causal; a classifier would read its class at a virtual token "
            "or at padding; use method.name: head, bitfit or lora"
        )
    if spec.kind == "prefix" and site.run.local.checkpointing:
        raise UserError(
            "local.checkpointing: true: a prefix is a cache of keys and values, which checkpointed layers do not read; "
            "set it to false, or use method.name: prompt"
        )
    limit = getattr(load_config(site.run.model, site.task, site.classes), "max_position_embeddings", None)
    wanted = spec.count + site.run.data.max_length
    if limit and wanted > limit:
        raise UserError(
            f"method.tokens: {spec.count} and data.max_length: {site.run.data.max_length} need {wanted} positions "
            f"of the model's {limit}; lower one"
        )
    wrapped(site.bare(), spec)


def words(base: Base, count: int, rng: np.random.Generator) -> torch.Tensor:
    """[1, count] tokens drawn uniformly from the tokenizer's vocabulary."""
    size = min(len(base.tokenizer), base.model.get_input_embeddings().weight.shape[0])
    return torch.from_numpy(rng.integers(size, size=(1, count))).to(base.device)


@torch.no_grad()
def embedded(base: Base, tokens: torch.Tensor) -> torch.Tensor:
    """[count, d] the model's embeddings of `tokens`."""
    lora.detach(base)
    found: torch.Tensor = base.model.get_input_embeddings()(tokens)[0]
    return found.to("cpu", torch.float32, copy=True)


@torch.no_grad()
def activations(base: Base, tokens: torch.Tensor) -> torch.Tensor:
    """[count, 2 layers x heads x size] the keys and values of `tokens`, as PEFT lays a prefix out."""
    lora.detach(base)
    layers = base.model(input_ids=tokens, use_cache=True).past_key_values.layers
    pairs = torch.stack([part[0] for layer in layers for part in (layer.keys, layer.values)])  # [2 l, heads, n, size]
    return pairs.permute(2, 0, 1, 3).reshape(tokens.shape[1], -1).to("cpu", torch.float32, copy=True)


def train(site: Site, order: Mapping[str, torch.Tensor], spec: VirtualSpec, rng: np.random.Generator) -> Any:
    """The PeftModel after this round's local steps from an order's tensors; the site's cost counts the virtual tokens.

    A prompt's tokens pass the model beside those of their row, 4 FLOPs a frozen weight as all others: a gradient goes
    back to the first layer. A prefix lengthens no row; its keys and values cost a token and layer 12 count x width
    more, 4 in the forward pass and 8 in the backward one (width: attention heads x head size). Attention among tokens
    is left out, as everywhere; of the first layer, what no gradient needs is counted all the same.
    """
    model = VirtualWeights(spec, order).on(site.base)
    site.train(model, rng)
    weights = sum(matmul_parameters(site.base.model))
    tokens, extra = site.cost.tokens, 0.0
    if spec.kind == "prompt":
        tokens += spec.count * site.cost.samples
    else:
        config = site.base.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        extra = 12.0 * spec.count * config.num_attention_heads * size * config.num_hidden_layers
    site.cost = dataclasses.replace(site.cost, tokens=tokens, flops=tokens * (4.0 * weights + extra))
    return model


@dataclass(frozen=True)
class VirtualWeights:
    """A view for evaluation and export: virtual tokens as a PEFT adapter."""

    spec: VirtualSpec
    tensors: Mapping[str, torch.Tensor]

    folder: ClassVar[str] = "adapter"

    @property
    def hint(self) -> str:
        """PEFT loads it."""
        return 'adapter:  {out}/adapter   (peft.PeftModel.from_pretrained(base, "{out}/adapter"))'

    def on(self, base: Base) -> Any:
        """A PeftModel around the base's model, which stays as it is. Raises ValueError for tensors of another shape."""
        lora.detach(base)
        model = wrapped(base.model, self.spec)
        own, found = embeddings(model), self.tensors.get(KEY, torch.zeros(0))
        if own.shape != found.shape:
            raise ValueError(f"{KEY}: shape {list(found.shape)}, the model has {list(own.shape)}")
        with torch.no_grad():
            own.copy_(found)
        return model

    def save(self, folder: Path, server: Site) -> None:
        """`adapter_config.json` and `adapter_model.safetensors`, which `PeftModel.from_pretrained` loads."""
        shaped = wrapped(server.bare(), self.spec).peft_config["default"]
        config = dataclasses.replace(shaped, base_model_name_or_path=server.run.model.name, inference_mode=True)
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            tree = json.loads(Path(scratch, "adapter_config.json").read_text())
        kept = {KEY: self.tensors[KEY].detach().to("cpu").contiguous().clone()}
        write_atomically(folder / "adapter_model.safetensors", save(kept, metadata={"format": "pt"}))
        write_atomically(folder / "adapter_config.json", json.dumps(tree, indent=2, sort_keys=True) + "\n")

    def merged(self, base: Base) -> Any:
        """Raises UserError: virtual tokens are an input, no weights."""
        raise UserError(
            f"a {self.spec.kind} is an input of the model and cannot be merged into its weights; export without "
            "--merge and load it with PEFT"
        )
