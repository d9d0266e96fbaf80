"""The README's table of training speed, from files of bench/train_step.py.

.venv/bin/python -m bench.table bench/results/train-step-*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import train_step

HEADER = (
    "device",
    "model",
    "pixels",
    "micro-batch",
    "images/s",
    "MFU",
    "GB",
    "the same in PyTorch",
    "PixArt",
    "to PyTorch",
)


def rows(result: Mapping[str, Any]) -> Iterable[list[str]]:
    """A row a case: our best side, and the best of each kind of peers; a dash where nothing ran."""
    model = result["work"].split(",")[0].removeprefix("configs/").replace(".py", "")
    for case in result["cases"]:
        sides = case["sides"]
        names = [[name for name in sides if name.startswith("jaxdit")], train_step.SAME, train_step.PEERS[2:]]
        best = [
            max(
                (sides[name] for name in group if name in sides),
                key=lambda side: side.get("images a second", 0),
                default={},
            )
            for group in names
        ]
        rates = [side.get("images a second") for side in best]
        memory = best[0].get("GB of the device at most", best[0].get("GB resident at most"))
        yield [
            result["device"],
            model,
            str(case["resolution"]),
            str(case["micro-batch"]),
            *(("-" if value is None else f"{value:{form}}") for value, form in (
                (rates[0], ".3g"), (best[0].get("mfu"), ".0%"), (memory, ".3g"), (rates[1], ".3g"), (rates[2], ".3g"),
                (rates[0] / rates[1] if rates[0] and rates[1] else None, ".2f"),
            )),
        ]  # fmt: skip


def main() -> int:
    print("\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ["---"] * len(HEADER))))
    for path in sys.argv[1:]:
        if Path(path).is_file():
            for row in rows(json.loads(Path(path).read_text(encoding="utf-8"))):
                print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
