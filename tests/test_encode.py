"""From rows to tokens and labels: templates, what the loss counts, chat messages, classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpipe_ray.data import inspect
from fedpipe_ray.data.encode import Template
from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Data
from tests.rows import PAIRS, TOKENIZER, byte_tokenizer, labelled, lines, opened, qa, texts

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + CHATML
# Renderings of the first messages that are not the beginning of the whole, as templates of released models make them.
ODD_TEMPLATES = {
    "thinks in the last turn only": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}(hm)\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "same<|im_end|>\n(hm)\nciao<|im_end|>\n",
    ),
    "ends the whole conversation with a token of its own": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}",
        "same<|im_end|>ciao<|im_end|></s>",
    ),
    "asks for thoughts that it does not show": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
        "{% else %}<|im_end|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}",
        "same</s>ciao</s>",
    ),
    "has no generation prompt and trims": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}",
        " same</s> ciao</s>",
    ),
}


# -- templates and tokens


def test_template_fields_and_braces() -> None:
    template = Template("prompt", "{{{a b}}} and {c:d}{{}}")
    assert template.columns == ["a b", "c:d"]
    assert template.fill({"a b": "{1}", "c:d": "2"}) == "{{1}} and 2{}"
    for bad in ("{a", "a}", "{}", "{a{b}"):
        with pytest.raises(UserError, match=r"data.prompt: '[{}]' at character \d"):
            Template("prompt", bad)


def test_loss_counts_the_response_and_its_end(tmp_path: Path) -> None:
    data = opened(qa(lines(tmp_path / "a.jsonl", [{"q": "1+1", "a": 2}]), validation=0.0, test=0.0))
    ids, labels = data.train.example(0)
    assert TOKENIZER.decode(ids) == "<s>1+1? 2</s>"
    assert labels.tolist() == [-100] * 5 + ids.tolist()[5:]  # <s>1+1? has five tokens
    assert (ids.dtype, labels.dtype) == (np.int32, np.int32)


def test_what_is_too_long_is_cut_and_what_has_no_response_left_is_dropped(tmp_path: Path) -> None:
    """max_length 10 holds <s>, six bytes of prompt with its `?`, and three of the response."""
    rows = [
        {"q": "12345", "a": "6"},
        {"q": "12345", "a": "67"},
        {"q": "12345", "a": "6789"},
        {"q": "123456789", "a": "0"},
    ]
    source = lines(tmp_path / "a.jsonl", [*rows, {"q": "1", "a": " "}, {"q": "1"}])
    data = opened(qa(source, max_length=10, validation=0.0, test=0.0))
    assert texts(data.train) == [
        ("<s>12345? 6</s>", " 6</s>"), ("<s>12345? 67", " 67"), ("<s>12345? 67", " 67")
    ]  # fmt: skip
    assert data.counts == {
        "rows": 6, "train": 3, "validation": 0, "test": 0, "truncated": 2, "dropped_empty": 3, "dropped_leaked": 0
    }  # fmt: skip


def test_a_very_long_text_is_not_tokenised_to_its_end(tmp_path: Path) -> None:
    data = opened(qa(lines(tmp_path / "a.jsonl", [{"q": "x", "a": "y" * 5_000_000}]), validation=0.0, test=0.0))
    assert data.train.example(0)[0].shape == (256,)
    assert data.counts["truncated"] == 1


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn, "name": None} for i, turn in enumerate(turns)]}


def test_chat_loss_counts_assistant_turns_only(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    source = lines(tmp_path / "a.jsonl", [chat("hi", "hello", "bye", "ciao", "?"), chat("only a question")])
    settings = Data(source=str(source), messages="messages", validation=0.0, test=0.0)
    data = opened(settings, tokenizer)
    whole = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    whole += "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nciao<|im_end|>\n"
    assert texts(data.train, tokenizer) == [(whole, "hello<|im_end|>\nciao<|im_end|>\n")]
    assert data.counts["dropped_empty"] == 1


@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_assistant_turns_are_found_in_odd_templates(tmp_path: Path, name: str) -> None:
    """The user says the same as the assistant: a search for the text alone would find the wrong turn."""
    template, counted = ODD_TEMPLATES[name]
    tokenizer = byte_tokenizer(chat_template=template)
    source = lines(
        tmp_path / "a.jsonl", [chat("same", "same", "ciao", "<think>?</think>ciao" if "thoughts" in name else "ciao")]
    )
    data = opened(Data(source=str(source), messages="messages", validation=0.0, test=0.0), tokenizer)
    whole = tokenizer.apply_chat_template(chat("same", "same", "ciao", "ciao")["messages"], tokenize=False)
    assert texts(data.train, tokenizer) == [(whole, counted)]


def test_chat_prompts_of_test_rows_are_ready_to_be_tokenised(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=STRICT)
    own = lines(tmp_path / "test.jsonl", [chat("hi", "hello", "bye", "ciao")])
    source = pa.table({"messages": [chat("a", "b")["messages"]]})
    pq.write_table(source, tmp_path / "a.parquet")
    data = opened(
        Data(source=str(tmp_path / "a.parquet"), messages="messages", validation=0.0, test=str(own), format="auto"),
        tokenizer,
    )
    prompt, response = data.test.text(0)
    assert response == "ciao"
    ids = data.test.example(0)[0].tolist()
    assert tokenizer(prompt)["input_ids"] == ids[: len(ids) - len("ciao.\n")]  # <|im_end|> is one token


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (chat("a", "b")["messages"][::-1], "row 2: .*refuses the roles assistant, user: the user speaks first"),
        ([{"from": "human", "value": "x"}], "row 2 has a message with the keys from, value; it needs role and content"),
        ("not a list", "row 2 is no list of messages"),
        ({"role": "user"}, "row 2 holds no list of messages"),
    ],
)  # fmt: skip
def test_messages_that_are_none(tmp_path: Path, messages: Any, message: str) -> None:
    source = lines(tmp_path / "a.jsonl", [chat("a", "b"), {"messages": messages}])
    with pytest.raises(UserError, match=message):
        opened(Data(source=str(source), messages="messages"), byte_tokenizer(chat_template=STRICT))


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [chat("a", "b")])
    with pytest.raises(UserError, match=r"no chat template; use data.prompt and data.response, or a model with one"):
        opened(Data(source=str(source), messages="messages"))


def test_template_of_no_column_or_a_wrong_one(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UserError, match="no column 'query'"):
        inspect(qa(source, prompt="{query}"), "e0", ["e0"], 0)
    with pytest.raises(UserError, match=r"data.response: 'yes' names no column"):
        inspect(qa(source, response="yes"), "e0", ["e0"], 0)


# -- classification


def test_classes(tmp_path: Path) -> None:
    """The tokenizer's own tokens stay around the text when it is cut: [CLS] + 8 bytes + [SEP]."""
    tokenizer = byte_tokenizer("[CLS]", "[SEP]")
    source = lines(tmp_path / "a.jsonl", [{"t": "0123456789", "y": 10}, {"t": "abc", "y": 2}, {"t": " ", "y": 2}])
    settings = labelled(source, max_length=10, validation=0.0, test=0.0)
    facts = inspect(settings, "e0", ["e0"], 0)
    assert (facts.rows, facts.columns, facts.label_values, facts.sizes) == (
        3,
        ["t", "y"],
        ["2", "10"],
        {"2": 2, "10": 1},
    )
    data = opened(settings, tokenizer, ["2", "10"])
    rows = [data.train.example(i) for i in range(2)]
    assert [tokenizer.decode(ids) for ids, _ in rows] == ["[CLS]01234567[SEP]", "[CLS]abc[SEP]"]
    assert [label.tolist() for _, label in rows] == [[1], [0]]
    assert (data.counts["truncated"], data.counts["dropped_empty"]) == (1, 1)


def test_labels_that_are_none(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", [{"t": "x", "y": "good"}, {"t": "x", "y": "goood"}, {"t": "x", "y": None}])
    with pytest.raises(UserError, match=r"row 3 of .*a.jsonl has nothing in y"):
        inspect(labelled(source), "e0", ["e0"], 0)
    with pytest.raises(UserError, match=r"row 2 of .*a.jsonl has 'goood'; data.labels has good, bad"):
        inspect(labelled(source, labels=["good", "bad"]), "e0", ["e0"], 0)
    with pytest.raises(UserError, match="row 2 has 'goood'; the classes are good, bad"):
        opened(labelled(source), classes=["good", "bad"])
