"""A Ray cluster to run on: the one we are a job of, the one at an address, or a private one on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from fedpipe_ray.errors import UserError
from fedpipe_ray.settings import Run

from .knock import knock

log = logging.getLogger("fedpipe")

LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every listener on loopback
    "GLOO_SOCKET_IFNAME": "lo",  # and those of edges of several processes
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_preload_python_modules": "torch,transformers,peft",  # of workers that are no forks
}
ALWAYS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an edge without GPU sees none
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # as in fedpipe_ray/__main__.py, for programs that start elsewhere
}
NODE_LEFT = ("has been marked dead", "Raylet is terminated")  # Ray's words
_begun: list[bool] = []  # what the `connect` of `starting` gave, until another takes it
_zygotes: list[tuple[subprocess.Popen[bytes], str]] = []  # of this process, each with its folder


def set_environment(address: str | None) -> str | None:
    """Sets what Ray reads from the environment, and returns the address to use; None: a private cluster here.

    Ray reads some of it while it is imported, so this comes first: mixed settings fail misleadingly. A private cluster
    is on loopback, with a token that only this process and its workers know.
    """
    for key, value in ALWAYS.items():
        os.environ.setdefault(key, value)
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None or address == "local":
        for key, value in LOCAL.items():
            os.environ.setdefault(key, value)
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        return None
    if not inside_job():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return address


def inside_job() -> bool:
    """Whether Ray itself started this process, as the entrypoint of a job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def connect(address: str | None, forked: bool = True) -> bool:
    """Connects this process to Ray; True if the cluster is ours to end, with `disconnect`.

    Raises UserError with the remedy, or ConnectionError where Ray itself fails. Without an address, and outside a job,
    a cluster is started on this machine. With an address the code of this project is shipped; inside a job the job's
    own `--working-dir` does that. forked: workers of a cluster started here may be forks of a zygote. Takes what
    `starting` began.
    """
    if _begun:
        return _begun.pop()
    address = set_environment(address)
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return False
    news_to_log()
    if address is not None and not inside_job():
        knock(address)
    try:
        if address is None:
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                runtime_env=forked_workers() if forked and sys.platform == "linux" else None,
            )  # fmt: skip
            return True
        code = None if inside_job() else {"working_dir": str(Path(__file__).resolve().parent.parent)}
        where = None if inside_job() else address
        ray.init(address=where, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        mode = os.environ.get("RAY_AUTH_MODE", "unset")
        raise ConnectionError(
            f"fleet.address: no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]} "
            f"(RAY_AUTH_MODE is {mode}; it must be that of the cluster)"
        ) from error
    return False


def news_to_log() -> None:
    """Has Ray's news for all drivers go to our log instead of the terminal; call it once Ray is imported.

    A thread of every driver prints them, whatever `log_to_driver` is, and Ray has no setting for it: only its printing
    can be replaced. A node that left is told by our own lines, so that goes to the run's log alone; of the rest the
    first line is shown.
    """
    from ray._private import worker

    def note(data: Any, ignore_prefix: bool = False) -> None:
        for text in data["lines"]:
            first, _, rest = text.strip().partition("\n")
            known = any(words in text for words in NODE_LEFT)
            log.log(logging.DEBUG if known else logging.WARNING, "Ray: %s", first)
            if rest:  # such as the end of another process's log
                log.debug("%s", rest)

    worker.print_to_stdstream = note


def without_gpus(run: Run) -> bool:
    """Whether no edge of a run reserves a GPU, so that workers may be forks: CUDA does not survive one."""
    return not any(profile.gpus for profile in run.fleet.edges.values())


def forking() -> bool:
    """Whether the workers of the cluster that this process started are forks."""
    return bool(_zygotes)


def disconnect() -> None:
    """Ends a cluster that `connect` started, and what belongs to it."""
    import ray

    ray.shutdown()
    end_zygotes()


@contextmanager
def connected(address: str | None, forked: bool = True) -> Iterator[None]:
    """Holds a connection for all fleets that the block makes, so that a cluster started here ends with it alone.

    Raises UserError if there is no cluster.
    """
    try:
        ours = connect(address, forked)
    except ConnectionError as error:
        raise UserError(str(error)) from error
    try:
        yield
    finally:
        if ours:
            disconnect()


def forked_workers() -> dict[str, str]:
    """The runtime environment in which Ray's workers are forks of a new zygote; that ends with this process."""
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # they would not be forks
    folder = tempfile.mkdtemp(prefix="fedpipe-zygote-")
    place, script = f"{folder}/socket", str(Path(__file__).with_name("zygote.py"))
    zygote = subprocess.Popen(
        [sys.executable, script, "serve", place], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _zygotes.append((zygote, folder))
    return {"py_executable": shlex.join([sys.executable, "-I", "-S", script, "ask", place])}


@atexit.register
def end_zygotes() -> None:
    """Ends the zygotes of this process; their workers live as long as Ray does."""
    while _zygotes:
        zygote, folder = _zygotes.pop()
        zygote.terminate()
        zygote.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def starting(address: str | None, forked: bool = True) -> Iterator[None]:
    """Starts a private cluster, for the `connect` to come, while a thread imports what a run needs; an error ends it.

    One waits and the other computes, so together they take as long as the imports. Ray starts in the thread that stays:
    the kernel ends its processes with the thread that made them. At a cluster elsewhere it only knocks, and raises
    UserError.
    """
    address = set_environment(address)
    if address is not None and not inside_job():
        knock(address)  # before the imports: who is not let in need not wait for them
    if address is not None or _begun:
        yield
        return
    imports = Thread(target=import_module, args=("fedpipe_ray.run",))
    imports.start()
    _begun.append(connect(address, forked))
    imports.join()
    try:
        yield
    except BaseException:
        if _begun and _begun.pop():
            disconnect()
        raise
