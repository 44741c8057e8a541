"""How long until something answers? Targets: `import fedpipe_ray` 0.1 s, `fedpipe --help` 0.5 s, 4 edges 12 s.

    python -m benchmarks.start_up

The edges: four of the built-in model (in the cache), an actor each on two cores, from an empty process until all are
ready: imports, Ray, the actors' imports, model, rows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from benchmarks.table import parser, publish

WHAT = {
    "python -c pass": ["-c", "pass"],
    "import fedpipe_ray": ["-c", "import fedpipe_ray"],
    "fedpipe --help": ["-m", "fedpipe_ray", "--help"],
    "a misspelt key, until the message": ["-m", "fedpipe_ray", "check", "examples/quickstart.yaml", "roundz=3"],
}
FLEET = """
import time
began = time.perf_counter()
from clusters import find_profiles
from fedpipe_ray.config import load_run
from pathlib import Path
overrides = ["fleet.profiles=null", "fleet.edges={EDGES}", "evaluate.rows=20"]
run = load_run(Path("examples/quickstart.yaml"), overrides, find_profiles)
from actors.connect import starting
with starting(None):
    from fedpipe_ray.run import settled
    run, method = settled(run)
from actors.fleet import RayFleet
fleet = RayFleet(run, method)
assert len(fleet.open()) == 4
print(time.perf_counter() - began)
fleet.close()
""".replace("EDGES", ", ".join(f"e{i}: {{cpus: 0.25, data: 'builtin:docstrings/numpy'}}" for i in range(4)))


def main() -> None:
    """Measures each command in a process of its own."""
    parser(__doc__).parse_args()
    rows = []
    for name, arguments in {**WHAT, "4 edges, until all are ready": ["-c", FLEET]}.items():
        seconds = []
        for _ in range(9 if arguments[-1] != FLEET else 3):
            began = time.perf_counter()
            ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
            seconds.append(float(ended.stdout) if arguments[-1] == FLEET else time.perf_counter() - began)
        rows.append({"what": name, "seconds, median": median(seconds), "best": min(seconds), "worst": max(seconds)})
    publish("start_up", "Start-up", rows, repeats="9, edges 3")


if __name__ == "__main__":
    main()
