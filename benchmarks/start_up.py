"""How long until something answers? Targets: `import fedpipe_ray` 0.1 s, `fedpipe --help` 0.5 s.

python -m benchmarks.start_up
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from benchmarks.table import publish

WHAT = {
    "python -c pass": ["-c", "pass"],
    "import fedpipe_ray": ["-c", "import fedpipe_ray"],
    "fedpipe --help": ["-m", "fedpipe_ray", "--help"],
    "a misspelt key, until the message": ["-m", "fedpipe_ray", "check", "examples/quickstart.yaml", "roundz=3"],
}


def main() -> None:
    """Measures each command in a process of its own."""
    rows = []
    for name, arguments in WHAT.items():
        seconds = []
        for _ in range(9):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            seconds.append(time.perf_counter() - began)
        rows.append({"what": name, "seconds, median": median(seconds), "best": min(seconds), "worst": max(seconds)})
    publish("start_up", "Start-up", rows, repeats=9)


if __name__ == "__main__":
    main()
