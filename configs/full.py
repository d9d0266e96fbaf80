"""The big run: about 560 M parameters on 100,000 photographs, in three stages of rising resolution.

python -m jaxdit.main --config=configs/full.py:256 --workdir=DIR --config.data.path=OUT/256

Esser et al. 2024 for the timesteps' shift at high resolutions; micro-batches fit 24 GB.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

STAGES = {  # resolution: (micro-batch, steps, shift of the timesteps)
    "256": (64, 400_000, 1.0),
    "512": (16, 150_000, 1.5),
    "1024": (4, 50_000, 3.0),
}


def get_config(arg: str | None = None) -> ConfigDict:
    stage = arg or "256"
    if stage not in STAGES:
        raise ValueError(f"configs/full.py:{stage}: no such stage; choose {', '.join(STAGES)}.")
    micro_batch, total_steps, shift = STAGES[stage]
    return ConfigDict(
        {
            "data": {
                "path": "",
                "holdout_fraction": 0.01,
                "text_lengths": (),
                "normalize_vision": False,
                "accept_growth": False,
            },
            "model": {
                "layers": 24,
                "width": 1024,
                "heads": 16,
                "patch": 2,
                "dtype": "auto",
                "remat": "block",
                "scan_unroll": 1,
            },
            "flow": {
                "mean": 0.0,
                "std": 1.0,
                "shift": shift,
                "drop_both": 0.1,
                "drop_text": 0.1,
                "drop_vision": 0.1,
                "flip": 0.5,
            },
            "optim": {
                "peak_learning_rate": 3e-4,
                "end_learning_rate": 1e-6,
                "warmup_steps": placeholder(int),
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.03,
                "clip_norm": 1.0,
                "ema_decay": 0.9999,
            },
            "train": {
                "seed": 0,
                "total_steps": total_steps,
                "batch_size": 256,
                "micro_batch": micro_batch,
                "log_every": 20,
                "eval_every": 1000,
                "eval_budget": 512,
            },
            "checkpoint": {"every": 5_000, "minutes": 30.0, "keep": 2},
            "sample": {"steps": 28, "text_guidance": 4.0, "vision_guidance": 1.5, "shift": shift},
        }
    )
