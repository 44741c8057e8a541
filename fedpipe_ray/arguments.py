"""Every command of the command line and its arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .quantity import parse_quantity


def parser() -> argparse.ArgumentParser:
    """Every command and its arguments."""
    top = argparse.ArgumentParser(
        prog="fedpipe", description="Federated fine-tuning of language models over unequal edge servers."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_file = argparse.ArgumentParser(add_help=False)
    run_file.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    run_file.add_argument("overrides", nargs="*", metavar="key=value", help="keys that differ, such as local.lr=1e-3")

    run = commands.add_parser("run", parents=[run_file], help="run a configuration, from base model to adapter")
    run.add_argument("--out", metavar="DIR|URL", help="run folder, also s3://... (default: runs/NAME-DATE-TIME)")

    resume = commands.add_parser("resume", help="go on with a run that was stopped, or extend a finished one")
    resume.add_argument("folder", metavar="DIR|URL", help="a run folder")
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="such as rounds=20")

    add_results(commands)

    plan = commands.add_parser("plan", parents=[run_file], help="what every edge would be given, without training")
    plan.add_argument(
        "--shapes", action="store_true", help="from the model's configuration alone: loads no weights, asks no edge"
    )
    plan.add_argument("--out", type=on_disk, default=Path("plan.json"), metavar="FILE", help="default: plan.json")

    add_searches(commands, run_file)
    add_compare(commands, run_file)
    add_generate(commands)

    submit = commands.add_parser("submit", parents=[run_file], help="run a configuration as a job of a Ray cluster")
    submit.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    submit.add_argument("--out", metavar="DIR|URL", help="run folder, as the head of the cluster sees it")
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="environment variable to pass on, such as HF_TOKEN"
    )

    methods = commands.add_parser("methods", help="list the methods, or show one with its settings")
    methods.add_argument("name", nargs="?", metavar="NAME", help="a method, or a module:Class of your own")

    check = commands.add_parser(
        "check", parents=[run_file], help="check everything that can be checked without training"
    )
    check.add_argument(
        "--cluster",
        metavar="FILE",
        help="only whether all edges find room on the cluster of a `ray up` or KubeRay file",
    )
    return top


def add_results(commands: Any) -> None:
    """The commands that look at what a run left, `evaluate`, `export`, `report` and `watch`."""
    evaluate = commands.add_parser(
        "evaluate", help="base against tuned model, on the edges' test rows or on files of your own"
    )
    evaluate.add_argument(
        "what", metavar="DIR|URL|ADAPTER", help="a run folder, or a PEFT adapter with --data and --config"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluate.generate=50")
    evaluate.add_argument("--data", metavar="SOURCE", help="a file, folder or URL; all its rows are test rows")
    evaluate.add_argument(
        "--config", type=Path, metavar="CONFIG", help="run file that says how rows are read (default: the run's own)"
    )
    add_benchmarks(evaluate)

    export = commands.add_parser("export", help="write the adapter of a run, or with --merge a plain model")
    export.add_argument("folder", metavar="DIR|URL", help="a run folder")
    export.add_argument("--out", type=on_disk, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--merge", action="store_true", help="merge the adapter into the model: same architecture, no added latency"
    )
    export.add_argument("--edge", metavar="NAME", help="of a method that leaves a model on every edge: this edge's")

    report = commands.add_parser("report", help="the page of a run, or of several in the same axes; needs no network")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, also s3://..., finished or in progress")
    report.add_argument("--out", type=on_disk, default=Path("report.html"), metavar="FILE", help="default: report.html")
    watch = commands.add_parser("watch", help="the page of a run in progress, live in a browser on this machine")
    watch.add_argument("run", metavar="DIR|URL", help="a run folder; it need not be there yet")
    watch.add_argument("--port", type=int, metavar="N", help="of 127.0.0.1 (default: 8270, or a free one)")


def add_searches(commands: Any, run_file: argparse.ArgumentParser) -> None:
    """The commands that search settings, `tune` and `allocate`."""
    tune = commands.add_parser("tune", help="search run settings: many trials, the best as a run file")
    tune.add_argument("config", type=Path, metavar="CAMPAIGN", help="a campaign file")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="of the campaign, such as trials=50")
    tune.add_argument("--out", type=on_disk, metavar="DIR", help="its folder; goes on there (default: runs/NAME)")

    allocate = commands.add_parser(
        "allocate", parents=[run_file], help="search rank, bits and batch of each edge class"
    )
    allocate.add_argument(
        "--latency", type=partial(quantity, "second"), required=True, metavar="T", help="of a round, 30s"
    )
    allocate.add_argument(
        "--memory-from-profiles",
        action="store_true",
        help="name edges without training_memory_bytes, which have no limit; what others have is always kept",
    )
    allocate.add_argument(
        "--bytes",
        type=partial(quantity, "byte"),
        default=math.inf,
        metavar="B",
        help="an edge's in a round, up and down: of tensors as they travel, without names and framing",
    )
    allocate.add_argument("--trials", type=int, default=300, metavar="N", help="of every class (default: 300)")
    allocate.add_argument(
        "--measure", type=int, default=0, metavar="K", help="so many (at least 2) also in short federated runs"
    )
    allocate.add_argument("--sampler", default="tpe", help="tpe (default), gp, nsga2, nsga3, cmaes, qmc, random")
    allocate.add_argument("--out", type=on_disk, metavar="DIR", help="default: runs/allocate-NAME")


COMPARE = """\
Runs several methods on the same fleet, seeds and virtual clock, one after another, each into DIR/METHOD-SEED.

  method=lora,fedpipe             the methods by name
  method.rank=8                   for every method that has it: rank, alpha, targets, dropout, variant, ranks
  method.fedpipe.preset=paper     for one method; with `method: [...]` in the file, mappings of a name and its settings
  method="[lora, {label: small, name: lora, rank: 2}]"    a method more than once, under labels
  seeds=0,1,2                     as `seeds: [0, 1, 2]` in the file, or --seeds 0,1,2

