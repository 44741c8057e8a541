"""A Ray cluster to run on: the one we are a job of, the one at an address, or a private one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread

from .knock import knock

LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every listener on loopback
    "GLOO_SOCKET_IFNAME": "lo",  # and those of edges of several processes
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_preload_python_modules": "torch,transformers,peft",
}
ALWAYS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an edge without GPU sees none
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # as in fedpipe_ray/__main__.py, for programs that start elsewhere
}
_begun: list[bool] = []  # what the `connect` of `starting` gave, until another takes it


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


def connect(address: str | None) -> bool:
    """Connects this process to Ray; True if the cluster is ours to end.

    Raises UserError with the remedy, or ConnectionError where Ray itself fails. Without an address, and outside a job,
    a cluster is started on this machine. With an address the code of this project is shipped; inside a job the job's
    own `--working-dir` does that. Takes what `starting` began.
    """
    if _begun:
        return _begun.pop()
    address = set_environment(address)
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return False
    if address is not None and not inside_job():
        knock(address)
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
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


@contextmanager
def starting(address: str | None) -> Iterator[None]:
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
    _begun.append(connect(address))
    imports.join()
    try:
        yield
    except BaseException:
        if _begun and _begun.pop():
            import ray

            ray.shutdown()
        raise
