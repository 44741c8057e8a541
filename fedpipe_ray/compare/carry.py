"""Carries a comparison out: its runs one after another into a folder in which it can go on."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpipe_ray.config import FREE_ON_RESUME, differences, training_hash
from fedpipe_ray.display import Display, megabytes, number
from fedpipe_ray.errors import AllEdgesLost, Interrupted, UserError
from fedpipe_ray.files import locked, write_atomically
from fedpipe_ray.page.history import History
from fedpipe_ray.process import closing, set_up_logging
from fedpipe_ray.record import RunFolder, dumps
from fedpipe_ray.results import check_data
from fedpipe_ray.run import Experiment, MakeFleet, extended, preflight, settled
from fedpipe_ray.settings import Run

from .asked import Asked, Entry, together
from .figures import Figures, common_figures, figures_of, over_seeds
from .show import tables

log = logging.getLogger("fedpipe")
FILE = "comparison.json"
DONE = ("finished", "stopped_early")
LATER = [key for key in FREE_ON_RESUME if key != "rounds"]  # may change when the same comparison goes on
CODES = {"lost": 3, "refused": 2, "crashed": 1}  # how a run may fail, and the exit code it gives


class Comparison:
    """A comparison in its folder. `check` before anything is written, then `carry_out`."""

    def __init__(self, asked: Asked, folder: Path, make_fleet: MakeFleet, display: Display) -> None:
        self.asked, self.folder, self.make_fleet, self.display = asked, folder, make_fleet, display
        self.failed: dict[str, tuple[str, str]] = {}  # run -> (kind of CODES, reason)
        self.methods: dict[str, Run] = {}

    def check(self) -> None:
        """Everything that can be told before the first run: every method's faults, the data. Raises UserError."""
        checked = together(self.asked.entries, lambda entry: settled(self.asked.of(entry)))
        self.methods = {entry.label: run for entry, (run, _) in zip(self.asked.entries, checked, strict=True)}
        check_data(*checked[0])
        for entry in self.asked.entries:
            if entry.left_out:
                self.display.note(f"{entry.label} has no {', '.join(entry.left_out)}: left out for it")

    def names(self) -> Iterator[tuple[str, Entry, int]]:
        """(name, method, seed) of every run, all methods of a seed before the next."""
        for seed in self.asked.seeds:
            for entry in self.asked.entries:
                yield f"{entry.label}-{seed}", entry, seed

    def carry_out(self) -> int:
        """Runs what is left, shows and writes what came out; 0, or the exit code of what failed. Raises UserError."""
        with locked(self.folder, "a comparison"):
            self.check_folder()
            self.write()
            total = len(self.asked.seeds) * len(self.asked.entries)
            try:
                for index, (name, entry, seed) in enumerate(self.names(), 1):
                    self.one(f"[{index}/{total}] {entry.label}, seed {seed}", name, entry, seed)
            except (Interrupted, KeyboardInterrupt):
                self.write()
                self.display.note(f"stopped; the same command goes on in {self.folder}")
                raise
            self.finish()
        kinds = {kind for kind, _ in self.failed.values()}
        return next((CODES[kind] for kind in ("crashed", "lost", "refused") if kind in kinds), 0)

    def one(self, title: str, name: str, entry: Entry, seed: int) -> None:
        """Carries one run out, or notes why it failed; what is done already is kept."""
        run, place = dataclasses.replace(self.methods[entry.label], seed=seed), self.folder / name
        if _status(place) in DONE:
            self.display.note(f"{title}: done before")
            return
        self.display.note(f"{title}: {place}")
        try:
            summary = carry_out_run(run, place, self.make_fleet, self.display)
        except AllEdgesLost as error:
            self.fail(name, "lost", str(error))
        except UserError as error:
            self.fail(name, "refused", str(error))
        except Exception as error:  # a method's own fault must not lose the others
            log.exception("%s failed", name)
            self.fail(name, "crashed", f"{type(error).__name__}: {error}", traceback.format_exc())
        else:
            self.display.note(in_a_line(title, summary))
        finally:
            set_up_logging(self.display, None)
            self.write()

    def fail(self, name: str, kind: str, reason: str, details: str = "") -> None:
        """Notes and says that a run failed."""
        self.failed[name] = kind, reason
        self.display.note(f"{name} failed; the others go on. {details or reason}")

    def finish(self) -> None:
        """The tables, comparison.json, and the page of all runs that have rounds."""
        told = self.write()
        for table in tables(told):
            self.display.console.print(table)
            self.display.note("")
        for name, (_, reason) in self.failed.items():
            self.display.note(f"{name} failed: {reason}")
        histories = [one for one in self.histories().values() if one.rounds]
        if histories:
            from fedpipe_ray.page.page import write_page

            write_page(self.folder / "report.html", histories)
            self.display.note(f"report:  {self.folder / 'report.html'}")
        self.display.note(f"figures: {self.folder / FILE}")
        if self.failed:
            self.display.note("the same command tries again what failed")

    def histories(self) -> dict[str, History]:
        """What there is of the runs, by name."""
        found = {name: self.folder / name for name, _, _ in self.names()}
        return {name: History.read(str(place)) for name, place in found.items() if (place / "config.yaml").is_file()}

    # -- the folder

    def write(self) -> dict[str, Any]:
        """Writes comparison.json as it is by now; returns what it holds."""
        histories = self.histories()
        done = {name: one for name, one in histories.items() if one.summary.get("status") in DONE}
        common, of_run = common_figures(done)
        runs: dict[str, Any] = {}
        by_label: dict[str, list[Figures]] = {entry.label: [] for entry in self.asked.entries}
        for name, entry, seed in self.names():
            kind, reason = self.failed.get(name, (None, None))
            status = kind or (histories[name].summary.get("status", "begun") if name in histories else "to do")
            runs[name] = {"method": entry.label, "seed": seed, "status": status, "reason": reason}
            if name in done:
                figures = {**figures_of(done[name], self.folder / name), **of_run.get(name, {})}
                runs[name] |= figures
                by_label[entry.label].append(figures)
        told = {
            "settings": self.settings(), "methods": self.sections(), "seeds": list(self.asked.seeds), "common": common,
            "runs": runs, "over_seeds": {label: over_seeds(found) for label, found in by_label.items()},
        }  # fmt: skip
        write_atomically(self.folder / FILE, dumps(told))
        return told

    def settings(self) -> dict[str, Any]:
        """What all runs have in common, as plain values; keys that may change when it goes on are left out."""
        tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(next(iter(self.methods.values())))))
        for dotted in ("method", "seed", *LATER):
            node, (*sections, last) = tree, dotted.split(".")
            for section in sections:
                node = node[section]
            node.pop(last, None)
        return tree

    def sections(self) -> dict[str, Any]:
        """Every method's section, with its defaults, as plain values."""
        found: dict[str, Any] = json.loads(json.dumps({label: run.method for label, run in self.methods.items()}))
        return found

    def check_folder(self) -> None:
        """Raises UserError if the folder holds something else than (a part of) this comparison."""
        there = [path.name for path in self.folder.iterdir() if path.name != ".lock"]
        if FILE not in there:
            if there:
                raise UserError(f"{self.folder} is not empty and holds no comparison; give another folder with --out")
            return
        try:
            before = json.loads((self.folder / FILE).read_text())
            known, methods, seeds = before["settings"], before["methods"], before["seeds"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / FILE} is damaged ({error}); give another folder with --out") from None
        now = {"method": self.sections(), **self.settings()}
        missing = [label for label in methods if label not in now["method"]]
        gone = [str(seed) for seed in seeds if seed not in self.asked.seeds]
        if missing or gone:
            what = [
                *([f"method {', '.join(missing)}"] if missing else []),
                *([f"seed {', '.join(gone)}"] if gone else []),
            ]
            raise UserError(
                f"{self.folder} holds a comparison with {' and '.join(what)}; name these too (methods and seeds may be "
                "added), or give another folder with --out"
            )
        now["method"] = {label: now["method"][label] for label in methods}
        changed = sorted(differences({"method": methods, **known}, now))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{self.folder} holds another comparison, with other {', '.join(changed[:5])}{more}; give another "
                "folder with --out"
            )


