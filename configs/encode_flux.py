"""Encode photographs for the full model: Flux VAE, T5-Large, DINOv3, at the three resolutions of the run.

    python -m encode.main --config=configs/encode_flux.py --config.images=DIR --config.out=DIR

A model's path is a folder, or the id of a Hugging Face repository: taken from its cache, and fetched once where it is not
there. DINOv3 (and Flux, where its page asks) wants its terms accepted on its page and `hf auth login` first. What each field is
for stands in configs/encode_demo.py.
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
    config.accept_captions = False
    config.engine = "local"  # or "ray": many machines, docs/many_machines.md
    config.ray = ConfigDict(
        {
            "actors": 0,  # at most; 0: as many as the cluster has room for
            "gpus": -1.0,  # of an actor; -1: one if the cluster has any, else none
            "cpus": 0,  # of an actor, for reading pictures; 0: a node's, divided by its actors
        }
    )

    config.device = "auto"  # cuda (ROCm as well), else mps, else cpu; or one by name: "cuda:1"
    config.vae = ConfigDict({"name": "flux", "path": "black-forest-labs/FLUX.1-schnell", "dtype": "bfloat16"})
    config.text = ConfigDict({"name": "t5", "path": "google-t5/t5-large", "max_tokens": 512, "dtype": "bfloat16"})
    config.vision = ConfigDict(
        {
            "name": "dinov3",
            "path": "facebook/dinov3-vitl16-pretrain-lvd1689m",
            "area": 512 * 512,
            "dtype": "float32",
            "precomputed": False,
        }
    )
    return config
