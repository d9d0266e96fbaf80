"""Encode photographs for the full model: Flux VAE, T5-Large, DINOv3, at the three resolutions of the run.

    python -m encode.main --config=configs/encode_flux.py --config.images=DIR --config.out=DIR \\
        --config.vae.path=DIR --config.text.path=DIR --config.vision.path=DIR

The paths are folders with the downloaded weights.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.images = ""
    config.out = ""
    config.resolutions = (256, 512, 1024)
    config.seed = 0
    config.max_buckets = 12
    config.buckets = ()
    config.max_pixels = 200_000_000
    config.max_distortion = 1.25
    config.pad = False
    config.max_upscale = 1.5
    config.shard_size = 1000
    config.batch_size = 8
    config.decode_workers = 0
    config.decode_seconds = 60.0
    config.decode_memory = 6144
    config.flip = True

    config.vae = ConfigDict({"name": "flux", "path": "", "dtype": "bfloat16"})
    config.text = ConfigDict({"name": "t5", "path": "", "max_tokens": 512, "dtype": "bfloat16"})
    config.vision = ConfigDict({"name": "dinov3", "path": "", "area": 512 * 512, "precomputed": False})
    return config
