"""Whether this machine's GPU can be trusted with encoding, without any download: models of the real sizes, random weights.

    python -m encode.selftest [--device=auto] [--dtype=bfloat16] [--rounds=200]

The proof is the one that every run of encode begins with (devices.py), here over and over: some faults show only after hundreds
of pictures. T5 and DINOv3 have two layers in place of twenty-four.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from absl import flags

from encode import commandline, devices
from encode.devices import Attention, DeviceEncoder, EncoderFailed
from encode.prepare import Resizing
from encode.torch_encoders import DINOv3Vision, FluxVAE, T5Text


def main() -> int:
    device, dtype = devices.choose(flags.FLAGS.device), getattr(torch, flags.FLAGS.dtype)
    if device.type in devices.REFERENCE:
        return commandline.fail(
            "no GPU is seen by PyTorch (the CPU is the reference and needs no proof): launch/setup_strix_halo.sh installs "
            "a build for AMD, JAXDIT_CUDA=yes before launch/quickstart.sh one for NVIDIA.",
            2,
        )
    print(f"Self-test on {devices.describe(device)}, {flags.FLAGS.dtype}, PyTorch {torch.__version__}.", flush=True)
    code = 0
    for make, work, unit in (
        (vae, _pictures, "pictures of 512x512"),
        (text, _captions, "captions"),
        (vision, _pictures, "pictures"),
    ):
        try:
            print(judge(make(dtype, device), work, unit, flags.FLAGS.rounds), flush=True)
        except EncoderFailed as error:
            code = commandline.fail(str(error))
    print("Every model agrees with the CPU." if code == 0 else "This device must not encode as it is now.")
    return code


def judge(encoder: DeviceEncoder, work: Callable[[], list], unit: str, rounds: int) -> str:
    """What `rounds` proofs found, and how fast the encoder is between them.

    Raises:
      EncoderFailed: in one of them the device and the CPU differed.
    """
    worst: dict[str, float] = {}
    for _ in range(rounds):
        for what, error in encoder.prove().items():
            worst[what] = max(error, worst.get(what, 0.0))
    inputs, seconds = work(), []
    for _ in range(4):
        began = time.monotonic()
        encoder.encode(inputs)
        seconds.append(time.monotonic() - began)
    errors = ", ".join(f"{what} {error:.2%}" for what, error in worst.items())
    rate = len(inputs) / min(seconds)
    return f"{encoder.model}: {rounds} rounds agree with the CPU (largest error: {errors}); {rate:.1f} {unit} a second."


def vae(dtype: torch.dtype, device: torch.device) -> FluxVAE:
    import diffusers

    widths = (128, 256, 512, 512)
    module = diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _begin(FluxVAE, module, dtype, device, attention=Attention(1, widths[-1], 4096))


def text(dtype: torch.dtype, device: torch.device) -> T5Text:
    import transformers

    config = transformers.T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=2, num_heads=16, vocab_size=256)
    module = transformers.T5EncoderModel(config)
    attention = Attention(16, 64, 512, bias=True)
    return _begin(T5Text, module, dtype, device, attention=attention, max_tokens=512, _tokenizer=_Bytes())


def vision(dtype: torch.dtype, device: torch.device) -> DINOv3Vision:
    import transformers

    config = transformers.DINOv3ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, num_register_tokens=4
    )
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255}
    given = {"width": 1024, "resizing": Resizing(512 * 512, 16, 2), "_settings": settings}
    return _begin(
        DINOv3Vision, transformers.DINOv3ViTModel(config), dtype, device, attention=Attention(16, 64, 1029), **given
    )


def _begin(kind: type, module: torch.nn.Module, dtype: torch.dtype, device: torch.device, **given) -> DeviceEncoder:
    """An encoder around a module that was not loaded."""
    encoder = kind.__new__(kind)
    vars(encoder).update(given)
    encoder._start(module, dtype, device)
    return encoder


class _Bytes:
    """In place of a tokenizer: a token a byte."""

    pad_token_id = 0

    def __call__(self, caption: str, max_length: int, **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*caption.encode()[: max_length - 1], 1])


def _pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3), np.uint8)


def _captions() -> list[str]:
    return ["A tall tree on the left, and a figure that bows low beside it. " * 3] * 32


if __name__ == "__main__":
    flags.DEFINE_string("device", "auto", "As config.device.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "What the models compute in.")
    flags.DEFINE_integer("rounds", 200, "How often each model is compared with the CPU.", lower_bound=1)
    commandline.run(main)
