"""The trained model without JAX: `DiT` in model.py, and in pipeline.py what draws pictures with it."""

from torch_dit.model import DiT

__all__ = ["DiT"]
