"""The Diffusion Transformer of jaxdit as one PyTorch module: nothing but torch is needed to run what was trained.

Time and a vision vector enter through adaLN-Zero (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"),
text through cross-attention (Chen et al. 2023, PixArt-alpha), queries and keys are RMS-normalised (Esser et al. 2024),
positions are axial rotary ones (Su et al. 2021; Heo et al. 2024) and fixed sines and cosines at the input. The model predicts
the velocity noise - x0 of the straight path x_t = (1 - t) x0 + t noise (Liu et al. 2022, "Flow Straight and Fast").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FREQUENCIES = 256
POSITION_RANGE = 64.0  # a square picture spans this many units of position at every resolution
POSITION_THETA = 100.0  # the slowest rotation is 1 / 100 radians a unit
EPS = 1e-6  # of every norm


class DiT(nn.Module):
    """Velocity of a latent, given time, text tokens and a vision vector.

    Parameters are created in float32. For bfloat16 products run it under `torch.autocast`: the weights stay float32.

    Args:
      layers, width, heads: of the transformer; width / heads is a multiple of 4.
      patch: side of a patch in latent pixels.
      channels: of the latent.
      text_width: of a text token, e.g. 1024 for T5-Large.
      vision_width: of the vision vector, e.g. 768 for DINOv3 ViT-B.

    Raises:
      ValueError: heads do not divide the width into multiples of 4.
    """

    def __init__(
        self, *, layers: int, width: int, heads: int, patch: int, channels: int, text_width: int, vision_width: int
    ):
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width={width} does not divide into heads={heads} of a multiple of 4.")
        self.patch = patch
        self.head_size = width // heads
        self.patch_in = nn.Linear(patch * patch * channels, width)
        self.time_in = nn.Linear(TIME_FREQUENCIES, width)
        self.time_out = nn.Linear(width, width)
        self.vision_in = nn.Linear(vision_width, width)
        self.vision_out = nn.Linear(width, width)
        self.text_in = nn.Linear(text_width, width)
        self.text_norm = RMSNorm(width, eps=EPS)
        self.null_vision = nn.Parameter(torch.empty(vision_width))
        self.null_text = nn.Parameter(torch.empty(text_width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch * patch * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases; what adds to the residual stream starts at zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.cross_attention.out.weight)
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.normal_(self.null_vision)
        nn.init.normal_(self.null_text)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_length: Tensor,
        vision: Tensor,
        drop_text: Tensor | None = None,
        drop_vision: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
          x: [batch, channels, height, width] x_t, sides divisible by the patch.
          t: [batch] in [0, 1]; 0 is data, 1 is noise.
          text: [batch, tokens, text_width], left-aligned; what stands behind a sample's length has no influence.
          text_length: [batch] integers, 1 <= length <= tokens.
          vision: [batch, vision_width].
          drop_text, drop_vision: [batch] bool, where the learned null condition is used instead; None: nowhere.

        Returns:
          [batch, channels, height, width] in x's dtype.
        """
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        condition = F.silu(self._time(t, x.dtype) + self._vision(vision, drop_vision))
        text, mask = self._text(text, text_length, drop_text)
        places = positions(rows, columns, device=x.device, dtype=at_least_float32(x.dtype))
        h = self.patch_in(patchify(x, self.patch))
        h = h + position_embedding(places, h.shape[-1]).type_as(h)
        rotation = axial_angles(places, self.head_size // 4)
        for block in self.blocks:
            h = block(h, condition, text, mask, rotation)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, -1)
        h = self.patch_out(modulate(h, shift, scale))
        return unpatchify(h, rows, columns, self.patch).type_as(x)

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.time_out(F.silu(self.time_in(time_embedding(t).to(dtype))))

    def _vision(self, vision: Tensor, drop: Tensor | None) -> Tensor:
        if drop is not None:
            vision = torch.where(drop[:, None], self.null_vision, vision)
        return self.vision_out(F.silu(self.vision_in(vision)))

    def _text(self, text: Tensor, length: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text at the model's width and which tokens count, [b, 1, 1, l]; a dropped sample has one token, the null text."""
        if drop is not None:
            text = torch.where(drop[:, None, None], self.null_text, text)
            length = torch.where(drop, 1, length)
        valid = torch.arange(text.shape[1], device=text.device) < length[:, None]
        return self.text_norm(self.text_in(text)), valid[:, None, None]


class Block(nn.Module):
    """x += gate self_attention(adaLN x); x += cross_attention(norm x, text); x += gate mlp(adaLN x)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.self_attention = Attention(width, heads)
        self.cross_norm = RMSNorm(width, eps=EPS)
        self.cross_attention = Attention(width, heads)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor, text_mask: Tensor, rotation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        h = modulate(x, shift1, scale1)
        x = x + gate1 * self.self_attention(h, h, rotation=rotation)
        x = x + self.cross_attention(self.cross_norm(x), text, mask=text_mask)
        h = F.gelu(self.mlp_in(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.mlp_out(h)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; keys and values come from `context`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)  # the keys of all heads, then the values of all heads
        self.query_norm = RMSNorm(width // heads, eps=EPS)
        self.key_norm = RMSNorm(width // heads, eps=EPS)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor, *, rotation: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x [b, n, d], context [b, m, d], rotation [n, head_size / 2] angles, mask [b, 1, 1, m] -> [b, n, d]."""
        key, value = self.key_value(context).chunk(2, -1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(x), key, value)
        )
        query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in the weight's dtype: under autocast that is float32, whatever the products run in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then times (1 + scale) plus shift; x is [b, n, d], the others [b, 1, d]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Angles reach 1000 radians: in bfloat16 nothing of them would be left."""
    return torch.promote_types(dtype, torch.float32)


def time_embedding(t: Tensor) -> Tensor:
    """[b, 256] cosines, then sines, of 1000 t at frequencies from 1 to 1/10,000 (Vaswani et al. 2017)."""
    half = TIME_FREQUENCIES // 2
    t = t.to(at_least_float32(t.dtype))
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10_000) / half))
    angles = 1000 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def positions(rows: int, columns: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[rows * columns, 2] (row, column) of each token, centred, scaled so that sqrt(rows * columns) spans 64 units."""
    unit = POSITION_RANGE / math.sqrt(rows * columns)
    axes = [(torch.arange(size, device=device, dtype=dtype) - (size - 1) / 2) * unit for size in (rows, columns)]
    return torch.cartesian_prod(*axes)


def axial_angles(places: Tensor, frequencies: int) -> Tensor:
    """[n, 2 * frequencies]: each row coordinate times every frequency, then each column coordinate."""
    exponents = torch.arange(frequencies, device=places.device, dtype=places.dtype) / frequencies
    return (places[:, :, None] * POSITION_THETA**-exponents).flatten(1)


def position_embedding(places: Tensor, size: int) -> Tensor:
    """[n, size] sines, then cosines, of the places' angles."""
    angles = axial_angles(places, size // 4)
    return torch.cat([angles.sin(), angles.cos()], -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of x [b, heads, n, head_size] by its angle [n, head_size / 2]; keeps the dtype."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).type_as(x)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[b, c, h, w] -> [b, h/p * w/p, p * p * c]: patches in row-major order, (row, column, channel) within a patch."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `patchify` for a grid of rows x columns patches."""
    x = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, rows * patch, columns * patch)