The same command goes on where it was stopped; methods and seeds may be added.
"""


def add_compare(commands: Any, run_file: argparse.ArgumentParser) -> None:
    """The command `compare`."""
    compare = commands.add_parser(
        "compare", parents=[run_file], help="run several methods with the same fleet, seeds and clock",
        description=COMPARE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    compare.add_argument("--seeds", metavar="0,1,2", help="every method runs with each (default: the file's seed)")
    compare.add_argument("--out", type=on_disk, metavar="DIR", help="default: runs/compare-NAME")


def add_generate(commands: Any) -> None:
    """The command `generate`."""
    generate = commands.add_parser("generate", help="answers or class probabilities of base and tuned model")
    generate.add_argument("folder", metavar="DIR|URL", help="a run folder, also of a run in progress")
    generate.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="fills the run's template; or a JSON object of "
        "its columns; may be repeated",
    )  # fmt: skip
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, each as --prompt")
    generate.add_argument("--raw", action="store_true", help="take prompts as they are, without the run's template")
    generate.add_argument(
        "--max-new-tokens", type=partial(whole, 1), metavar="N", help="default: the run's evaluate.max_new_tokens"
    )
    generate.add_argument(
        "--temperature", type=not_negative, default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    generate.add_argument(
        "--seed", type=partial(whole, 0), default=0, metavar="N", help="of --temperature (default: 0)"
    )
    generate.add_argument("--edge", metavar="NAME", help="of a method that leaves a model on every edge: this edge's")
    generate.add_argument("--json", action="store_true", help="print a JSON list and nothing else")


def add_benchmarks(evaluate: argparse.ArgumentParser) -> None:
    """What `evaluate` takes for public benchmarks."""
    group = evaluate.add_argument_group("public benchmarks, by lm-evaluation-harness")
    group.add_argument(
        "--lm-eval", metavar="TASKS", help="names of tasks or paths of task files, with commas between them"
    )
    group.add_argument("--lm-eval-path", type=Path, metavar="DIR", help="a folder with more task files")
    group.add_argument("--limit", type=partial(whole, 1), metavar="N", help="only so many rows of each task")
    group.add_argument("--batch-size", type=partial(whole, 1), metavar="N", help="default: the run's evaluate.batch")
    group.add_argument("--out", type=on_disk, metavar="FILE", help="default: lm_eval.json in the run folder")


def whole(least: int, text: str) -> int:
    """A whole number of at least `least`."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return int(text)


def not_negative(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return value


def quantity(unit: str, text: str) -> float:
    """A number with its unit, or in the base unit."""
    try:
        return float(text) if text.replace(".", "", 1).isdigit() else parse_quantity(text, unit)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def on_disk(text: str) -> Path:
    """A path for what is written to this disk only."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a path on this disk, and copy it from there")
    return Path(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; key=value may also stand after a flag, where argparse alone no longer takes it."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    late = [one for one in rest if "=" in one and not one.startswith("-") and hasattr(options, "overrides")]
    if late != rest:
        top.error(f"unrecognized arguments: {' '.join(one for one in rest if one not in late)}")
    if late:
        options.overrides += late
    return options
