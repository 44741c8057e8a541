"""A step of `fedkseed`: by hand, on many architectures, nothing moved that is only tried, in inference's memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from runs import assert_same
from toys import CPU, Constant, Some, answer

from fedpipe_ray import zeroth_order
from fedpipe_ray.batches import Batch, collate, sums
from fedpipe_ray.costs import PeakMemory
from fedpipe_ray.noise import Flat, Noise
from fedpipe_ray.zeroth_order import Direction, search


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_one_step_by_hand() -> None:
    """Logits are the bias b whatever the tokens: L(b) = log sum exp b - b[2].

    E1: g = (L(b + eps z) - L(b - eps z)) / (2 eps).
    E2 with lr 0.1 and weight decay 0.5: b - 0.1 (g z + 0.5 b).
    """
    b, eps = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), 0.01
    model = Constant(b.tolist()).requires_grad_(False)
    z = Noise(5, CPU).of(9, 0, 4).double()
    plus, minus = (float(torch.logsumexp(b + s * z, 0) - (b + s * z)[2]) for s in (eps, -eps))
    slope = (plus - minus) / (2 * eps)
    batch = collate(Some([answer([1, 1], [2, 2])]), [0], 1, False)
    found = search(Direction(model, 5, CPU), [batch], [9], eps=eps, lr=0.1, weight_decay=0.5, precision="float32")
    assert found.candidates.tolist() == [9]
    assert found.slopes[0] == pytest.approx(slope, abs=2e-5)  # a float32 loss is exact to 1e-7, divided by 0.02
    assert found.loss == pytest.approx((plus + minus) / 2, abs=1e-6)
    assert (found.steps, found.tokens) == (1, 8)
    torch.testing.assert_close(model.bias.double(), b - 0.1 * (slope * z + 0.5 * b), rtol=0, atol=1e-5)


def architectures() -> dict[str, Any]:
    import transformers as t

    small = {"vocab_size": 25, "pad_token_id": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **sizes)),
        "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, **sizes, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**small, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**small, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48)
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**small, **sizes, num_key_value_heads=2, head_dim=16)),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**small, **sizes, num_key_value_heads=2, num_local_experts=4)
        ),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small, **sizes)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=2)),
    }


@pytest.mark.parametrize("chunk", [100, 2**18])
@pytest.mark.parametrize("kind", list(architectures()))
def test_trying_a_direction_is_moving_there_without_being_moved(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every module at w + s z gives the loss of a model whose weights are set to that; w stays, bitwise."""
    monkeypatch.setattr(zeroth_order, "chunk_of", lambda device: chunk)
    torch.manual_seed(0)
    model = architectures()[kind]().eval().requires_grad_(False)
    before = weights_of(model)
    rows = Some([answer([3, 4, 5], [6, 7]), answer([8], [9, 10, 11])])
    batch = collate(rows, [0, 1], 1, False)
    direction, scale, flat, noise = Direction(model, 5, CPU), 0.05, Flat(model), Noise(5, CPU)
    plain = float(sums(model, batch, CPU)[0])
    direction.candidate = 3
    with torch.inference_mode(), direction.on():
        direction.scale = scale
        tried = float(sums(model, batch, CPU)[0])
    assert_same(weights_of(model), before)
    assert float(sums(model, batch, CPU)[0]) == plain
    for name, p in model.named_parameters():
        p.add_(scale * noise.of(3, flat.starts[name], p.numel()).view(p.shape))
    assert tried == pytest.approx(float(sums(model, batch, CPU)[0]), abs=2e-4)
    assert abs(tried - plain) > 0.02
    for name, p in model.named_parameters():
        p.copy_(before[name])
    direction.move(-scale)
    assert float(sums(model, batch, CPU)[0]) == pytest.approx(tried, abs=2e-4)


def test_a_step_without_a_finite_loss_is_skipped() -> None:
    """The second batch's labels meet a logit of NaN; nothing is recorded, nothing moves, the others count."""
    model = Constant([0.5, -1.0, 2.0, 0.0]).requires_grad_(False)
    good = collate(Some([answer([1, 1], [2, 2])]), [0], 1, False)

    class Broken(Constant):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            found = super().forward(input_ids, attention_mask)
            found.logits = torch.where(input_ids[..., None] == 3, math.nan, found.logits)
            return found

    broken = Broken([0.5, -1.0, 2.0, 0.0]).requires_grad_(False)
    bad = Batch(torch.full_like(good.tokens, 3), good.mask, good.labels, good.units)
    options: dict[str, Any] = {"eps": 0.01, "lr": 0.1, "weight_decay": 0.5, "precision": "float32"}
    found = search(Direction(broken, 5, CPU), [good, bad, good], [1, 2, 3], **options)
    assert found.candidates.tolist() == [1, 3]
    assert found.steps == 3
    expected = search(Direction(model, 5, CPU), [good, good], [1, 3], **options)
    assert found.slopes.tolist() == expected.slopes.tolist()
    assert found.loss == expected.loss
    assert torch.equal(broken.bias, model.bias)
    none = search(Direction(broken, 5, CPU), [bad], [2], **options)
    assert len(none.slopes) == 0
    assert math.isnan(none.loss)


def test_a_step_needs_one_chunk_beside_inference() -> None:
    """A model of 64 MiB whose largest weight has 24: what steps add to a forward pass stays far below either."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=12288, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=1,
    )).eval().requires_grad_(False)  # fmt: skip
    stored = sum(4 * p.numel() for p in model.parameters())
    assert stored > 60 * 2**20
    batch = collate(Some([answer([3] * 8, [5] * 8)]), [0], 1, False)
    grown: dict[int, list[int]] = {0: [], 2: []}
    for steps in (0, 2) * 4:  # the first of each kind warms up; the least of the others, for malloc keeps what it likes
        with PeakMemory(CPU) as peak, torch.inference_mode():
            sums(model, batch, CPU)
            if steps:
                options: dict[str, Any] = {"eps": 1e-3, "lr": 1e-6, "weight_decay": 0.0, "precision": "float32"}
                search(Direction(model, 5, CPU), [batch] * steps, range(steps), **options)
        grown[steps].append(peak.grown)
    if not peak.bytes:
        pytest.skip("this system does not tell the peak of a process's memory")
    inference, steps = (min(grown[steps][1:]) for steps in (0, 2))
    assert steps - inference < 8 * 2**20  # noise, its bits and scratch, each of a chunk of 1 MiB
