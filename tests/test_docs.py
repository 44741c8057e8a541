"""The documentation: it builds without a warning, loads nothing from elsewhere, and shows what the program takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT

from clusters import find_profiles
from fedpipe_ray.arguments import parse, parser
from fedpipe_ray.compare.asked import asked
from fedpipe_ray.config import load_run
from fedpipe_ray.methods import METHODS, make_method, method_class
from fedpipe_ray.run import preflight
from fedpipe_ray.settings import Run, Section

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HEADINGS = (
    "Run file", "The paper's, and ours", "On the wire", "Costs", "Refused", "When to choose it", "Measured", "Settings",
)  # fmt: skip
KEYS = {field.name for field in dataclasses.fields(Run)}
OTHERS = {"scrape_configs", "groups", "dataset_path"}  # files of Prometheus, of its alerts, of the evaluation harness
PROFILES = "fleet: {profiles: clusters/laptop.yaml}"


def included(text: str) -> str:
    """A page with the files that it includes."""
    return re.sub(r'^--8<-- "(.+)"$', lambda found: (ROOT / found[1]).read_text().rstrip(), text, flags=re.M)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every block of code, fenced or indented; an indented one has no language."""
    parts = re.split(r"^```(\w*)[^\n]*\n(.*?)^```$", text, flags=re.M | re.S)
    for prose, language, content in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True):
        yield from (("", re.sub(r"^ {4}", "", one, flags=re.M)) for one in re.findall(r"(?:^ {4}.*\n)+", prose, re.M))
        if content:
            yield language, content


def snippets(language: str) -> list[Any]:
    """Every block of a language, named by its page."""
    return [
        pytest.param(content, id=f"{page.relative_to(DOCS)}-{number}")
        for page in PAGES
        for number, (kind, content) in enumerate(blocks(included(page.read_text())))
        if kind == language
    ]


# -- pages


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_of_its_own(name: str) -> None:
    text = (DOCS / "methods" / f"{name}.md").read_text()
    assert text.startswith(f"# `{name}`: ")
    assert tuple(re.findall(r"^## (.+)$", text, re.M)) == HEADINGS
    assert f"<!-- settings {name} -->" in text
    assert f"<!-- source {name} -->" in text or "### The paper's" in text
    assert re.search(r"arXiv \d{4}\.\d{5}", text + str(sys.modules[method_class(name).__module__].__doc__)) or name in (
        "central", "local",
    )  # fmt: skip
    (run,) = [content for kind, content in blocks(text) if kind == "yaml" and "fleet:" in content]
    assert yaml.safe_load(run)["method"]["name"] == name


