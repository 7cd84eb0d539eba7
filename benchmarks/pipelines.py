"""What a shipped pipeline costs as a user runs it: minutes, memory of the largest process, disk.

    python benchmarks/pipelines.py           # half an hour; writes benchmarks/results/pipelines.md
    python benchmarks/pipelines.py --quick   # digits with two epochs a module, writes nothing
    python benchmarks/pipelines.py --json    # one JSON object on stdout

`gim-stage run` in a fresh process and an empty folder, on all cores and with the machine to itself:
the making of the data, training, caches and probes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conditions import conditions

ROOT = Path(__file__).resolve().parent.parent
# Minutes on two cores that were aimed at.
GOALS = {"digits": None, "photos": 10, "speech": 20}


def measure(name: str, *, quick: bool) -> dict[str, Any]:
    """Run one pipeline from nothing."""
    text = (ROOT / "pipelines" / f"{name}.toml").read_text()
    if quick:
        text = re.sub(r"(?m)^max_epochs = \d+", "max_epochs = 2", text)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.toml"
        file.write_text(text)
        program = Path(sys.executable).with_name("gim-stage")
        command = [str(program), "run", str(file), "--quiet", "--json"]
        started = time.monotonic()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read()
            # The largest of the process and those that it has waited for.
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        assert process.returncode == 0, f"{name}: exit code {process.returncode}"
        caches = Path(folder) / "cache"
        size = sum(path.stat().st_size for path in caches.rglob("*") if path.is_file())
    unit = 1 if sys.platform == "darwin" else 1024
    peak = used.ru_maxrss * unit / 1e9
    return {"pipeline": name, "minutes": seconds / 60, "peak_gb": peak, "cache_mb": size / 1e6}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The result as a table."""
    lines = [
        "# What the pipelines cost",
        "",
        "`gim-stage run` from an empty folder, on all cores of an otherwise idle machine: making "
        "the data, training, caches, probes. Memory is that of the largest process, with the "
        "libraries' own; disk is that of the run's folder, with weights and scores. GB = 10^9 "
        "bytes.",
        "",
        "| pipeline | minutes | goal | memory | disk |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        goal = GOALS[row["pipeline"]]
        lines.append(
            f"| {row['pipeline']} | {row['minutes']:.1f} | {'' if goal is None else goal} | "
            f"{row['peak_gb']:.1f} GB | {row['cache_mb']:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    names = ["digits"] if arguments.quick else list(GOALS)
    rows = [measure(name, quick=arguments.quick) for name in names]
    about = conditions()
    table = markdown(rows)
    table += "\nConditions: " + "; ".join(f"{key} {value}" for key, value in about.items()) + ".\n"
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "pipelines.md").write_text(table)
    print(json.dumps({"runs": rows, "conditions": about}, indent=2) if arguments.json else table)


if __name__ == "__main__":
    main()
