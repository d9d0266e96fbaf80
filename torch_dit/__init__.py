"""The trained model without JAX: `DiT` in model.py, the way from and to jaxdit's parameters in convert.py."""

from torch_dit.model import DiT

__all__ = ["DiT"]
