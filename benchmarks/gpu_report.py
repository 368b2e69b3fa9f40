"""Writes gpu_check.json from what gpu_check.sh has recorded so far; it calls this after each part.

    python benchmarks/gpu_report.py FOLDER STEPS ABOUT

STEPS has a line for each part: name, status (or "skipped"), seconds, limit in seconds, where
its output begins and ends in FOLDER/gpu_check.log, and its command or why it was skipped.
ABOUT has lines of a name and a value. The file is replaced at once, so that it can be read at
any moment.
"""

import json
import os
import pathlib
import sys

_TAIL_LINES = 60


def _steps(log: pathlib.Path, lines: list[str]) -> list[dict[str, object]]:
    output = log.read_bytes() if log.exists() else b""
    steps = []
    for line in lines:
        name, status, seconds, limit_s, begin, end, command = line.split("\t", 6)
        text = output[int(begin) : int(end)].decode(errors="replace")
        skipped = status == "skipped"
        steps.append(
            {
                "name": name,
                "status": None if skipped else int(status),
                "skipped": command if skipped else None,
                "timed_out": status in ("124", "137"),
                "seconds": float(seconds),
                "limit_s": int(limit_s),
                "command": None if skipped else command,
                "output_tail": text.splitlines()[-_TAIL_LINES:],
            }
        )
    return steps


def main(folder: str, steps: str, about: str) -> None:
    """Does what the module says."""
    out = pathlib.Path(folder)
    lines = pathlib.Path(steps).read_text().splitlines()
    facts = dict(line.split("\t", 1) for line in pathlib.Path(about).read_text().splitlines())
    report = {**facts, "steps": _steps(out / "gpu_check.log", lines)}
    unfinished = out / "gpu_check.json.part"
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, out / "gpu_check.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
