"""Evaluation against numbers derived by hand, on Llamas whose logits are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from toys import CPU, PAD, Constant, Some, answer, chain, classifier, llama, uniform
from transformers import AutoTokenizer

from fedpipe_ray.batches import IGNORED, collate, sums
from fedpipe_ray.evaluate import (
    Metrics,
    combine,
    complete,
    evaluate,
    generate,
    gsm8k_number,
    macro_f1,
    perplexity,
    score,
)

NEXT = [*range(1, 27), 0]  # the chain model counts: after token t comes t + 1
RIGHT = math.log(math.exp(math.sqrt(32)) + 26) - math.sqrt(32)  # loss of the expected token: 0.08684
WRONG = RIGHT + math.sqrt(32)  # of any other

MIXED = Some([
    answer([3, 4], [5]), answer([3], [6, 6, 7]), answer([4, 4, 4], [2, 2]), answer([5], [1, 2, 3, 4, 5]),
    answer([9, 8, 7, 6, 5, 4], [3]), answer([10], [11]),
])  # fmt: skip


def measured(model: Any, rows: Some, **options: Any) -> Metrics:
    return evaluate(model, rows, device=CPU, pad_id=PAD, **options)


# -- causal


def test_metrics_by_hand() -> None:
    """Responses after the chain 0, 1, 2, ...: [5 6 7] after 4 all right; [9 5] after 8: right, then wrong.

    4 of 5 tokens right; the loss is (4 x 0.08684 + 5.7437) / 5.
    """
    rows = Some([answer([4], [5, 6, 7]), answer([20, 8], [9, 5])])
    found = measured(chain(NEXT), rows)
    loss = (4 * RIGHT + WRONG) / 5
    assert found == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 0.8, "tokens": 5, "rows": 2}, rel=1e-5
    )


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    found = measured(uniform(27), MIXED)
    assert (found["loss"], found["perplexity"]) == pytest.approx((math.log(27), 27), rel=1e-5)


def test_prompts_do_not_count() -> None:
    """The same responses after prompts that are impossible to guess."""
    good = measured(chain(NEXT), Some([answer([4], [5, 6])]))
    long = measured(chain(NEXT), Some([answer([19, 3, 17, 2, 11, 4], [5, 6])]))
    assert good["loss"] == pytest.approx(long["loss"], rel=1e-5)
    assert good["tokens"] == long["tokens"] == 2


def test_the_limit_takes_the_first_rows() -> None:
    rows = Some([answer([4], [5]), answer([4], [5]), answer([4], [9, 9, 9])])
    assert measured(chain(NEXT), rows, limit=2)["token_accuracy"] == 1
    assert measured(chain(NEXT), rows, limit=99)["rows"] == 3


def test_no_rows_no_metrics() -> None:
    assert measured(chain(NEXT), Some([])) == {}
    assert generate(None, None, Some([]), device=CPU, count=3, max_new_tokens=2) == {}


def test_evaluation_leaves_no_gradient_and_no_training_mode() -> None:
    model = llama().train()
    measured(model, MIXED)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_batch_size_changes_nothing(batch: int) -> None:
    """Padding is masked out: rows of 2 to 7 tokens together, or one at a time."""
    assert measured(llama(), MIXED, batch=batch) == pytest.approx(measured(llama(), MIXED, batch=32), rel=1e-6)
    rows = Some([(tokens, [i % 3]) for i, (tokens, _) in enumerate(MIXED.rows)])
    whole = measured(classifier(), rows, classes=3)
    assert measured(classifier(), rows, classes=3, batch=batch) == pytest.approx(whole, rel=1e-6)


def test_an_overflowing_perplexity_is_infinite() -> None:
    assert perplexity(1000.0) == math.inf
    assert perplexity(2.0) == pytest.approx(7.389056)


# -- the head runs only where it is needed


@pytest.mark.parametrize(
    "rows",
    [
        MIXED,
        Some([([3, 4, 5], [3, 4, 5]), answer([3, 4], [5])]),  # labels from the first token on
        Some([answer([3, 4, 5, 6, 7], [8])]),  # the last token only
        Some([([3, 4, 5, 6], [IGNORED, 4, IGNORED, 6])]),  # with a hole, as a chat has
    ],
)
def test_the_short_head_equals_the_whole(rows: Some) -> None:
    """Loss, logits and gradient as from all logits and PyTorch's own shifted cross-entropy."""
    model = llama()
    batch = collate(rows, range(len(rows)), PAD, classifier=False)
    loss, found, wanted = sums(model, batch, CPU)
    loss.backward()
    short = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits[:, :-1]
    whole = functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    whole.backward()
    counted = batch.labels[:, 1:] != IGNORED
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(found, logits[counted], atol=1e-6)
    assert torch.equal(wanted, batch.labels[:, 1:][counted])
    assert batch.units == int(counted.sum())
    assert torch.allclose(short, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-5)


