"""Do the examples on real files improve on the base model?

    python -m benchmarks.real_files FOLDER [SEED ...]

FOLDER holds ag_news.csv, e2e_devset.csv and gsm8k_train.jsonl. Every seed (default 0 1 2) in one process without Ray,
all examples with a seed before the next. Rows that stand in results/real_files.json are kept, not measured again:
remove the file to measure all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, commit, parser, publish

ROOT = Path(__file__).parent.parent
FILES = {"ag_news": "ag_news.csv", "e2e": "e2e_devset.csv", "gsm8k": "gsm8k_train.jsonl"}


def main(folder: Path, seeds: list[int]) -> None:
    """Runs every example with every seed; publishes after each run."""
    kept = RESULTS / "real_files.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.exists() else []
    for seed in seeds:
        for example, file in FILES.items():
            if any((row["example"], row["seed"]) == (example, seed) for row in rows):
                continue
            with tempfile.TemporaryDirectory() as place:
                command = [
                    sys.executable, "-m", "fedpipe_ray", "run", f"examples/{example}.yaml",
                    f"data.source={folder / file}", f"seed={seed}", "fleet.ray=false", "local.threads=2",
                    "--out", f"{place}/run",
                ]  # fmt: skip
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                summary = json.loads((Path(place) / "run" / "summary.json").read_text())
            before, after = summary["base"]["global"], summary["tuned"]["global"]
            metric = "accuracy" if "accuracy" in after else "perplexity"
            rows.append({
                "example": example, "seed": seed, "base loss": before["loss"], "tuned loss": after["loss"],
                "metric": metric, "base": before[metric], "tuned": after[metric],
                "rounds s": summary["totals"]["wall_seconds"], "commit": commit(),
            })  # fmt: skip
            rows.sort(key=lambda row: (row["example"], row["seed"]))
            publish("real_files", "Examples on real files: test rows, mean over the edges", rows)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("folder", type=Path, metavar="FOLDER")
    options.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], metavar="SEED")
    given = options.parse_args()
    main(given.folder.resolve(), given.seeds)
