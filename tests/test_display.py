"""What a run shows: plain lines that hold what they should, and a live table that fits a terminal of 80 columns."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from runs import load

from fedpipe_ray.costs import Cost
from fedpipe_ray.display import Display, comparison, in_words, megabytes, number, shortened
from fedpipe_ray.evaluate import perplexity
from fedpipe_ray.fleet import SerialFleet
from fedpipe_ray.loop import Round
from fedpipe_ray.lora import LoraSpec
from fedpipe_ray.message import Message
from fedpipe_ray.methods import make_method
from fedpipe_ray.methods.base import LoraWeights
from fedpipe_ray.record import round_record
from fedpipe_ray.report import Lost, Report
from fedpipe_ray.site import Progress, Ready

LONG = "hospital-north-campus-building-17"


def a_round(loss: float = 2.5, lost: bool = True, quality: float = 1.25) -> dict[str, Any]:
    """The record of round 3: an edge that reported, one that may be lost."""
    cost = Cost(virtual_seconds=7.25, bytes_up=250_000, bytes_down=1_250_000)
    outcomes: dict[str, Report | Lost] = {"a": Report("a", 2, 10, loss, cost)}
    if lost:
        outcomes[LONG] = Lost(LONG, "its worker died", cost=Cost(bytes_down=1_250_000))
    metrics = {"loss": quality, "perplexity": math.exp(quality), "token_accuracy": 0.5, "tokens": 5, "rows": 2}
    return round_record(Round(2, Message(), outcomes, {"a": metrics}, metrics, 1.04, 0.5, 7.25))


def summary(losses: tuple[float, float] = (3.0, 2.0)) -> dict[str, Any]:
    """Of a run over two edges, with free-text answers."""

    def measured(loss: float) -> dict[str, Any]:
        metrics = {
            "loss": loss, "perplexity": perplexity(loss), "token_accuracy": 0.25, "tokens": 5000, "rows": 50,
            "rouge_l": 0.5, "exact_match": 0.125, "generated": 10,
        }  # fmt: skip
        return {"global": metrics, "edges": {"a": metrics, LONG: metrics}}

    totals = {"wall_seconds": 61.4, "virtual_seconds": 1234.0, "bytes_up": 5e6, "bytes_down": 6e6}
    return {
        "status": "finished",
        "rounds": 6,
        "base": measured(losses[0]),
        "tuned": measured(losses[1]),
        "totals": totals,
        "export": LoraWeights(LoraSpec(4, 8.0, ("all-linear",)), {}).hint,
    }


@pytest.fixture
def fleet(run_file: Path) -> SerialFleet:
    """Edges of names, sources and figures as wide as they get."""
    run = load(run_file, f"fleet.edges.{LONG}={{}}", "fleet.edges.x={}")
    fleet = SerialFleet(run, make_method(run.method))
    for site in fleet.sites.values():
        site.progress = Progress("training", 1234, 5678, 12.3456, 123456.7, 79 * 2**30)
    fleet.sites["x"].progress = Progress()
    return fleet


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output passes for a terminal of 80 columns."""
    for name, value in {"COLUMNS": "80", "LINES": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was written, without colours and cursor movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


# -- plain


def test_a_round_is_one_plain_line(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("plain")
    with display.rounds(fleet, 6, 2):
        display.round(a_round())
    assert lines(capsys) == [
        "round   3  train loss 2.500  validation: loss 1.250, perplexity 3.490  1.0 s (virtual 7.2 s)"
        f"  up 0.2 MB  down 2.5 MB  lost: {LONG}"
    ]


def test_what_is_not_there_is_not_shown(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    record = {**a_round(loss=math.nan, lost=False), "eval": {"split": "validation", "global": {}, "edges": {}}}
    display = Display("plain")
    with display.rounds(fleet, 6, 2):
        display.round(record)
    assert lines(capsys) == ["round   3  train loss -  1.0 s (virtual 7.2 s)  up 0.2 MB  down 1.2 MB"]


def test_the_end_shows_every_figure_and_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    Display("plain").finish(summary(), "runs/x")
    shown = lines(capsys)
    assert shown[0] == "test rows: base -> tuned"
    text = " ".join(shown)
    for figure in ("3.000 -> 2.000", "20.086 -> 7.389", "0.250 -> 0.250", "0.500 -> 0.500", "0.125 -> 0.125"):
        before, after = figure.split(" -> ")
        assert text.count(f"{before} ->") >= 3
        assert text.count(after) >= 3
    assert "…" not in text
    assert shown[-5:] == [
        "finished after 6 rounds: 61 s (1234 s virtual), up 5.0 MB, down 6.0 MB",
        'adapter:  runs/x/adapter   (peft.PeftModel.from_pretrained(base, "runs/x/adapter"))',
        "merge:    fedpipe export runs/x --out MODEL --merge",
        "report:   runs/x/report.html",
        "go on:    fedpipe resume runs/x rounds=12",
    ]


def test_a_run_without_a_model_ends_with_its_totals(capsys: pytest.CaptureFixture[str]) -> None:
    Display("plain").finish({**summary(), "base": {}, "tuned": {}}, "runs/x")
    assert lines(capsys) == ["finished after 6 rounds: 61 s (1234 s virtual), up 5.0 MB, down 6.0 MB"]


def test_the_preflight_shows_an_edge_a_line(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {
        "rows": 60,
        "train": 41,
        "validation": 7,
        "test": 9,
        "truncated": 2,
        "dropped_empty": 1,
        "dropped_leaked": 3,
    }
    ready = [Ready(name, counts, "f00", "cpu") for name in ("a", LONG)]
    Display("plain").edges(fleet.run_settings, ready)
    header, *rows = lines(capsys)
    assert header.split() == ["edge", "data", "train", "validation", "test", "cut", "dropped", "device"]
    assert [row.split()[0] for row in rows] == ["a", LONG]
    assert all(row.split()[2:] == ["41", "7", "9", "2", "4", "cpu"] for row in rows)
    assert rows[0].split()[1].endswith("/a.jsonl")


def test_nothing_is_shown_if_nothing_is_wanted(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("none")
    with display.watching(fleet), display.rounds(fleet, 6, 2):
        display.round(a_round())
    with display.task("pretraining") as bar:
        bar(1, 2, "loss 3")
    display.base({"loss": 1.0})
    display.finish(summary(), "runs/x")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_auto_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert Display().mode == "plain"


@pytest.mark.usefixtures("terminal")
def test_auto_is_live_on_a_terminal() -> None:
    assert Display().mode == "live"
    assert Display("plain").mode == "plain"


def test_text_with_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [x] for markup; targets, paths and tracebacks have it."""
    display = Display("plain")
    display.note("method.targets=[q_proj] [/b] [red]")
    log = logging.getLogger("fedpipe.test")
    log.addHandler(display.handler())
    try:
        log.warning("edge [a] lost: KeyError: [/x]")
    finally:
        log.handlers.clear()
    shown = lines(capsys)
    assert shown[0] == "method.targets=[q_proj] [/b] [red]"
    assert "edge [a] lost: KeyError: [/x]" in shown[1]


# -- live


@pytest.mark.usefixtures("terminal")
def test_the_live_table_fits(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """Names give way, figures do not."""
    display = Display()
    display.sources = dict.fromkeys(fleet.edges, shortened("/data/of/this/edge/and/that/one/rows.jsonl"))
    with display.rounds(fleet, 1000, 2):
        display.round(a_round())
    shown = lines(capsys)
    assert max(cell_len(line) for line in shown) <= 80
    table = [line for line in shown if "training" in line]
    assert len(table) >= 4
    for line in table:
        assert line.split()[-6:] == ["training", "1234/5678", "12.346", "123,457", "79.00", "GiB"]
    (waiting, *_) = [line for line in shown if line.startswith("x ")]
    assert waiting.split()[-2:] == ["waiting", "-"]
    assert any(line.startswith("rounds ") and "3/1000" in line for line in shown)


@pytest.mark.usefixtures("terminal")
def test_everything_else_fits_too(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    counts = dict.fromkeys(("train", "validation", "test", "truncated", "dropped_leaked"), 1234567)
    display.edges(fleet.run_settings, [Ready(LONG, counts, "f00", "cuda:0")])
    with display.watching(fleet, "evaluating the base model"):
        display.base(summary()["base"]["global"])
    with display.task("pretraining the built-in model, once") as bar:
        bar(100, 670, "loss 5.43")
    display.finish(summary((10.8, 9.9)), "runs/a-rather-long-name-20250101-120000")
    shown = lines(capsys)
    assert max(cell_len(line) for line in shown) <= 80
    text = " ".join(shown)
    assert text.count("1234567") == 5
    assert "evaluating the base model" in text
    assert "100/670" in text
    assert "49,020.8 ->" in text


@pytest.mark.usefixtures("terminal")
def test_rounds_come_one_after_another(fleet: SerialFleet, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run of rounds in one program has a bar of its own."""
    display = Display()
    for _ in range(2):
        with display.rounds(fleet, 6, 2):
            display.round(a_round())
    assert sum("train loss 2.500" in line for line in lines(capsys)) == 2


# -- numbers for people


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "-"), (None, "-"), (0.0, "0.000"), (1.23456, "1.235"), (-1.5, "-1.500"), (99.9999, "100.000"),
        (100.0, "100.0"), (1234.56, "1,234.6"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value, 3) == text


def test_bytes() -> None:
    assert [megabytes(n) for n in (0, 950, 99_999, 100_000, 1_234_567)] == [
        "0.0 kB",
        "0.9 kB",
        "100.0 kB",
        "0.1 MB",
        "1.2 MB",
    ]


def test_metrics_in_words() -> None:
    assert in_words({"loss": 1.0, "perplexity": math.e, "token_accuracy": 0.5}) == "loss 1.000, perplexity 2.718"
    assert in_words({"loss": 1.0, "accuracy": 0.5, "macro_f1": math.nan}) == "loss 1.000, accuracy 0.500, macro f1 -"
    assert in_words({}) == ""


def test_sources_are_shortened_from_the_left() -> None:
    assert shortened("short.csv") == "short.csv"
    assert shortened("/a/long/path/to/rows.jsonl", 14) == ".../rows.jsonl"
    assert len(shortened("x" * 99)) == 24


def test_an_edge_that_was_not_measured_before_has_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("plain")
    tuned = {"global": {"loss": 2.0}, "edges": {"a": {"loss": 2.0}}}
    display.console.print(comparison({"global": {"loss": None}, "edges": {}}, tuned))
    assert [line.split() for line in lines(capsys)[2:]] == [
        ["a", "-", "->", "2.000"],
        ["all", "edges", "-", "->", "2.000"],
    ]
