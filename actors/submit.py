"""A run as a job of a Ray cluster: its output is shown as it comes, Ctrl-C stops it, its exit code is returned."""

from __future__ import annotations

import asyncio
import http.client
import os
import shlex
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp

from fedpipe_ray.errors import UserError

from .knock import TOKEN_PLACES, own_token

KNOCK_SECONDS = 10
TRIES = 10  # a second apart, to find the job again after the connection broke
STOP_SECONDS = 3600  # what a job asked to stop gets to finish its round and write its checkpoint; Ray itself gives it 3
WINNING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client takes their value rather than its argument


def submit(address: str | None, command: Sequence[str], code: Path, names: Sequence[str]) -> int:
    """Runs `command` on the cluster in a copy of the folder `code`; returns its exit code when it has ended.

    names: of environment variables that it gets. What .rayignore and .gitignore name is not sent. Raises UserError if
    one is not set, or the cluster cannot be reached, or refuses.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: not set here; export {missing[0]}=..., or leave it out")
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `connect` has it
    address = (address or os.environ.get(WINNING[0]) or "").rstrip("/")
    knock(address)
    for name in WINNING:
        os.environ.pop(name, None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **{name: os.environ[name] for name in names}}
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=f"exec {shlex.join(command)}", runtime_env={"working_dir": str(code), "env_vars": variables}
        )
    except AuthenticationError as error:
        raise UserError(f"--address {address} refuses this process's token; give its own in {TOKEN_PLACES}") from error
    except (OSError, RuntimeError, ValueError) as error:  # no Ray, another version, refused, a package too large
        raise UserError(
            f"--address {address}: the job was not taken: {str(error).splitlines()[0]} "
            f"(if {code} is too large, name in .rayignore what is not needed)"
        ) from None
    return asyncio.run(Follower(client, job, address).follow())


def knock(address: str) -> None:
    """Raises UserError unless a dashboard answers at `address` that takes our settings; Ray might wait for minutes.

    A token is not shown to a cluster that asks for none: whoever stands there would read it.
    """
    if not address.startswith(("http://", "https://")):
        given = f"{address!r} is not one" if address else "give one"
        raise UserError(f"--address is the URL of the cluster's dashboard, such as http://HOST:8265; {given}")
    status = 200
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=KNOCK_SECONDS).close()
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"--address {address}: nobody answers ({getattr(error, 'reason', error)}); is the dashboard there, with "
            "--dashboard-host, and the port open? Through a tunnel: ssh -L 8265:localhost:8265 HEAD"
        ) from None
    token = os.environ["RAY_AUTH_MODE"] == "token"
    if status == 200 and token:
        raise UserError(
            f"--address {address} has token authentication off, so whoever reaches it can run code on it; start all "
            "its nodes with RAY_AUTH_MODE=token, or accept that by setting RAY_AUTH_MODE=disabled here"
        )
    if status == 401 and not (token and own_token()):
        raise UserError(f"--address {address} asks for a token: RAY_AUTH_MODE=token, and the token in {TOKEN_PLACES}")


class Follower:
    """A job as seen from here. The first Ctrl-C or SIGTERM asks it to stop, the second leaves it alone."""

    def __init__(self, client: Any, job: str, address: str) -> None:
        self.client, self.job, self.address = client, job, address
        self.asked: int | None = None
        self.leave = asyncio.Event()

    async def follow(self) -> int:
        """Until it ends; returns its exit code, or 128 + signal."""
        note(f"job {self.job} at {self.address}; Ctrl-C stops it after its round")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop, number)
        ending = asyncio.create_task(self.output())
        leaving = asyncio.create_task(self.leave.wait())
        await asyncio.wait({ending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            note(f"left; it may still be stopping: ray job status --address {self.address} {self.job}")
            sys.stdout.flush()
            os._exit(128 + (self.asked or 0))  # a request that hangs would hold the interpreter
        leaving.cancel()
        return self.code_of(ending.result())

    def stop(self, number: int) -> None:
        """Answers a signal."""
        if self.asked is not None:
            self.leave.set()
            return
        self.asked = number
        note("asked the job to stop, which it does after its round; once more leaves it alone")
        Thread(target=self.ask, daemon=True).start()

    def ask(self) -> None:
        """Asks the cluster to stop the job."""
        try:
            self.client.stop_job(self.job)
        except (OSError, RuntimeError) as error:
            note(f"cannot stop the job: {error}")

    async def output(self) -> Any:
        """Prints what the job writes until it has ended; returns its details, None if the cluster is lost."""
        printed, failed = 0, 0
        while failed < TRIES:
            seen = 0  # each connection begins at the start of the job's output
            with suppress(RuntimeError, OSError, aiohttp.ClientError):
                async for text in self.client.tail_job_logs(self.job):
                    print(text[max(0, printed - seen) :], end="", flush=True)
                    seen += len(text)
                    printed = max(printed, seen)
            try:
                details = await asyncio.to_thread(self.client.get_job_info, self.job)
                failed = 0
                if details.status.is_terminal():
                    return details
            except (RuntimeError, OSError):
                failed += 1
            await asyncio.sleep(1)
        return None

    def code_of(self, details: Any) -> int:
        """The exit code of a job that has ended."""
        if details is None:
            note(
                f"lost {self.address}; the job may still run there. If its head died, `fedpipe resume` goes on from "
                "the last checkpoint on another cluster, if the run folder is a URL or on a shared disk"
            )
            return 1
        code = details.driver_exit_code
        if code is not None:
            return int(code) if code >= 0 else 128 - int(code)
        if details.status == "STOPPED":
            note("the job was stopped")
            return 128 + (self.asked or signal.SIGTERM)
        note(f"the job did not start: {details.message}")
        return 1


def note(text: str) -> None:
    """A line of ours, beside the job's output."""
    print(f"fedpipe: {text}", file=sys.stderr, flush=True)