@pytest.mark.parametrize("content", snippets("yaml"))
def test_yaml_is_what_the_program_reads(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run files load and their methods are made; a part of one does beside ready profiles; others are what they are."""
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    monkeypatch.chdir(ROOT)
    tree, path = yaml.safe_load(content), tmp_path / "snippet.yaml"
    if "search" in tree:
        from fedpipe_ray.__main__ import loader
        from tuning.plan import load_plan

        path = ROOT / "examples" / "snippet-of-the-docs.yaml"  # campaigns name a run file beside them
        try:
            path.write_text(content)
            load_plan(path, [], loader)
        finally:
            path.unlink(missing_ok=True)
        return
    if tree.keys() & OTHERS:
        return
    if "seeds" in tree:
        path.write_text(f"{content}\n{PROFILES}\n")
        assert len(asked(path, [], None, lambda name, _: find_profiles(name, ROOT)).seeds) > 1
        return
    assert tree.keys() <= KEYS, f"neither a run file nor a campaign: {sorted(tree.keys() - KEYS)}"
    path.write_text(content if "fleet" in tree else f"{content}\n{PROFILES}\n")
    run = load_run(path, [], lambda name, _: find_profiles(name, ROOT))
    make_method(run.method)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"bitfit", "head"}))
def test_run_files_of_the_methods_pass_the_preflight(name: str, tmp_path: Path) -> None:
    """Model, targets and all settings together; of the two that need a classifier's model only what loading checks."""
    path = tmp_path / "run.yaml"
    (content,) = [
        content
        for kind, content in blocks((DOCS / "methods" / f"{name}.md").read_text())
        if kind == "yaml" and "fleet:" in content
    ]
    path.write_text(content)
    assert preflight(load_run(path, [], lambda file, _: find_profiles(file, ROOT))) is not None


def commands() -> Iterator[Any]:
    """Every line that begins with `fedpipe`, in blocks of code that are no output."""
    for page in PAGES:
        for number, (kind, content) in enumerate(blocks(page.read_text())):
            for line in content.replace("\\\n", " ").splitlines():
                found = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|python -m )?fedpipe(?:_ray)? (.+)", line)
                if kind in ("", "text", "bash") and found:
                    yield pytest.param(found[1], id=f"{page.relative_to(DOCS)}-{number}-{found[1][:40]}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_those_of_the_program(line: str) -> None:
    options = parse(shlex.split(line, comments=True))
    assert all("=" in one and not one.startswith("=") for one in getattr(options, "overrides", []))


def test_commands_in_running_text_exist() -> None:
    """`fedpipe NAME`, and the flags that stand behind it."""
    (every,) = [action for action in parser()._actions if action.dest == "command"]
    choices: Any = every.choices
    seen = 0
    for page in PAGES:
        for words in re.findall(r"`fedpipe ([^`]+)`", page.read_text()):
            name, *rest = words.split()
            assert name in choices, f"{page.name}: fedpipe {words}"
            flags = {flag for action in choices[name]._actions for flag in action.option_strings}
            odd = {word for word in rest if word.startswith("--")} - flags
            assert not odd, f"{page.name}: fedpipe {words} has no {odd}"
            seen += 1
    assert seen > 20


# -- what is made from the code


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_explained(hooks: Any) -> None:
    """By its class's docstring: `key: what it is`. Sections are explained by their own keys."""
    text = "\n".join([*hooks.configuration(), *hooks.of_class("tuning.settings:Campaign")])
    for name in METHODS:
        text += "\n".join(["", *hooks.settings(name)])
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .*\| (.*) \|$", text, re.M)
    silent = [key for key, kind, words in rows if not words.strip() and "keys" not in kind]
    assert len(rows) > 150
    assert [key for key in silent if key != "display"] == []  # the one key of its section, above which it is explained


def test_a_table_has_every_key_with_its_default(hooks: Any) -> None:
    text = "\n".join(hooks.configuration())
    for key, words in (
        ("rounds", "| whole number | `6` |"), ("uplink_bps", "| bit/s | `2e+07` |"),
        ("training_memory_bytes", "| bytes, null | `null` | what base model"), ("mode", "`synchronous` `buffered`"),
    ):  # fmt: skip
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{key}` |")]
        assert words in row
    assert {line for line in text.splitlines() if line.startswith("#")} >= {
        "## `data`", "### `data.partition`", "### `fleet.edges.NAME`", "### `server.optimizer`",
    }  # fmt: skip


def test_docstrings_are_taken_apart_at_their_labels(hooks: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Made(Section):
        """About it all. one, two (of 3): of both; three: this | that.

        Four is `three: not here`. four: <last>.
        """

        one: int = 1
        two: float | None = 2.5
        three: str = "x"
        four: int = 4

    globals()["Made"] = Made
    lead, told = hooks.explained(Made)
    assert lead == "About it all."
    assert told["one"] == "of both"
    assert told["two"] == "of both (of 3)"
    assert told["three"].startswith("this \\| that")
    assert told["four"] == "&lt;last&gt;"


# -- the site


class Links(HTMLParser):
    """What a browser would load for a page, and what it says in emphasis."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.classes |= set((found.get("class") or "").split())
        for name in ("src", "srcset", "data", "poster"):
            self.loaded += [found[name] or ""] if name in found else []
        if tag in ("link", "use", "image") and (found.get("rel") or "") not in ("canonical", "next", "prev"):
            self.loaded.append(found.get("href") or found.get("xlink:href") or "")
        self.loaded += re.findall(r"url\(([^)]+)\)", found.get("style") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of MkDocs ends the build."""
    pytest.importorskip("material", reason="pip install 'fedpipe-ray[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return out


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts, images of pages and style sheets; links in the text may go anywhere."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        links = Links()
        links.feed(page.read_text())
        assert [one for one in links.loaded if re.match(r"(https?:)?//", one.strip("'\""))] == [], page
        assert "mermaid" not in links.classes, "the theme would load mermaid from a CDN"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text) == [], sheet


def test_the_pages_have_what_was_made(site: Path) -> None:
    """Settings, commands, included files; no mark is left, and no letter with a star became emphasis."""
    text = {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}
    assert "<code>max_staleness</code>" in text["reference/configuration.html"]
    assert "--memory-from-profiles" in text["reference/commands.html"]
    assert "class FairLora" in re.sub("<[^>]+>", "", text["adding-a-method.html"])
    assert "Who sees and can do what" in text["security.html"]
    for name in METHODS:
        assert f'href="{name}.html"' in text["methods/index.html"]
        assert f'<h1 id="{name}' in text[f"methods/{name}.html"]
    for page, content in text.items():
        assert not re.search(r"<!-- (methods|source|settings|class|configuration|commands)", content), page
        assert "--8&lt;--" not in content, page
        stray = re.findall(r".{40}<em>\W.{40}", content, re.S)  # who means emphasis begins it with a word
        assert stray == [], page
