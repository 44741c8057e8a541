"""The page and its live form in a real browser: drawn, without an error, within a wide and a narrow window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import chromium, resized
from histories import edge, line, write
from runs import here

pytestmark = pytest.mark.services

PLOTS = "return [...document.querySelectorAll('section:has(.js-plotly-plot)')].map((section) => section.id)"
OUT_OF_SIGHT = """
return [...document.querySelectorAll('h1, h2, p, .js-plotly-plot, .main-svg, .legendtext, .xtitle, .ytitle')]
  .filter((one) => one.getBoundingClientRect().width)
  .filter((one) => one.getBoundingClientRect().left < -1 || one.getBoundingClientRect().right > innerWidth + 1)
  .map((one) => one.className.baseVal || one.className || one.tagName);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture
def pages(run_file: Path, tmp_path: Path) -> dict[str, Path]:
    """Of one FedPipe run, and of two seeds of a method beside another one."""
    capacity = [f"fleet.edges.{name}.training_memory_bytes=1GiB" for name in "abc"]
    runs = {
        "fedpipe": ["method={name: fedpipe}", *capacity],
        "lora-0": ["seed=0"],
        "lora-1": ["seed=1"],
        "ffa": ["method={name: ffa_lora, rank: 4, alpha: 8}"],
    }
    for name, overrides in runs.items():
        assert here("run", run_file, *overrides, "--out", tmp_path / name) == 0
    compared = tmp_path / "compared.html"
    assert here("report", *(tmp_path / name for name in ("lora-0", "lora-1", "ffa")), "--out", compared) == 0
    return {"one": tmp_path / "fedpipe" / "report.html", "compared": compared}


def asked_for(browser: Any) -> set[str]:
    """Schemes and hosts of all that the browser fetched since it was asked last."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return {
        f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in urls if not url.startswith(("data:", "blob:"))
    }


def test_pages_open_and_are_drawn(browser: Any, pages: dict[str, Path]) -> None:
    for width in (1280, 400):
        for name, page in pages.items():
            resized(browser, width)
            browser.get(page.as_uri())
            assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
            drawn = set(browser.execute_script(PLOTS))
            if name == "one":
                assert drawn >= {
                    "quality-loss",
                    "run0-edges",
                    "run0-plan",
                    "run0-memory",
                    "run0-rounds",
                    "run0-importance",
                }
                assert {"run0-method-residual", "run0-tuned"} <= drawn
            else:
                assert drawn >= {"quality-loss", "run0-rounds", "run1-rounds"}
                assert "±" in browser.find_element("id", "compared-loss").text
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert browser.execute_script(OUT_OF_SIGHT) == []
            assert asked_for(browser) == {"file://"}


def test_the_reader_chooses_what_it_is_drawn_against(browser: Any, pages: dict[str, Path]) -> None:
    resized(browser, 1280)
    browser.get(pages["one"].as_uri())
    title = "return document.querySelector('#quality-loss .xtitle').textContent"
    assert browser.execute_script(title) == "round"
    buttons = browser.find_elements("css selector", "#quality-loss .updatemenu-button")
    buttons[2].click()
    assert browser.execute_script(title) == "MB"


def test_a_run_is_watched_without_reload(browser: Any, tmp_path: Path) -> None:
    """A round that is added is drawn, and what the reader had chosen stays chosen."""
    from selenium.webdriver.support.ui import WebDriverWait

    place = write(tmp_path / "run", [3.0, 2.5])
    command = [sys.executable, "-m", "fedpipe_ray", "watch", place, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        url = said.split(" at ")[1].split()[0]
        resized(browser, 1280)
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        points = "const p = document.querySelector('#quality-loss .plot'); return p && p.data ? p.data[0].x.length : 0"
        wait.until(lambda _: browser.execute_script(points) == 2)
        browser.execute_script("window.sameDocument = true")
        browser.find_elements("css selector", "#quality-loss .updatemenu-button")[1].click()
        with (tmp_path / "run" / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(line(3, 2.0, {"a": edge(), "b": edge()})) + "\n")
        wait.until(lambda _: browser.execute_script(points) == 3)
        assert browser.execute_script("return window.sameDocument") is True
        assert (
            browser.execute_script("return document.querySelector('#quality-loss .xtitle').textContent") == "virtual s"
        )
        assert browser.find_element("id", "state").text == "round 3 of 4, in progress"
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"status": "finished"}))
        wait.until(lambda _: browser.find_element("id", "state").text == "round 3 of 4, finished")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        process.terminate()
        process.communicate(timeout=30)
