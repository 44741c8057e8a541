"""The built-in models, made on this machine: a first run downloads nothing.

`builtin:tiny-llama` has 3 layers and 1.6M parameters, `builtin:deep-llama` 8 layers and 1.3M. Small Llamas, pretrained
on the public corpus of data.docstrings: whole docstrings and pairs, shuffled and packed.
Matrices train with Muon, embeddings and norms with AdamW, which beat AdamW alone at equal time. The number of steps is
fixed, never the time: results must repeat. Recipe: ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from fedpipe_ray.data.docstrings import PROMPT, RESPONSE, cache_folder, pairs_hash, public_docstrings, read_pairs
from fedpipe_ray.errors import UserError

RECIPE_VERSION = 1  # raise it when the code below changes what it makes of a recipe
EOS, PAD = "<eos>", "<pad>"  # tokens 0 and 1
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Progress = Callable[[int, int, float], None]  # steps done, steps in all, training loss


@dataclass(frozen=True)
class Recipe:
    """All that the model's weights depend on, besides the corpus text and the machine's arithmetic."""

    corpus: str = "stdlib"
    pair_copies: int = 1  # 3 repeats too much of one corpus: perplexity on five other packages 191 instead of 171
    vocabulary: int = 4096
    hidden: int = 160
    layers: int = 3
    heads: int = 4
    intermediate: int = 432
    positions: int = 512
    batch: int = 8
    tokens: int = 128
    steps: int = 600
    warmup_steps: int = 30
    matrix_rate: float = 1e-2
    matrix_momentum: float = 0.95
    matrix_decay: float = 0.01
    newton_schulz_steps: int = 4
    vector_rate: float = 4e-3
    vector_betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    seed: int = 0


RECIPES = {
    "tiny-llama": Recipe(),
    "deep-llama": Recipe(hidden=96, layers=8, intermediate=256),  # for methods that cut a model by its layers
}


def builtin_model(
    name: str = "tiny-llama", progress: Progress | None = None, steps: int = 600, threads: int | None = None
) -> Path:
    """The folder of a built-in model in Hugging Face layout, pretrained on first use and then cached.

    That takes a minute or two on two free cores. `threads` defaults to torch's setting; weights repeat bitwise for one
    machine and thread count. Raises UserError, a ValueError, for another name. Recipe: ours.
    """
    return pretrained(replace(_recipe(name), steps=steps), progress, threads)


def builtin_tokenizer(name: str) -> Any:
    """The tokenizer of a built-in model: seconds where the model is not cached. Raises UserError for another name."""
    recipe = _recipe(name)
    folder = folder_of(recipe)
    if _is_whole(folder):
        return AutoTokenizer.from_pretrained(folder)
    return train_tokenizer(corpus_texts(recipe), recipe.vocabulary)


def builtin_config(name: str, **changes: Any) -> LlamaConfig:
    """The architecture of a built-in model, known without training it. Raises UserError for another name."""
    return architecture(_recipe(name), _recipe(name).vocabulary, **changes)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"no built-in model {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_hash(recipe: Recipe = RECIPES["tiny-llama"]) -> str:
    """12 hex digits of the recipe, the code's version and the corpus: the key of the cached folder."""
    parts = (RECIPE_VERSION, pairs_hash(read_pairs(recipe.corpus)), PROMPT, RESPONSE, asdict(recipe))
    return blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()


def folder_of(recipe: Recipe) -> Path:
    """Where the model of a recipe is cached, or would be."""
    return cache_folder() / "models" / f"llama-{recipe_hash(recipe)}"


