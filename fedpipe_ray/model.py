"""Pretrained models: loading by id, path or from the driver's parcel; the frozen base that adapters sit on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from .costs import place
from .device import pick_device, pick_dtype
from .errors import UnsupportedBits, UserError
from .message import Message
from .packed import digest, packed, source_of
from .settings import Model

log = logging.getLogger("fedpipe")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft calls it

KINDS: Mapping[str, Any] = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Parcel:
    """A model on its way from the driver to an edge: configuration and tokenizer files, and the weights.

    files: name -> bytes; weights: a Message, which every edge on a node maps read-only from one shared copy.
    """

    files: Mapping[str, bytes]
    weights: Message


class Base:
    """A frozen pretrained model with its tokenizer on one device.

    `model` is never written to; methods attach adapters through lora.attach, which remembers them in `attached`.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, bits: int = 16) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.bits = bits
        self.pad_id = set_pad_token(model, tokenizer)
        empty = next(model.parameters()).is_meta  # see frame.py
        self.model = (model if empty or bits != 16 else model.to(device)).eval().requires_grad_(False)
        self.attached: dict[Any, Any] = {}
        if device.type == "cpu":
            for tensor in self.model.state_dict().values():  # mapped from a file: in memory now, not in the first step
                tensor.view(-1)[:: max(1, 4096 // tensor.element_size())].sum()

    @classmethod
    def load(
        cls, settings: Model, task: str, classes: Sequence[str], seed: int, parcel: Parcel | None = None,
        bits: int = 16, identity: str | None = None,
    ) -> Base:  # fmt: skip
        """The model that `settings` names, or the one in `parcel`; its linear weights in `bits` (16: as model.dtype).

        identity: of the weights, where their place does not tell. Raises UserError if it cannot be had.
        """
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device)
        if parcel is not None:
            with tempfile.TemporaryDirectory(prefix="fedpipe-model-") as folder:
                for name, content in parcel.files.items():
                    Path(folder, name).write_bytes(content)
                if bits != 16:
                    save_file(dict(parcel.weights.tensors), Path(folder, "model.safetensors"), {"format": "pt"})
                    one = dataclasses.replace(settings, name=folder, trust_remote_code=False)
                    return cls.load(one, task, classes, seed, None, bits, digest(parcel.weights.tensors))
                tokenizer = load_tokenizer(Model(name=folder))
                model = empty_model(Model(name=folder), task, classes, buffers=True)
            model.load_state_dict(dict(parcel.weights.tensors), strict=False, assign=True)
            model.tie_weights()
            stranded = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            if stranded:
                raise UserError(f"model.load: driver left {', '.join(stranded[:3])} empty; use model.load: node")
            return cls(model.to(dtype) if dtype is not None else model, tokenizer, device)
        if bits == 16:
            model, lacking = _weights(settings, task, classes, seed, 16, device, dtype)
        else:
            model, lacking = _packed(settings, task, classes, seed, bits, device, dtype, identity)
        if lacking:
            _warn_of_random_weights(settings.name, ", ".join(lacking[:4]))
        for part in model.modules():
            # Else the first evaluation on such a CPU repacks 4-bit weights: other constants, and not for every shape.
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = False
        return cls(model, load_tokenizer(settings), device, bits)

    def writable(self, dtype: torch.dtype | None = torch.float32) -> Any:
        """A copy of `model` that shares no memory with it, in `dtype` (None: as stored), every parameter to train."""
        assert not self.attached, "an adapter would be copied too"
        return copy.deepcopy(self.model).to(dtype=dtype).requires_grad_(True)

    def parcel(self) -> Parcel:
        """This model as a Parcel; tied weights travel once."""
        with tempfile.TemporaryDirectory(prefix="fedpipe-model-") as folder:
            self.model.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in seen or tensor.numel() == 0:
                tensors[name] = tensor
                seen.add(tensor.data_ptr())
        return Parcel(files, Message(tensors))


def _weights(
    settings: Model, task: str, classes: Sequence[str], seed: int, bits: int, device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[Any, list[str]]:  # fmt: skip
    """(the model, names of weights that its checkpoint lacks); a classifier's own head is no part of it."""
    torch.manual_seed(seed)  # weights the checkpoint lacks (a classifier's head) start equal everywhere
    extra = {} if dtype is None else {"dtype": dtype}
    arguments = {**labels(task, classes), **extra, **quantized(settings, task, classes, bits, device, dtype)}
    arguments["output_loading_info"] = True
    model, found = _loading(settings, lambda: KINDS[task].from_pretrained(**_where(settings), **arguments))
    if bits != 16:
        require_packed(model, bits, settings.name)
    head = "" if task == "causal" else f"{model.base_model_prefix}."
    return model, sorted(name for name in found["missing_keys"] if name.startswith(head))


def _packed(
    settings: Model, task: str, classes: Sequence[str], seed: int, bits: int, device: torch.device,
    dtype: torch.dtype | None, identity: str | None,
) -> tuple[Any, list[str]]:  # fmt: skip
    """As `_weights`, in 4 or 8 bits, from what this node keeps if its source can be told from another."""
    place = str(_where(settings)["pretrained_model_name_or_path"])
    commit = getattr(load_config(settings, task, classes), "_commit_hash", None)
    source = identity or source_of(place, commit)
    if source is None or settings.trust_remote_code:
        return _weights(settings, task, classes, seed, bits, device, dtype)
    about = {"source": source, "task": task, "classes": list(classes), "seed": seed, "bits": bits, "dtype": dtype}
    extra = {} if dtype is None else {"dtype": dtype}
    found: tuple[Any, list[str]] = packed(
        {**about, "device": device.type},
        lambda: _weights(settings, task, classes, seed, bits, device, dtype),
        lambda folder: _loading(
            settings, lambda: KINDS[task].from_pretrained(folder, device_map={"": device}, **extra)
        ),
    )  # fmt: skip
    return found


def quantized(
    settings: Model, task: str, classes: Sequence[str], bits: int, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for 4 bits (NF4, double quantization) or 8 (LLM.int8); none for 16.

    Embeddings, norms and heads stay as they are. Raises UnsupportedBits on a device that bitsandbytes does not have.
    """
    if bits == 16:
        return {}
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedBits(
            f"bits: {bits} need a CPU or CUDA device, this edge computes on {device.type}; give it bits 16"
        )
    heads = {}
    if task == "classification":
        heads = {"llm_int8_skip_modules": head_names(empty_model(settings, task, classes))}
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.bfloat16, **heads,
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def require_packed(model: Any, bits: int, name: str) -> None:
    """Raises UnsupportedBits if none of the model's layers is stored in `bits`."""
    kinds = sorted({type(part).__name__ for part in model.modules() if "weight" in part._parameters})
    if not {"Linear4bit", "Linear8bitLt"} & set(kinds):
        raise UnsupportedBits(
            f"bits: {bits}: bitsandbytes packs none of the layers of {name} ({', '.join(kinds)}); give it bits 16"
        )


def head_names(model: Any) -> list[str]:
    """A classifier's own layers, all beside its encoder: pretrained checkpoints have none of them."""
    return [n for n, part in model.named_children() if n != model.base_model_prefix and list(part.parameters())]


def stored_bytes(model: Any) -> int:
    """Bytes of parameters and buffers as they lie in memory, quantization constants included; shared storage once."""
    sizes: dict[int, int] = {}

    def count(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            sizes[place(tensor)] = tensor.untyped_storage().nbytes()

    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            count(tensor)
            constants = getattr(tensor, "quant_state", None)
            for nested in (constants, getattr(constants, "state2", None)):
                for name in ("absmax", "code", "offset"):
                    count(getattr(nested, name, None))
            count(getattr(tensor, "SCB", None))
        state = getattr(module, "state", None)  # LLM.int8 moves its weight there on first use
        count(getattr(state, "CB", None))
        count(getattr(state, "SCB", None))
    return sum(sizes.values())


@functools.cache  # once a process
def _warn_of_random_weights(name: str, lacking: str) -> None:
    log.warning(
        "model.name: %s has no weights for %s; they are random and stay so, and an adapter does not hold them "
        "(export --merge does); give a checkpoint that has them",
        name, lacking,
    )  # fmt: skip


def empty_model(settings: Model, task: str, classes: Sequence[str], buffers: bool = False) -> Any:
    """The model's architecture on the meta device, from its configuration alone; `buffers` makes those real."""
    config = load_config(settings, task, classes)
    with init_empty_weights(include_buffers=not buffers):
        return KINDS[task].from_config(config, trust_remote_code=settings.trust_remote_code)


def load_config(settings: Model, task: str, classes: Sequence[str]) -> Any:
    """The model's configuration with its classes. Raises UserError."""
    if settings.name.startswith("builtin:"):
        from .pretrain import builtin_config

        return builtin_config(settings.name.removeprefix("builtin:"), **labels(task, classes))
    return _loading(settings, lambda: AutoConfig.from_pretrained(**_where(settings), **labels(task, classes)))


def load_tokenizer(settings: Model) -> Any:
    """The model's tokenizer. Raises UserError."""
    tokenizer = _loading(settings, lambda: _tokenizer(settings))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"
    return tokenizer


def _tokenizer(settings: Model) -> Any:
    if settings.name.startswith("builtin:"):
        from .pretrain import builtin_tokenizer

        return builtin_tokenizer(settings.name.removeprefix("builtin:"))
    return AutoTokenizer.from_pretrained(**_where(settings))


def set_pad_token(model: Any, tokenizer: Any) -> int:
    """Gives model and tokenizer a padding token (the end-of-sequence token where there is none); returns its id."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    model.config.pad_token_id = pad_id
    return int(pad_id)


def labels(task: str, classes: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments that name a classifier's classes."""
    if task != "classification":
        return {}
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {c: i for i, c in enumerate(classes)},
    }


def _where(settings: Model) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that say which model."""
    name = settings.name
    if name.startswith("builtin:"):
        from .pretrain import builtin_model

        name = str(builtin_model(name.removeprefix("builtin:")))
    elif name.startswith("package:"):
        name = str(package_folder(name.removeprefix("package:")))
    return {
        "pretrained_model_name_or_path": name,
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
    }


def package_folder(place: str) -> Path:
    """The folder of `PACKAGE/FOLDER` inside an installed Python package. Raises UserError."""
    package, _, inside = place.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"model.name: package {package} is not installed; pip install it, or name another model")
    folder = Path(found.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise UserError(f"model.name: no folder {inside!r} in package {package} at {folder.parent}")
    return folder


def _loading(settings: Model, load: Any) -> Any:
    """Runs `load`; turns what goes wrong into a message with the remedy."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, ValueError, LookupError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, LookupError | SafetensorError):
            first = f"{type(error).__name__}: {first}"
        raise UserError(f"model.name: cannot load {settings.name!r}: {first} ({_remedy(settings.name)})") from error


def _remedy(name: str) -> str:
    """What to do about a model that does not load."""
    if Path(name).is_dir():
        return "the folder must hold config.json, weights and tokenizer, as save_pretrained writes them"
    if name.startswith(("/", ".", "~")):
        return "there is no such folder"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set: give a local folder"
    return "give a hub id, a local folder, or builtin:tiny-llama"
