"""`fedpipe evaluate RUN --lm-eval TASKS`: base and tuned model on lm-evaluation-harness, an optional extra.

EleutherAI's harness gets the model that this program loaded, with the run's adapter applied in place; figures and
standard errors are the harness's own.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from .display import Display, number
from .errors import UserError
from .files import write_atomically
from .opened import Opened, opened
from .process import set_up_logging
from .record import dumps

FILE = "lm_eval.json"
QUIET_SECONDS = 10.0  # between lines of progress where there is no terminal
SEEDS = (0, 1234, 1234, 1234)  # of random, numpy, torch, few-shot examples: the harness's own
Tasks = dict[str, dict[str, Any]]  # tasks, groups, and which belong to a group, as the harness's manager gives them
Results = dict[str, dict[str, Any]]  # by task, as lm_eval.json has them


def command(options: argparse.Namespace) -> None:
    """Evaluates, shows a table, and writes lm_eval.json. Raises UserError."""
    for name in ("data", "config"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} and --lm-eval do not go together: the tasks bring their own rows; leave one out")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: lm-evaluation-harness is not installed; pip install 'fedpipe-ray[lm-eval]'")
    display = Display()
    set_up_logging(display, None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with opened(options.what, None, options.overrides) as one:
        if one.site.task == "classification":
            raise UserError(
                f"{one.folder.name} trained a classifier, and the tasks of --lm-eval are for causal models; use "
                "fedpipe evaluate without it"
            )
        out = options.out or (None if one.folder.remote else one.folder.path / FILE)
        known = _written(out) if out else {}
        display.note(one.status)
        display.note("reading the tasks")
        tasks = load_tasks(options.lm_eval, options.lm_eval_path)
        display.note(f"loading {one.run.model.name}")
        batch = options.batch_size or one.run.evaluate.batch
        results = measured(one, tasks, batch, options.limit, display)
    display.console.print(table(results))
    if out is None:
        display.note("give --out FILE to keep these figures")
        return
    try:
        write_atomically(out, dumps({**known, **results}))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    display.note(f"figures: {out}")


def _written(out: Path) -> Results:
    """What earlier evaluations left in the file. Raises UserError for a file of another kind."""
    try:
        return dict(json.loads(out.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--out {out}: is there, and not a file of this command ({error}); give another") from None


def load_tasks(wanted: str, more: Path | None) -> Tasks:
    """The harness's tasks and groups by name or path of a file, commas between them; their rows are loaded.

    more: a folder of further task files. Raises UserError for what is unknown, broken, or cannot be had offline.
    """
    from lm_eval.tasks import TaskManager

    if more is not None and not more.is_dir():
        raise UserError(f"--lm-eval-path {more}: there is no such folder")
    specs = [part.strip() for part in wanted.split(",") if part.strip()]
    if not specs:
        raise UserError("--lm-eval names no task; write names or paths of task files, with commas between them")
    files = [spec for spec in specs if spec.endswith((".yaml", ".yml"))]
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing:
        raise UserError(f"--lm-eval {missing}: there is no such file")
    manager = TaskManager(include_path=str(more) if more else None, include_defaults=len(files) < len(specs))
    found: Tasks = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        names = [spec] if spec in files else manager.match_tasks([spec])
        if not names:
            near = difflib.get_close_matches(spec, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "its documentation lists the tasks"
            raise UserError(f"--lm-eval {spec}: the harness has no such task; {hint}")
        for name in names:
            for part, ones in _loaded(manager, name).items():
                found[part] |= ones
    return found


def _loaded(manager: Any, name: str) -> Tasks:
    """The task or group of a name or file; of a tag its tasks. Raises UserError."""
    try:
        loaded: Tasks = manager.load([name])
    except Exception as error:  # data sets, YAML and the tasks' own code raise what they like
        raise UserError(f"--lm-eval {name}: {_reason(error)}") from error
    unsafe = [task for task, found in loaded["tasks"].items() if getattr(found, "UNSAFE_CODE", False)]
    if unsafe:
        raise UserError(f"--lm-eval {name}: {unsafe[0]} runs code that the model writes; use lm_eval itself for it")
    return loaded


def _reason(error: Exception) -> str:
    """Why a task cannot be had, and what to do: offline, the first thing that fails is the download of its rows."""
    first = (str(error).strip().splitlines() or [""])[0]
    said = f"{type(error).__name__}: {first}"
    network = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ProxyError", "ConnectError")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds.intersection(network) or "offline" in str(error).lower() or "Couldn't reach" in str(error):
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        return (
            f"its rows are not on this machine and the hub cannot be reached ({said}).{offline} Load the data set once "
            "with a network (HF_HOME says where it is kept), or give a task file on local rows"
        )
    return f"the harness cannot load it ({said})"


def measured(one: Opened, tasks: Tasks, batch: int, limit: int | None, display: Display) -> Results:
    """What the harness finds of the base model, then of the tuned one. The base comes first: adapters change it.

    Its `evaluate` with the settings of its `simple_evaluate`, which also asks pip and git about the machine: seconds.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Mapping[str, Any]] = {}
    for name in ("base", "tuned"):
        display.note(f"evaluating the {name} model")
        model = one.base.model if name == "base" else one.weights.on(one.base)
        precision = "bfloat16" if one.run.local.precision == "bfloat16" else None
        with sparse_progress():
            lm: Any = HFLM(
                pretrained=model, tokenizer=one.base.tokenizer, batch_size=batch, max_length=one.context,
                mixed_precision_dtype=precision,
            )  # fmt: skip
            seed(tasks)
            found[name] = evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False)
    return compared(found["base"], found["tuned"], {"round": one.round, "limit": limit})


