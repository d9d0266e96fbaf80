"""Encode a small folder of captioned pictures with the embedded encoders: no download, a minute on two cores.

python -m encode.main --config=configs/encode_demo.py --config.images=DIR --config.out=DIR
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.images = ""  # the folder of photographs; never written to
    config.out = ""  # OUT: one data set a resolution, quarantine.jsonl, report.html
    config.resolutions = (128,)
    config.seed = 0  # which of several captions; which samples the report shows
    config.max_buckets = 5  # chosen from the photographs' own shapes
    config.buckets = ()  # or named: ((128, 128), (144, 112)), in pixels at the largest resolution
    config.max_pixels = 120_000_000  # more are quarantined before a byte is decoded
    config.max_distortion = 1.5  # a picture stretched further than this is quarantined, or padded
    config.pad = False  # fill a bucket up with noise, masked out of the loss, instead of quarantine
    config.max_upscale = 2.0  # a picture that must be enlarged further is left out at that resolution
    config.shard_size = 1000  # pictures; what is repeated after a stop, and what one machine of many takes at a time
    config.batch_size = 16  # pictures that the encoders take at once
    config.decode_workers = 0  # processes that read pictures ahead; 0: one a core
    config.decode_seconds = 60.0  # a file that takes longer is quarantined
    config.decode_memory = 4096  # MiB; so is one that takes more
    config.flip = True  # encode mirror images with swapped captions as well
    config.accept_captions = False  # encode the shards again whose captions were mended since
    config.engine = "local"  # or "ray": many machines, docs/many_machines.md says how and what the next line means
    config.ray = ConfigDict({"actors": 0, "gpus": -1.0, "cpus": 0})

    # name: demo or flux, t5, dinov3; path: a folder, or a repository's id; dtype: bfloat16 or float32, of the model's products.
    config.vae = ConfigDict({"name": "demo", "path": "", "dtype": "float32"})
    # max_tokens: what is longer is cut, and counted on the page.
    config.text = ConfigDict({"name": "demo", "path": "", "max_tokens": 64, "dtype": "float32"})
    # area: pixels that a picture is scaled to, whole; precomputed: load no model and take NAME.dino.npy beside a picture, or the
    # list under "dino" of NAME.json (for the mirrored one NAME.dino_flip.npy).
    config.vision = ConfigDict({"name": "demo", "path": "", "area": 128 * 128, "precomputed": False})
    return config