class Whole(torch.nn.Module):
    """A model as many remote ones are: its head runs on every position, it cannot be asked for less."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_without_a_short_head_gives_the_same() -> None:
    assert measured(Whole(llama()), MIXED) == pytest.approx(measured(llama(), MIXED), rel=1e-6)


def test_constant_logits_by_hand() -> None:
    """Bias (0, ln 3, 0, 0), responses [1] and [0, 2]: (ln 2 + 2 ln 6) / 3."""
    found = measured(Constant([0.0, math.log(3), 0.0, 0.0]), Some([answer([3, 2, 2], [1]), answer([0], [0, 2])]))
    assert found["loss"] == pytest.approx((math.log(2) + 2 * math.log(6)) / 3, rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(1 / 3)


def test_padding_by_hand() -> None:
    batch = collate(Some([([3, 4, 5], [3, IGNORED, 5]), ([6], [IGNORED])]), [0, 1], 9, classifier=False)
    assert batch.tokens.tolist() == [[3, 4, 5], [6, 9, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 5], [IGNORED] * 3]
    assert batch.units == 1


# -- classification


def test_macro_f1_by_hand() -> None:
    """[[3, 1], [2, 4]]: 2 x 3 / (4 + 5) = 2/3 and 2 x 4 / (6 + 5) = 8/11; a class that nowhere occurs is left out.

    [[2, 0, 0], [1, 0, 0], [0, 0, 0]]: 2 x 2 / (2 + 3) = 0.8 and 0.
    """
    assert macro_f1(np.array([[3, 1], [2, 4]])) == pytest.approx((2 / 3 + 8 / 11) / 2)
    assert macro_f1(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]])) == pytest.approx(0.4)
    assert macro_f1(np.zeros((3, 3))) == 0
    assert macro_f1(np.diag([5, 1, 7])) == 1


def test_a_classifier_that_knows_one_answer() -> None:
    """The head gives class 1 a logit of 2 a unit of feature 0, others 0, and every row ends alike: x is the same.

    Rows of classes 1, 1, 0, 2 all predicted 1: accuracy 1/2, F1 of class 1 is 2 x 2 / (2 + 4), of the others 0.
    """
    model = classifier(3)
    torch.nn.init.zeros_(model.score.weight)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[5]])).last_hidden_state[0, 0]
        model.score.weight[1] = hidden / hidden.dot(hidden) * 2
    found = measured(model, Some([([5], [1]), ([5], [1]), ([5], [0]), ([5], [2])]), classes=3)
    z = math.log(math.exp(2) + 2)
    assert found == pytest.approx({"loss": z - 1, "accuracy": 0.5, "macro_f1": 2 / 9, "rows": 4}, rel=1e-5)


# -- answers in words


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 8 + 9 = 17\n#### 17", "17"), ("#### -5", "-5"), ("#### 1,234", "1234"),
        ("#### 1,234,567.89", "1234567.89"), ("####72.", "72"), ("#### $18", "18"),
        ("#### 0.5", "0.5"), ("#### .5", ".5"), ("#### 5 apples #### 6", "5"),
        ("####\n42", "42"), ("#### -1,000.25 per day", "-1000.25"), ("the answer is 42", None), ("#### none", None),
        ("### 42", None), ("", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert gsm8k_number(text) == number


def test_scores_by_hand() -> None:
    """ROUGE-L of `the cat sat` and `the cat ran away`, 2 words in common: P 2/4, R 2/3, F = 2 P R / (P + R) = 4/7."""
    assert score("the cat ran away", "the cat sat", "text") == pytest.approx((4 / 7, 0.0))
    assert score(" the  cat\nsat ", "the cat sat", "text") == (1.0, 1.0)
    assert score("The cat sat", "the cat sat", "text") == (1.0, 0.0)
    assert score("", "the cat sat", "text") == (0.0, 0.0)
    assert score("it is #### 1,000", "because\n#### 1000", "gsm8k")[1] == 1
    assert score("it is 1000", "because\n#### 1000", "gsm8k")[1] == 0
    assert score("no number", "none either", "gsm8k")[1] == 0


def test_greedy_answers_of_the_chain(model_dir: Path) -> None:
    """Words in the order of the vocabulary follow one another: after `beta` come gamma, delta, one; 2 is the end.

    Of the three answers one is right, one has 1 of 3 words right (F = 1/3), and one ends at once: after `<pad>` comes
    `<eos>`, and special tokens are not shown.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = Some([], texts=[("alpha beta", "gamma delta one"), ("red", "green up up"), ("<pad>", "left")])
    rows.rows = [answer([3], [4])] * 3
    found = generate(chain(NEXT), tokenizer, rows, device=CPU, count=5, max_new_tokens=3)
    assert found == pytest.approx({"rouge_l": (1 + 1 / 3 + 0) / 3, "exact_match": 1 / 3, "generated": 3})
    assert complete(chain(NEXT), tokenizer, "alpha beta", CPU, 5) == "gamma delta one two three"
    assert complete(chain(NEXT), tokenizer, "<pad>", CPU, 5) == ""
    first = generate(chain(NEXT), tokenizer, rows, device=CPU, count=1, max_new_tokens=3)
    assert first == {"rouge_l": 1, "exact_match": 1, "generated": 1}