def carry_out_run(run: Run, place: Path, make_fleet: MakeFleet, display: Display) -> Mapping[str, Any]:
    """A run from its beginning or its last checkpoint to its summary. Raises what `Experiment` does."""
    begun = (place / "checkpoint").is_dir()
    if not begun:
        shutil.rmtree(place, ignore_errors=True)  # of a run that was killed before its first checkpoint
    folder = RunFolder.open(place) if begun else RunFolder.create(place, run)
    try:
        if begun:
            folder.lock()
        set_up_logging(display, place / "log.txt")
        experiment = Experiment(run, preflight(run), folder, make_fleet, display)
        with closing(experiment.fleet):
            if begun:
                point = folder.load_checkpoint()
                extended(run, folder, point)
                display.note(f"it goes on after round {point.start.round}")
                experiment.resume(point)
            else:
                experiment.begin(training_hash(run))
            return dict(experiment.finish())
    except BaseException:
        folder.discard_if_not_begun()
        raise
    finally:
        folder.close()


def in_a_line(title: str, summary: Mapping[str, Any]) -> str:
    """What a run came to."""
    parts, totals = [f"{title}: {summary['status']} after {summary['rounds']} rounds"], summary["totals"]
    before, after = ((summary[part] or {}).get("global") or {} for part in ("base", "tuned"))
    if "loss" in before and "loss" in after:
        parts.append(f"test loss {number(before['loss'], 3)} -> {number(after['loss'], 3)}")
    sent = f"up {megabytes(totals['bytes_up'])}, down {megabytes(totals['bytes_down'])}"
    return ", ".join([*parts, f"{totals['virtual_seconds']:.0f} s virtual", sent])


def _status(place: Path) -> str | None:
    """How the run in a folder ended; None if it did not."""
    try:
        return str(json.loads((place / "summary.json").read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
