"""The big run: about 560 M parameters on 100,000 photographs, in three stages of rising resolution.

python -m jaxdit.main --config=configs/full.py:256  --workdir=A --config.data.path=OUT/256  --config.train.gate=NANO
python -m jaxdit.main --config=configs/full.py:512  --workdir=B --config.data.path=OUT/512  --config.train.init_from=A
python -m jaxdit.main --config=configs/full.py:1024 --workdir=C --config.data.path=OUT/1024 --config.train.init_from=B

Plain configs/full.py is 1024 from the first step. "The plan" below is what was intended before anything was measured; python -m
jaxdit.plan is a command, which shows for a card what fits and how long each stage takes.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Resolution: (micro-batch, steps, shift of the timesteps). By estimate three weeks on a 4090 in all: 115, 20 and 2.6 million
# samples in 10, 7 and 5 days. Micro-batches need 20.7 GB of the 21.6 that XLA takes of 24, by jaxdit.plan.
STAGES = {
    # Most samples are seen where they are cheap: a sample at 1024 costs about twenty times one at 256.
    "256": (32, 450_000, 1.0),
    # Four times the pixels need more noise to hide the same composition: shift by sqrt(4) (Esser et al. 2024, sec. 5.3.2).
    "512": (8, 80_000, 2.0),
    # 3.0 is what people preferred at 1024 (Esser et al. 2024, fig. 6).
    "1024": (2, 10_000, 3.0),
    # The plan's run.
    "": (2, 100_000, 1.0),
}


def get_config(arg: str | None = None) -> ConfigDict:
    stage = arg or ""
    if stage not in STAGES:
        raise ValueError(f"configs/full.py:{stage}: no such stage; choose {', '.join(filter(None, STAGES))}.")
    micro_batch, total_steps, shift = STAGES[stage]
    return ConfigDict(
        {
            "data": {
                "path": "",  # OUT/RES of encode.main
                "holdout_fraction": 0.01,  # 1,000 of 100,000 images, of which train.eval_images are judged
                "text_lengths": (),  # one length, the longest caption's: one program a bucket
                "normalize_vision": False,  # whether vision vectors are divided by their length
                "accept_growth": False,  # True takes a data set that has grown or has mended captions since
            },
            "model": {
                "layers": 24,  # the plan: 24 x 1024 with 16 heads, 559 M parameters (DiT-L has this depth and width)
                "width": 1024,
                "heads": 16,  # of 64: cuDNN's fastest head size, and that of DiT and PixArt
                "patch": 2,  # Peebles and Xie 2023: half the patch, better by far; 1 is out of reach
                "dtype": "auto",  # bfloat16 on a GPU
                "remat": "none",  # "block" takes three images where this takes one, and computes a quarter more (jaxdit.plan)
                "scan_unroll": 0,  # no scan on a GPU: a seventh faster, 2 GB more, a minute to compile (H100)
                "fused": False,  # our kernels between the products: 24% fewer bytes a step on a 4090, not yet timed
            },
            "flow": {
                "mean": 0.0,  # of the timesteps, logit-normal, Esser et al. 2024, sec. 3.1
                "std": 1.0,
                "shift": shift,  # above 1: more noise
                "direction": 0.0,  # the plan: squares alone. 1.0 learns faster in small models (docs/measured.md)
                "drop_both": 0.1,  # the plan's three tenths: what guidance over two conditions needs to know
                "drop_text": 0.1,
                "drop_vision": 0.1,
                "flip": 0.5,  # the share of samples that are mirrored, where captions allow it
            },
            "optim": {
                "name": "adamw",  # the plan; small models learn faster by "muon" (docs/measured.md)
                "peak_learning_rate": 3e-4,  # the plan; in later stages a third loses what small pictures won (bench/stages.py)
                "end_learning_rate": 1e-6,  # the plan
                "warmup_steps": placeholder(int),  # None: min(5,000, total // 10), the plan's 5,000 where it is long
                "b1": 0.9,
                "b2": 0.95,  # the plan; 0.999 forgets a spike only after a thousand updates
                "eps": 1e-8,
                "weight_decay": 0.03,  # the plan; on kernels alone
                "clip_norm": 1.0,  # the plan
                "ema_decay": 0.9999,  # the plan; reached at update 90,000, before it the average covers a ninth of the run
            },
            "train": {
                "seed": 0,  # of weights, noise, order
                "total_steps": total_steps,
                "batch_size": 256,  # the plan: DiT's and PixArt's
                "micro_batch": micro_batch,
                "log_every": 20,  # at 1024 an update takes a minute
                "eval_every": 1_000,  # steps between two looks at held-out images
                "eval_images": 512,  # of each split
                "eval_budget": 0.05,  # of the time, evaluation and previews together
                "gate": "needed",  # gate.json of a nano run, or skip; inherited by later stages
                "init_from": "",  # WORKDIR or WORKDIR@STEP of the stage before
                "init_weights": "ema",  # or raw
                "restore": "",  # WORKDIR@STEP: go back, in a new folder
                "deterministic": False,  # True: bit for bit on a GPU too, slower
            },
            # The plan: averaged weights every so many steps; what going on needs every so many minutes, the newest of which stay.
            "checkpoint": {"every": 5_000, "minutes": 30.0, "keep": 2},
            "sample": {
                "steps": 28,  # SD3's default
                "text_guidance": 4.0,
                "vision_guidance": 1.5,
                "shift": max(shift, 1.0),
                "previews": 8,  # pictures at every checkpoint.every
                "prompts": (),  # your own sentences and pictures for the previews; empty: the data set's
                "references": (),
            },
            "mesh": {"data": -1, "fsdp": 1},  # cards: groups (-1: the rest), and how many share one copy of the model
            "metrics": {
                "wandb": "",
                "watts": 450.0,
            },  # ENTITY/PROJECT; the card's limit: measure at the wall for a better number
            "health": {"window": 200, "spike": 8.0, "patience": 8},  # as explained in jaxdit/health.py
        }
    )
