"""What fixed absolute positions at the input are worth: the quickstart's training with them and without.

.venv/bin/python -m bench.positions --data=quickstart/encoded/128 [--steps=900]

Rotary positions alone let attention see where tokens stand to each other; whether that suffices is what this measures. Writes
bench/results/positions-DEVICE.json: the gate's numbers of both models.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from bench import gate_power
from configs import quickstart
from encode import commandline
from jaxdit import metrics, model, validate

DATA = flags.DEFINE_string("data", None, "The encoded demo photographs.", required=True)
STEPS = flags.DEFINE_integer("steps", 900, "Steps of each training.")


def run(folder: Path) -> dict:
    """Train and judge one model."""
    config = quickstart.get_config()
    config.data.path = DATA.value
    config.train.total_steps = STEPS.value
    config.optim.warmup_steps = min(config.optim.warmup_steps, STEPS.value // 10)
    began = time.monotonic()
    gate_power.to_the_end(config, folder)
    seconds = time.monotonic() - began
    gate = validate.gate(folder, folder / "gate")
    rows = metrics.read(folder)
    late = [row["loss"] for row in rows[-4:]]
    return (
        {"seconds": round(seconds, 1), "loss": sum(late) / len(late)}
        | gate["averaged"]
        | {"verdict": gate["verdict"], "failed": gate["failed"]}
    )


def main() -> int:
    absolute = model.position_embedding
    result = {"device": f"{jax.devices()[0].device_kind}, {platform.machine()}", "steps": STEPS.value}
    with tempfile.TemporaryDirectory() as folder:
        result["rotary and absolute"] = run(Path(folder) / "both")
        model.position_embedding = lambda height, width, size: jnp.zeros((height * width, size))
        result["rotary alone"] = run(Path(folder) / "rotary")
        model.position_embedding = absolute
    path = (
        Path(__file__).parent / "results" / f"positions-{jax.devices()[0].device_kind.replace(' ', '-').lower()}.json"
    )
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    commandline.run(main)
