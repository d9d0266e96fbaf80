"""Which device the models run on, and the proof that it computes there what the CPU computes.

Some builds for GPUs have returned zeros from attention, and corrupt pictures after the first hundreds. So a model on anything
but the CPU first gives the answers that it gave on the CPU in float32, and again once in a thousand inputs, before
the batch in hand is given out. Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from encode.records import InputError

REFERENCE = ("cpu",)  # kinds of device that are believed; the others are compared with it
PROVE_EVERY = 1000  # inputs
LARGEST_ERROR = 0.2  # relative; at the real sizes bfloat16 gives up to 0.06, and a kernel that is wrong is far above


class EncoderFailed(RuntimeError):
    """The device gives other answers than the CPU: nothing that it says may be stored."""


@dataclass(frozen=True)
class Attention:
    """The shape of a model's attention; kernels are chosen by it (512 a head, the VAE's, has been wrong alone)."""

    heads: int
    size: int
    tokens: int
    bias: bool = False


def choose(name: str = "auto") -> torch.device:
    """The device that config.device names; "auto" takes the first of cuda (ROCm calls itself so as well), mps, cpu.

    Raises:
      InputError: there is no such device here.
    """
    if name == "auto":
        return torch.device(next((kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"config.device={name!r}: unknown; the choices are auto, cpu, cuda, cuda:1, mps.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    module = getattr(torch, device.type, None)
    if not hasattr(module, "is_available") or not module.is_available():
        raise InputError(
            f"config.device={name}: this PyTorch ({torch.__version__}) sees no such device; choose auto or cpu, or install "
            "the build of PyTorch for it (docs/strix_halo.md for AMD)."
        )
    if (device.index or 0) >= module.device_count():
        raise InputError(f"config.device={name}: there are {module.device_count()}, counted from {device.type}:0.")
    return device


def describe(device: torch.device) -> str:
    """As a person knows it: the CPU, NVIDIA GeForce RTX 4090 (cuda)."""
    if device.type == "cpu":
        return "the CPU"
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


class DeviceEncoder:
    """A module on its device in its dtype.

    Subclasses define `model`, `attention`, and `_probe`: a fixed input through the module -> named float arrays.
    """

    model: str
    attention: Attention | None = None

    def _start(self, module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Take a module that is on the CPU in float32: note what it answers there, and bring it to its device."""
        self._device, self._dtype = torch.device("cpu"), torch.float32
        self._module = module.eval().requires_grad_(False)
        self._expected = self._answers(dtype, plain=True) if device.type not in REFERENCE else None
        if device.type != "cpu":
            _refuse_dtype(dtype, device)
        torch.nn.Module.to(module, device, dtype)  # diffusers' own `to` warns of nothing
        self._device, self._dtype = device, dtype
        self._until_proof = 0
        self.runs = self.model, describe(device), str(dtype).removeprefix("torch.")

    def prove(self) -> dict[str, float]:
        """Compare the device's answers with the CPU's; gives the relative error of each.

        Raises:
          EncoderFailed: they differ.
        """
        self._until_proof, errors = PROVE_EVERY, {}
        if self._expected is None:
            return errors
        for what, answer in self._answers(self._dtype, plain=False).items():
            errors[what] = relative_error(answer, self._expected[what])
            if not errors[what] <= LARGEST_ERROR:
                words = f"off by {errors[what]:.0%}, {LARGEST_ERROR:.0%} is the limit"
                words = words if answer.any() else "zero everywhere"
                self._fail(f"{what} is {words if np.isfinite(answer).all() else 'not finite'}, compared with the CPU")
        return errors

    def _proven(self, results: Sequence[np.ndarray]) -> None:
        """Called with every batch's results, one an input, before they are given out; once in a while it proves the device."""
        for result in results:
            if not np.isfinite(result).all():
                self._fail("a result is not finite")
            if not result.any():
                self._fail("a result is zero everywhere")
        self._until_proof -= len(results)
        if self._until_proof <= 0:
            self.prove()

    def _fail(self, what: str) -> None:
        raise EncoderFailed(
            f"{self.model} on {describe(self._device)}: {what}; the driver or the build of PyTorch is at fault, and nothing "
            "of this batch is stored. Run with --config.device=cpu, or change the build."
            if self._device.type != "cpu"
            else f"{self.model} on the CPU: {what}; its weights are damaged."
        )

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it where it can copy by itself."""
        tensor = torch.tensor(np.ascontiguousarray(values))
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    def _answers(self, dtype: torch.dtype, plain: bool) -> dict[str, np.ndarray]:
        shape = self.attention  # first: where it is wrong, all else is
        found = {} if shape is None else {"attention": attention_answer(shape, dtype, self._device, plain)}
        return found | self._probe()

    def _probe(self) -> dict[str, np.ndarray]:
        raise NotImplementedError


@torch.inference_mode()
def attention_answer(shape: Attention, dtype: torch.dtype, device: torch.device, plain: bool) -> np.ndarray:
    """[2, heads, tokens, size] attention over fixed numbers of that dtype: by the formula in float32, or by the device."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=random).to(dtype)  # noqa: E731
    query, key, value = (normal(2, shape.heads, shape.tokens, shape.size) for _ in range(3))
    bias = normal(2, shape.heads, shape.tokens, shape.tokens) if shape.bias else None
    if bias is not None:
        bias[1, :, :, shape.tokens // 2 :] = torch.finfo(dtype).min  # as padding is masked
    if plain:
        scores = query.float() @ key.float().mT * shape.size**-0.5
        return ((scores if bias is None else scores + bias.float()).softmax(-1) @ value.float()).numpy()
    query, key, value, bias = (None if part is None else part.to(device) for part in (query, key, value, bias))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return found.float().cpu().numpy()


def relative_error(one: np.ndarray, other: np.ndarray) -> float:
    """Size of the difference against the size of `other`; NaN where something is not finite."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _refuse_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """A device may know the type and not compute in it (bfloat16 on older systems of Apple)."""
    try:
        ones = torch.ones(8, 8, dtype=dtype, device=device)
        reason = "" if float((ones @ ones).float().cpu().mean()) == 8 else "ones times ones are wrong"
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise InputError(
            f"config.device={device}: it does not compute in {str(dtype).removeprefix('torch.')} ({reason}); set the dtype of "
            "vae, text and vision to float32, or config.device to cpu."
        )
