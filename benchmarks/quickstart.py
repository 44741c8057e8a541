"""How long is the quickstart after installation, and what does it give?

    python -m benchmarks.quickstart

Twice in processes of their own: with an empty cache, then with the base model and the parsed docstrings in it. Targets:
300 s and 150 s on two cores; perplexity on the edges' held-out rows falls by at least 30 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.table import parser, publish

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measures both."""
    parser(__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        env = {**os.environ, "XDG_CACHE_HOME": f"{place}/cache"}
        for cache, target in (("empty", 300), ("warm", 150)):
            out = Path(place) / cache
            began = time.perf_counter()
            command = [sys.executable, "-m", "fedpipe_ray", "run", "examples/quickstart.yaml", "--out", str(out)]
            subprocess.run(command, cwd=ROOT, env=env, check=True)
            seconds = time.perf_counter() - began
            summary = json.loads((out / "summary.json").read_text())
            base, tuned = (summary[key]["global"]["perplexity"] for key in ("base", "tuned"))
            rows.append({
                "cache": cache, "seconds": seconds, "target s": target, "rounds s": summary["totals"]["wall_seconds"],
                "base perplexity": base, "tuned perplexity": tuned, "fall %": 100 * (1 - tuned / base), "target %": 30,
            })  # fmt: skip
            publish("quickstart", "make quickstart, after installation", rows, seed=0)


if __name__ == "__main__":
    main()
