"""Workers of a cluster on this machine as forks of one process, the zygote, that has imported what all of them need.

A worker that imports torch, transformers and peft for itself takes seconds of CPU and hundreds of MiB. Forks share that
memory until they write to it. Ray starts a worker with the command in `runtime_env["py_executable"]`: that is this file
as a script, which hands its arguments, environment and standard files to the zygote and stays until the worker ends. If
the zygote is gone, it becomes an ordinary worker itself.

Linux only, and not for edges with a GPU: CUDA does not survive a fork.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
from typing import Any

PRELOADED = ("torch", "transformers", "peft")  # not ray: it reads a worker's environment while it is imported
WAIT_SECONDS = 60.0  # for the zygote to listen


def serve(path: str) -> None:
    """Imports, then forks a worker for everyone who asks at `path`; ends with its standard input."""
    import gc
    import logging
    import signal
    from importlib import import_module

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that end are nobody's to wait for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in fedpipe_ray/__init__.py
    gc.disable()
    for name in PRELOADED:
        import_module(name)
    gc.enable()
    gc.freeze()  # or the first collection in a worker would write to every object, and so copy it
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        request, files = received(connection)
        if request and os.fork() == 0:
            listener.close()
            become(request, files, connection)
        for file in files:
            os.close(file)
        connection.close()


def received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """(what a new worker is to be, its standard files); ({}, files) if whoever asked has gone away."""
    files: list[int] = []
    try:
        header, files, _, _ = socket.recv_fds(connection, 4, 3)
        left, parts = struct.unpack("<I", header)[0], []
        while left and (part := connection.recv(left)):
            parts.append(part)
            left -= len(part)
    except (OSError, struct.error):
        return {}, files
    return ({} if left else json.loads(b"".join(parts))), files


def become(request: dict[str, Any], files: list[int], connection: socket.socket) -> None:
    """This process runs the worker's script, and ends with it. The connection closes then, if not before."""
    import atexit
    import random
    import runpy
    import signal
    import traceback

    import numpy as np
    import torch

    code: Any = 1
    try:
        os.setsid()  # what is done to the process group of a worker is not done to the zygote's
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        random.seed()
        np.random.seed()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))  # of a later value torch knows nothing
        own = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place not in sys.path]
        script, *arguments = request["arguments"]
        sys.path[:0] = [os.path.dirname(script), *filter(None, own)]
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
        os._exit(code if isinstance(code, int) else 1)


def ask(path: str, arguments: list[str]) -> None:
    """Has the zygote at `path` fork a worker, and returns when that has ended; or becomes one, if nobody is there."""
    import time

    connection, deadline = socket.socket(socket.AF_UNIX), time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.connect(path)
            break
        except ConnectionRefusedError:
            os.execv(sys.executable, [sys.executable, *arguments])
        except OSError:  # not there yet, or not any more
            if time.monotonic() > deadline or not os.path.isdir(os.path.dirname(path)):
                os.execv(sys.executable, [sys.executable, *arguments])
            time.sleep(0.02)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    content = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("<I", len(content))], [0, 1, 2])
    connection.sendall(content)
    while connection.recv(1):
        pass


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[2], sys.argv[3:])