def pretrained(recipe: Recipe, progress: Progress | None = None, threads: int | None = None) -> Path:
    """The cached folder of a recipe, made if missing; a process that is interrupted or late leaves nothing behind."""
    folder = folder_of(recipe)
    if _is_whole(folder):
        return folder
    parent = _writable(folder.parent)
    aside = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}-"))
    try:
        _make(recipe, aside, progress, threads or torch.get_num_threads())
        return _publish(aside, parent / folder.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(recipe: Recipe, folder: Path, progress: Progress | None, threads: int) -> None:
    texts = corpus_texts(recipe)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    tokenizer.save_pretrained(folder)
    with _threads(threads):
        model, loss = pretrain(recipe, texts, tokenizer, progress)
    with _no_bars():
        model.save_pretrained(folder)
    made = {"recipe": asdict(recipe), "threads": threads, "bf16": has_bf16(), "torch": torch.__version__, "loss": loss}
    (folder / "pretrain.json").write_text(json.dumps(made, indent=2) + "\n")


def corpus_texts(recipe: Recipe) -> list[str]:
    """The train part of the public corpus: whole docstrings, then the pairs as many times as the recipe says."""
    rows = read_pairs(recipe.corpus).to_pylist()
    pairs = [(PROMPT + RESPONSE).format(**row) for row in rows if row["split"] == "train"]
    return public_docstrings(recipe.corpus) + pairs * recipe.pair_copies


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: eos is 0, pad is 1, no bos; any text comes back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def architecture(recipe: Recipe, vocabulary: int, **changes: Any) -> LlamaConfig:
    """A Llama with tied embeddings."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **changes,
    )


def pretrain(
    recipe: Recipe, texts: list[str], tokenizer: PreTrainedTokenizerFast, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its mean loss over the last tenth of the steps, in nats a token."""
    documents = [torch.tensor([*ids, 0]) for ids in tokenizer(texts)["input_ids"]]  # each ends with eos
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed a GPU too
        model = LlamaForCausalLM(architecture(recipe, len(tokenizer)))
        losses = _train(recipe, model, packed(documents, recipe), progress)
    tail = losses[-max(1, recipe.steps // 10) :]
    return model.eval(), sum(tail) / len(tail)


def _train(
    recipe: Recipe, model: LlamaForCausalLM, batches: Iterator[torch.Tensor], progress: Progress | None
) -> list[float]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    taken = {id(p) for p in matrices}
    muon = Muon(matrices, recipe.matrix_momentum, recipe.matrix_decay, recipe.newton_schulz_steps)
    vectors = [p for p in model.parameters() if id(p) not in taken]
    adamw = torch.optim.AdamW(vectors, betas=recipe.vector_betas, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for step in range(recipe.steps):
        batch = next(batches)
        # The flash kernel's bfloat16 backward takes three times as long as plain products, its float32 one 20 ms less.
        kernel = SDPBackend.MATH if has_bf16() else SDPBackend.FLASH_ATTENTION
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()), sdpa_kernel(kernel):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        muon.step(recipe.matrix_rate * _rate(recipe, step))
        adamw.param_groups[0]["lr"] = recipe.vector_rate * _rate(recipe, step)
        adamw.step()
        model.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, recipe.steps, losses[-1])
    return losses


class Muon:
    """Nesterov momentum made orthogonal by Newton-Schulz steps, for matrices inside the layers (Jordan et al. 2024).

    The update of torch.optim.Muon, with matrices of one shape in one product, and in float32 on a CPU without bfloat16:
    emulated, a step of this model's matrices takes 1.3 s on two cores instead of 60 ms.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float, decay: float, newton_schulz_steps: int):
        self.momentum, self.decay, self.newton_schulz_steps = momentum, decay, newton_schulz_steps
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.means = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at this learning rate, scaled by sqrt(rows / columns) for tall matrices."""
        for shape, group in self.groups.items():
            gradients = torch.stack([p.grad for p in group if p.grad is not None])  # [matrices, rows, columns]
            mean = self.means[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonal(gradients.lerp(mean, self.momentum), self.newton_schulz_steps)
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - rate * self.decay).sub_(update, alpha=scale)


def orthogonal(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Each matrix of x [n, rows, columns] with its singular values moved towards 1 by quintic Newton-Schulz steps."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = (y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(torch.bfloat16 if has_bf16() else torch.float32)
    for _ in range(steps):
        gram = y @ y.mT  # [n, min(rows, columns), min(rows, columns)]
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)


def packed(documents: list[torch.Tensor], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless batches [batch, tokens] int64: documents in random order, joined and cut; attention crosses borders."""
    need = recipe.batch * recipe.tokens
    stream = torch.empty(0, dtype=torch.int64)
    while True:
        order = torch.randperm(len(documents)).tolist()
        stream = torch.cat([stream, *(documents[i] for i in order)])
        while len(stream) >= need:
            yield stream[:need].view(recipe.batch, recipe.tokens)
            stream = stream[need:]


def _rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up to 1, then linear to 0 after the last step."""
    return min((step + 1) / recipe.warmup_steps, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup_steps))


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; emulation is slower than float32."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Saving one file draws a progress bar across the caller's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# -- the cached folder


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _writable(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            return parent
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="fedpipe-ray-"))
        remedy = "it is made again next time; set XDG_CACHE_HOME to a folder you can write"
        warnings.warn(f"cannot write {parent} ({error}): the model goes to {elsewhere}; {remedy}", stacklevel=4)
        return elsewhere


def _publish(aside: Path, folder: Path) -> Path:
    """Renames the finished folder into place; where another process was first, its folder stands."""
    aside.chmod(0o755)  # mkdtemp gives 0o700
    try:
        os.rename(aside, folder)
    except OSError:
        if not _is_whole(folder):  # files were deleted by hand
            shutil.rmtree(folder)
            os.rename(aside, folder)
    return folder