def seed(tasks: Tasks) -> None:
    """Sets every seed, and no few-shot examples where a task does not say how many."""
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[3])


def compared(base: Mapping[str, Any], tuned: Mapping[str, Any], about: Mapping[str, Any]) -> Results:
    """By task: rows, few-shot examples, and of every metric {"base", "tuned": {"value", "stderr"}, "higher_is_better"}.

    base, tuned: what the harness returned. A metric after a filter is called `metric,filter`.
    """
    results: Results = {}
    for task, values in tuned["results"].items():
        metrics: dict[str, Any] = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            pair = {name: _with_error(of["results"][task], key) for name, of in (("base", base), ("tuned", tuned))}
            higher = (tuned.get("higher_is_better") or {}).get(task, {}).get(metric)
            metrics[metric if kind == "none" else key] = {**pair, "higher_is_better": higher}
        rows = (tuned.get("n-samples") or {}).get(task, {}).get("effective")
        shots = (tuned.get("n-shot") or {}).get(task)
        results[task] = {"rows": rows, "shots": shots, **about, "metrics": metrics}
    return results


def _with_error(values: Mapping[str, Any], key: str) -> dict[str, float | None]:
    metric, _, kind = key.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    return {"value": values.get(key), "stderr": float(error) if isinstance(error, int | float) else None}


def table(results: Results) -> Table:
    """A line a task and metric; ↑ and ↓ say which way is better."""
    found = Table(box=None, pad_edge=False, title="value ± standard error", title_justify="left")
    found.add_column("task", overflow="fold")
    found.add_column("metric", overflow="fold")
    for name in ("rows", "base", "tuned"):
        found.add_column(name, justify="right", no_wrap=True)
    for task, about in results.items():
        rows = "" if about["rows"] is None else str(about["rows"])
        for metric, pair in about["metrics"].items():
            way = {True: " ↑", False: " ↓", None: ""}[pair["higher_is_better"]]
            found.add_row(task, metric + way, rows, _cell(pair["base"]), _cell(pair["tuned"]))
    return found


def _cell(pair: Mapping[str, float | None]) -> str:
    spread = "" if pair["stderr"] is None else f" ± {number(pair['stderr'], 3)}"
    return number(pair["value"], 3) + spread


class _Sparse:
    """Standard error on which a bar that redraws itself becomes a line now and then."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Passes text on; of a bar's redrawings, one every ten seconds as a line of its own."""
        bar = text.strip("\r\n\x1b[A ")
        if "\r" not in text and bar:
            self.stream.write(text)
        elif bar and time.monotonic() - self.last >= QUIET_SECONDS:
            self.last = time.monotonic()
            self.stream.write(bar + "\n")
        return len(text)


@contextlib.contextmanager
def sparse_progress() -> Iterator[None]:
    """The harness's bars as they are on a terminal, sparse elsewhere."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(_Sparse(sys.stderr)):
        yield