# -- the fleet as a whole


def test_edges_count_alike_and_counts_add_up() -> None:
    """Losses 1 and 3 give 2 whatever the edges' sizes, and e^2 as perplexity, not the mean of e and e^3."""
    edges = {
        "a": {"loss": 1.0, "perplexity": math.e, "token_accuracy": 0.5, "tokens": 10, "rows": 2, "rouge_l": 0.1},
        "b": {"loss": 3.0, "perplexity": math.e**3, "token_accuracy": 0.25, "tokens": 990, "rows": 40},
        "c": {},
    }
    assert combine(edges) == pytest.approx(
        {"loss": 2, "perplexity": math.e**2, "token_accuracy": 0.375, "tokens": 1000, "rows": 42}
    )
    assert combine({}) == combine({"a": {}}) == {}


def test_further_views_of_the_state_are_combined_in_the_same_way() -> None:
    edges = {
        name: {"loss": 0.0, "perplexity": 1.0, "own.loss": loss, "own.perplexity": math.exp(loss), "own.tokens": 5}
        for name, loss in (("a", 1.0), ("b", 3.0))
    }
    expected = {"loss": 0, "perplexity": 1, "own.loss": 2, "own.perplexity": math.e**2, "own.tokens": 10}
    assert combine(edges) == pytest.approx(expected)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_edges_does_not_matter(losses: list[float], random: Any) -> None:
    edges = [(str(i), {"loss": loss, "perplexity": math.exp(loss), "rows": i}) for i, loss in enumerate(losses)]
    whole = combine(dict(edges))
    random.shuffle(edges)
    assert combine(dict(edges)) == pytest.approx(whole)
    assert min(losses) - 1e-9 <= whole["loss"] <= max(losses) + 1e-9


def test_no_special_token_follows_a_prompt(model_dir: Path) -> None:
    """A tokenizer that ends every text would have the model answer after the end of its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("alpha")["input_ids"][-1] == tokenizer.eos_token_id
    assert complete(chain(NEXT), tokenizer, "alpha beta", CPU, 5) == "gamma delta one two three"
