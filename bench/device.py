"""What a benchmark ran on, and where its result goes."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.machine()


def path(name: str, device: str) -> Path:
    """bench/results/NAME-DEVICE.json, or in the folder that JAXDIT_BENCH_RESULTS names."""
    folder = Path(os.environ.get("JAXDIT_BENCH_RESULTS") or Path(__file__).parent / "results")
    return folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def begun(file: Path, module: str, known: dict, **empty) -> dict:
    """What `file` holds of a benchmark that goes on where it stopped; a new result where it was made with another `known`."""
    result = json.loads(file.read_text()) if file.exists() else {}
    if any(result.get(key) != value for key, value in json.loads(json.dumps(known)).items()):
        result = known | {"command": " ".join([f"python -m bench.{module}", *sys.argv[1:]])} | empty
    return result


def write(name: str, device: str, result: dict) -> Path:
    """The file of `path`, also printed."""
    text = json.dumps(result, indent=2)
    file = path(name, device)
    file.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"Written: {file}")
    return file
