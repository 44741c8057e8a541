"""A campaign's study: where it is stored, who it belongs to, its sampler and pruner, and what a killed driver left."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from fedpipe_ray.errors import UserError

from .space import Space

OWNER = "campaign"  # the study's attribute that says whose it is
RETRY_OF, REPEAT_OF, ENQUEUED = "retry_of", "repeat_of", "enqueued"  # of trials: a number, a number, a point
STOPPED = "stopped"  # of trials at work when their driver was asked to stop: nothing had gone wrong
OWN_FAULT = "own_fault"  # of trials that failed by themselves, and would again
OPEN = "open"  # of trials stopped above a bound: names of the constraints of which their last round would have told
log = logging.getLogger("fedpipe")
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The journal file in `folder`, or the database at a URL. Raises UserError if it cannot be reached.

    Only one process may have `folder` (it is locked): what a killed one left half-written there is taken away.
    """
    if url is None:
        return JournalStorage(JournalFileBackend(str(mended(folder / "journal.log"))))
    scheme, separator, _ = url.partition("://")
    kind = scheme.partition("+")[0]
    if not separator or kind not in DRIVERS:
        raise UserError(
            f"storage: {hidden(url)} is no URL of PostgreSQL or MySQL; write postgresql://USER@HOST/DATABASE"
        )
    try:
        return RDBStorage(with_driver(url), engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError(f"storage: {hidden(url)} needs its driver ({error}); pip install 'fedpipe-ray[tune]'") from None
    except Exception as error:  # SQLAlchemy's, the driver's, or Optuna's
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise UserError(
            f"storage: {hidden(url)} cannot be reached: {why}; is the server up, and the user right?"
        ) from None


def backend_of(study: optuna.Study) -> BaseStorage:
    """A study's storage behind the cache that Optuna puts before a database."""
    found: BaseStorage = getattr(study._storage, "_backend", study._storage)
    return found


def close_storage(study: optuna.Study) -> None:
    """Lets a database's connections go; the study may still be used, and opens new ones."""
    storage = backend_of(study)
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def with_driver(url: str) -> str:
    """A database's URL as SQLAlchemy takes it, with the driver that the extra `tune` brings unless it names one."""
    scheme, separator, rest = url.partition("://")
    return url if "+" in scheme or scheme not in DRIVERS else f"{scheme}+{DRIVERS[scheme]}{separator}{rest}"


def hidden(url: str) -> str:
    """A URL without its password."""
    scheme, separator, rest = url.rpartition("://")
    who, at, where = rest.rpartition("@")
    return f"{scheme}{separator}{who.partition(':')[0]}{at}{where}"


def mended(path: Path) -> Path:
    """A journal file without a torn last line and without the lock of a process that is gone.

    Raises UserError for another damaged line. The file is cut, not written anew: a kill then would lose all of it.
    """
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink()
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    size = sum(map(len, lines))
    if lines and not is_whole(lines[-1]):
        os.truncate(path, size - len(lines.pop()))
    for number, line in enumerate(lines, 1):
        if not is_whole(line):
            raise UserError(
                f"{path}: line {number} is damaged; bring the file back from a copy, or move it away to begin anew, or "
                "give the campaign another folder with --out"
            )
    return path


def is_whole(line: bytes) -> bool:
    """Whether a line of a journal was written to its end."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:  # of JSON or of UTF-8
        return False


def open_study(
    storage: BaseStorage, name: str, owner: Mapping[str, Any], ways: Sequence[str],
    sampler: BaseSampler, pruner: BasePruner,
) -> optuna.Study:  # fmt: skip
    """The study of this name, made if there is none. Raises UserError if it belongs to another campaign.

    owner: what makes a campaign this one, as JSON values.
    """
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[StudyDirection[way.upper()] for way in ways],
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        theirs, mine = study.user_attrs.get(OWNER), json.loads(json.dumps(owner))
        if theirs is None and not study.trials and [d.name.lower() for d in study.directions] == list(ways):
            study.set_user_attr(OWNER, mine)
            return study
    except StorageInternalError as error:
        raise UserError(f"storage: it went away: {str(error).splitlines()[0]}") from None
    if theirs != mine:
        changed = [key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key]]
        raise UserError(
            f"study {name!r} belongs to another campaign: {', '.join(changed)} differ(s); "
            + (
                "give this one another name"
                if isinstance(backend_of(study), RDBStorage)
                else "give this one another folder with --out"
            )
        )
    return study


def sampler_of(name: str, seed: int, done: int, parallel: int) -> BaseSampler:
    """A sampler by name. done: trials there are, so that one that goes on does not draw its first points again."""
    seed += 7919 * done
    makers: dict[str, Any] = {
        "tpe": lambda: TPESampler(seed=seed, multivariate=True, constant_liar=parallel > 1),
        "gp": lambda: GPSampler(seed=seed),
        "nsga2": lambda: NSGAIISampler(seed=seed),
        "nsga3": lambda: NSGAIIISampler(seed=seed),
        "cmaes": lambda: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "qmc": lambda: QMCSampler(seed=seed, warn_independent_sampling=False),
        "random": lambda: RandomSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler: BaseSampler = makers[name]()
    return sampler


def pruner_of(name: str, rounds: int) -> BasePruner:
    """A pruner by name, for trials of so many rounds: from the first round on, at most a third goes on at a time."""
    makers: dict[str, Any] = {
        "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=rounds, reduction_factor=3),
        "median": lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        "none": NopPruner,
    }
    pruner: BasePruner = makers[name]()
    return pruner


class Comparable:
    """A storage that shows only trials which another may be judged by. It stands in for the one behind it."""

    def __init__(self, storage: BaseStorage, hides: Callable[[FrozenTrial], bool]) -> None:
        self._storage, self._hides = storage, hides

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        """As a storage's."""
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [trial for trial in trials if not self._hides(trial)]


def should_prune(study: optuna.Study, trial: Trial, hides: Callable[[FrozenTrial], bool]) -> bool:
    """What the study's pruner says of a trial when it sees none of those that `hides` names.

    The study keeps its own pruner: samplers look which one it is.
    """
    storage: Any = Comparable(study._storage, hides)
    shown = optuna.Study(study.study_name, storage, study.sampler, study.pruner)
    return study.pruner.prune(shown, study._storage.get_trial(trial._trial_id))


def superseded(trials: Iterable[FrozenTrial]) -> set[int]:
    """Numbers of trials that another one tries again."""
    return {trial.user_attrs[RETRY_OF] for trial in trials if RETRY_OF in trial.user_attrs}


def counted(trials: Sequence[FrozenTrial]) -> int:
    """How many of a campaign's trials are there already, in whatever state: tries of the same one count once."""
    return len(trials) - len(superseded(trials))


def kills(trials: Sequence[FrozenTrial], number: int) -> int:
    """How many drivers ended over a trial that runs, and those that it tries again, without being asked to stop."""
    found, at = 0, number
    while True:
        found += STOPPED not in trials[at].user_attrs
        if RETRY_OF not in trials[at].user_attrs:
            return found
        at = trials[at].user_attrs[RETRY_OF]


def recover(study: optuna.Study, retries: float = math.inf) -> list[int]:
    """Fails every trial that a killed driver left running, and queues each once more; their numbers.

    retries: of one with more `kills` no copy is made. The copy comes first, so that a kill in between loses none; and a
    copy that is there is not made again.
    """
    trials = study.get_trials(deepcopy=False)
    left, known = [trial for trial in trials if trial.state == TrialState.RUNNING], superseded(trials)
    for trial in left:
        if trial.number not in known and (often := kills(trials, trial.number)) > retries:
            reason = f"{often} drivers ended unasked while it was at work; `enqueue` its values to try it again"
            log.warning("trial %d failed: %s", trial.number, reason)
            study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        elif trial.number not in known:
            fixed = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            attributes = {key: trial.user_attrs[key] for key in (ENQUEUED,) if key in trial.user_attrs}
            study.enqueue_trial(fixed, user_attrs={**attributes, RETRY_OF: trial.number})
        study.tell(trial.number, state=TrialState.FAIL)
    return [trial.number for trial in left]


def enqueue(study: optuna.Study, space: Space, points: Sequence[Mapping[str, Any]]) -> None:
    """Queues the points of a campaign file that are not in the study yet, each as often as it stands there.

    Raises UserError for one outside space.
    """
    params = [{key: space.param(key, value) for key, value in point.items()} for point in points]
    own = [trial for trial in study.get_trials(deepcopy=False) if RETRY_OF not in trial.user_attrs]
    known = Counter(trial.user_attrs.get(ENQUEUED) for trial in own)
    for point in params:
        key = json.dumps(point, sort_keys=True)
        if known[key]:
            known[key] -= 1
        else:
            study.enqueue_trial(point, user_attrs={ENQUEUED: key})


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial was done and met every constraint."""
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def best_of(trials: Iterable[FrozenTrial], ways: Sequence[str]) -> list[FrozenTrial]:
    """Feasible trials that none beats in every objective, each point once, the best in the first objective first."""
    signs = [1 if way == "minimize" else -1 for way in ways]
    points: dict[tuple[float, ...], FrozenTrial] = {}
    for trial in trials:
        if feasible(trial) and all(math.isfinite(value) for value in trial.values):
            points.setdefault(tuple(sign * value for sign, value in zip(signs, trial.values, strict=True)), trial)
    front = [one for one in points if not any(other != one and _covers(other, one) for other in points)]
    return [points[one] for one in sorted(front)]


def _covers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def unmet(trials: Iterable[FrozenTrial]) -> dict[str, FrozenTrial]:
    """Constraint -> the trial that comes nearest, for those that no trial met; one that diverged is near to none."""
    nearest: dict[str, FrozenTrial] = {}
    for trial in trials:
        for name, value in trial.constraints.items() if trial.state == TrialState.COMPLETE else ():
            if name in trial.user_attrs.get(OPEN, ()) or math.isinf(value):
                continue
            if name not in nearest or value < nearest[name].constraints[name]:
                nearest[name] = trial
    return {name: trial for name, trial in nearest.items() if trial.constraints[name] > 0}


def misses(trials: Iterable[FrozenTrial]) -> dict[str, tuple[int, int]]:
    """Constraint -> (how many of the trials that came to an end miss it, how many there are); none that diverged."""
    found: dict[str, tuple[int, int]] = {}
    for trial in trials:
        for name, value in trial.constraints.items() if trial.state == TrialState.COMPLETE else ():
            if name not in trial.user_attrs.get(OPEN, ()) and math.isfinite(value):
                over, all_of_them = found.get(name, (0, 0))
                found[name] = over + (value > 0), all_of_them + 1
    return found
