"""The command line before it does anything: help without the heavy libraries, and the list of methods."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import yaml
from runs import ROOT, command, env, fedpipe

from fedpipe_ray.__main__ import COMMANDS, main
from fedpipe_ray.arguments import parse, parser
from fedpipe_ray.errors import Interrupted
from fedpipe_ray.methods import METHODS, make_method, method_class

HEAVY = ("plotly", "torch", "ray", "transformers", "peft", "pyarrow", "bitsandbytes", "optuna", "datasets")


def loaded_by(code: str) -> list[str]:
    """Which heavy libraries stand in sys.modules after `code` in a fresh interpreter."""
    program = f"import sys\n{code}\nprint(); print(sorted(sys.modules.keys() & {set(HEAVY)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    return found


def test_help_loads_no_configuration() -> None:
    """Its libraries would double the time that the command line takes to start."""
    code = "import sys, fedpipe_ray.__main__ as it; it.parse(['methods']); print('fedpipe_ray.config' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT).stdout == b"False\n"


HELP = """
from fedpipe_ray.__main__ import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    "code",
    [
        "import fedpipe_ray",
        "import fedpipe_ray.__main__",
        "import fedpipe_ray.config, fedpipe_ray.settings, fedpipe_ray.errors, clusters",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["run", "--help"]),
        "from fedpipe_ray.__main__ import main\nassert main(['methods']) == 0",
    ],
    ids=["package", "main", "config", "help", "run-help", "methods"],
)
def test_help_and_imports_are_light(code: str) -> None:
    assert loaded_by(code) == []


def test_the_check_above_can_fail() -> None:
    assert loaded_by("import pyarrow") == ["pyarrow"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fedpipe {command}")
    assert len(text.splitlines()) >= 3


def test_every_command_can_be_parsed_and_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    (commands,) = [action for action in parser()._actions if action.dest == "command"]
    assert set(commands.choices or ()) == set(COMMANDS)
    assert all(f"    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run"], ["run", "a.yaml", "--fast"], ["export", "x"], ["methods", "lora", "x"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: fedpipe")


def test_settings_may_stand_after_a_flag() -> None:
    options = parse(["run", "a.yaml", "rounds=2", "--out", "x", "local.lr=1e-3"])
    assert (options.overrides, str(options.out)) == (["rounds=2", "local.lr=1e-3"], "x")


def test_the_module_runs_as_a_program() -> None:
    done = fedpipe("--help", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: fedpipe")


def test_methods_are_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert len({len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}) == 1  # one column
    for line, name in zip(lines, METHODS, strict=True):
        assert line.endswith(str(method_class(name).__doc__).splitlines()[0])


@pytest.mark.parametrize("name", [*METHODS, "fedpipe_ray.methods.lora:Lora"])
def test_a_method_is_shown_with_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is shown as a section of a run file is one, and gives the defaults; each setting is explained above it."""
    assert main(["methods", name]) == 0
    text, _, section = capsys.readouterr().out.partition("\nmethod:\n")
    settings = yaml.safe_load(section)
    cls: Any = method_class(name)
    assert list(settings) == ["name", *(field.name for field in dataclasses.fields(cls))]
    assert make_method(settings) == cls()
    assert text.splitlines()[0] == str(sys.modules[cls.__module__].__doc__).splitlines()[0]
    assert all(re.search(rf"\b{field.name}\b", text) for field in dataclasses.fields(cls))


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "fedkseet"]) == 2
    assert "no method 'fedkseet'; did you mean fedkseed?" in capsys.readouterr().err


def test_a_missing_file_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "no-such-file.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fedpipe: no file no-such-file.yaml")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_within_a_call_of_ray_is_a_stop(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled with Cython makes a SystemError of any exception that a signal's handler raises within it."""

    def stopped(_: Any) -> None:
        raise SystemError("returned a result with an exception set") from Interrupted(number)

    monkeypatch.setitem(COMMANDS, "methods", stopped)
    assert main(["methods"]) == 128 + number


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`fedpipe methods | head -n 1`, and a reader that has read nothing."""
    with subprocess.Popen(
        command("methods"), cwd=ROOT, env=env(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""
