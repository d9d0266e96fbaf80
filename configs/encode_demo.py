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
    config.max_buckets = 5
    config.max_pixels = 120_000_000  # more are quarantined before a byte is decoded
    config.max_distortion = 1.5  # a picture stretched further than this is quarantined
    config.shard_size = 1000
    config.batch_size = 16
    config.decode_threads = 2
    config.flip = True  # encode mirror images with swapped captions as well

    config.vae = ConfigDict({"name": "demo", "path": "", "dtype": "float32"})
    config.text = ConfigDict({"name": "demo", "path": "", "max_tokens": 64, "dtype": "float32"})
    config.vision = ConfigDict({"name": "demo", "path": "", "area": 128 * 128, "precomputed": False})
    return config
