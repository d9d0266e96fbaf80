"""A diffusers pipeline for a model that jaxdit trained: a sentence and reference pictures to a picture, without JAX.

    from torch_dit.pipeline import JaxditPipeline          # with the exported folder on sys.path
    pipeline = JaxditPipeline.from_pretrained(FOLDER).to("cuda")
    pipeline("a red boat on the left", reference=Image.open("evening.jpg")).images[0]

Guidance over two conditions: v = v(0,0) + w_vision [v(0,vision) - v(0,0)] + w_text [v(text,vision) - v(0,vision)] (Brooks et
al. 2023, eq. 3); what has no weight is not evaluated. Euler steps of FlowMatchEulerDiscreteScheduler, where sigma is t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from torch_dit import encoders
from torch_dit.model import DiT

TERMS = ((True, True), (True, False), (False, False))  # (drop_text, drop_vision) of the evaluations guidance combines


class DiTModel(DiT, ModelMixin, ConfigMixin):
    """`DiT`, loaded and saved as diffusers does: config.json and diffusion_pytorch_model.safetensors."""

    @register_to_config
    def __init__(
        self, layers: int, width: int, heads: int, patch: int, channels: int, text_width: int, vision_width: int
    ):
        super().__init__(
            layers=layers, width=width, heads=heads, patch=patch, channels=channels, text_width=text_width,
            vision_width=vision_width,
        )  # fmt: skip


class JaxditPipeline(DiffusionPipeline):
    """What draws pictures.

    Args:
      transformer: DiTModel.
      scheduler: FlowMatchEulerDiscreteScheduler with the shift that the model is sampled with.
      vae, text_encoder, tokenizer, image_encoder: AutoencoderKL, T5EncoderModel and its tokenizer, DINOv3; None where they
        are named by `encoders` instead: `load_encoders` fetches them.
      encoders: {"vae", "text", "vision"}: sections as in encoders.py.
      latent_mean, latent_std: of each channel of the training data.
      normalize_vision: vision vectors are scaled to length sqrt(width).
      size: (width, height) in pixels that is drawn where none is asked for.
      steps, guidance_text, guidance_vision: of the configuration that the model was trained with.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "image_encoder"]  # noqa: RUF012

    def __init__(
        self,
        transformer: DiTModel,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        encoders: dict | None = None,
        latent_mean: list | tuple = (0.0,),
        latent_std: list | tuple = (1.0,),
        normalize_vision: bool = False,
        size: list | tuple = (512, 512),
        steps: int = 24,
        guidance_text: float = 1.0,
        guidance_vision: float = 1.0,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
            image_encoder=image_encoder,
        )  # fmt: skip
        self.register_to_config(
            encoders=encoders or {}, latent_mean=list(latent_mean), latent_std=list(latent_std), size=list(size), steps=steps,
            normalize_vision=normalize_vision, guidance_text=guidance_text, guidance_vision=guidance_vision,
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> JaxditPipeline:
        """As of any diffusers pipeline; encoders that are not in the folder come from where its model_index.json says."""
        pipeline = super().from_pretrained(folder, **{"low_cpu_mem_usage": is_accelerate_available()} | options)
        pipeline.load_encoders()
        return pipeline

    def load_encoders(self) -> None:
        """Fetch the encoders that are missing, and let all of them compute as they did over the training data.

        Raises:
          ValueError: one cannot be had, or is not the one that the model was trained with.
        """
        for kind, names in encoders.COMPONENTS.items():
            section = self.config.encoders[kind]
            missing = [name for name in names if getattr(self, name) is None]
            found = encoders.load(kind, section) if missing else {}
            self.register_modules(**{name: found[name] for name in missing if name in found})
            module = getattr(self, names[0])
            if module is not None:
                torch.nn.Module.to(module.eval(), encoders.dtype(section))  # diffusers' own warns of nothing

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        reference: Any = None,
        reference_weights: Sequence[float] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_text: float | None = None,
        guidance_vision: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw.

        Args:
          prompt: a sentence, or several; "" is none.
          reference: a picture whose feeling is wanted (PIL image, or [height, width, 3] uint8), or its vector; or a list of them,
            which are mixed. None: no reference. It is the same for all prompts.
          reference_weights: of the list, from 0 up; None: equal ones.
          width, height: in pixels, multiples of 8 x patch; by default the configuration's size.
          num_inference_steps: one to three evaluations of the model each.
          guidance_text, guidance_vision: weights; 1 guides nothing.
          num_images_per_prompt: pictures of each prompt.
          generator: of the noise; one a picture makes a picture independent of its batch.
          latents: [pictures, channels, height / 8, width / 8] standard normal noise, instead of the generator's.
          output_type: "pil", "np" ([pictures, height, width, 3] in [0, 1]), or "latent" (raw, as the VAE decodes them).
          return_dict: False gives a tuple.

        Raises:
          ValueError: a size or weight that cannot be.
        """
        config, device = self.config, self._execution_device
        prompts = [one.strip() for one in ([prompt] if isinstance(prompt, str) else prompt)]
        width, height = width or config.size[0], height or config.size[1]
        unit = 8 * self.transformer.config.patch
        if width % unit or height % unit or min(width, height) < unit:
            raise ValueError(f"a picture of {width}x{height}: both sides must be multiples of {unit} pixels.")
        vision = self._vision(reference, reference_weights)
        given, absent = self._conditions(prompts, vision, num_images_per_prompt)
        text_weight = config.guidance_text if guidance_text is None else guidance_text
        vision_weight = config.guidance_vision if guidance_vision is None else guidance_vision
        if vision is None:  # guidance by a condition that no picture has comes to nothing: fewer evaluations
            vision_weight = 1.0
        if not any(prompts):
            text_weight = vision_weight
        weights = 1 - vision_weight, vision_weight - text_weight, text_weight
        terms = [(drops, weight) for drops, weight in zip(TERMS, weights) if weight]
        shape = (len(given["text"]), self.transformer.config.channels, height // 8, width // 8)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, {shape} is wanted.")
        x = latents.to(device, torch.float32)
        steps = config.steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        for sigma, timestep in zip(self.scheduler.sigmas, self.progress_bar(self.scheduler.timesteps)):
            x = self.scheduler.step(self._velocity(x, sigma, given, absent, terms), timestep, x, return_dict=False)[0]
        mean, std = (
            torch.tensor(values, device=device)[:, None, None] for values in (config.latent_mean, config.latent_std)
        )
        images = self._output(x * std + mean, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditions(
        self, prompts: Sequence[str], vision: Tensor | None, copies: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """({text, text_length, vision}, [which have no text, which have no vision]), each prompt's copies side by side."""
        text, length = self._text(prompts)
        width = self.transformer.config.vision_width
        given = {
            "text": text,
            "text_length": length,
            "vision": (torch.zeros(width) if vision is None else vision).expand(len(prompts), -1),
        }
        absent = [torch.tensor([not one for one in prompts]), torch.full((len(prompts),), vision is None)]

        def spread(value: Tensor) -> Tensor:
            return value.to(self._execution_device).repeat_interleave(copies, 0)

        return {name: spread(value) for name, value in given.items()}, [spread(value) for value in absent]

    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[b, tokens, width] zero-padded, and how many of them count; a sample without a sentence has one that does not."""
        device, section, said = self._execution_device, self.config.encoders["text"], [one for one in prompts if one]
        found = iter(encoders.encode_text(section, self.tokenizer, self.text_encoder, said, device) if said else [])
        none = torch.zeros(1, self.transformer.config.text_width, device=device)
        tokens = [next(found) if one else none for one in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return padded, torch.tensor([len(one) for one in tokens])

    def _vision(self, reference: Any, weights: Sequence[float] | None) -> Tensor | None:
        """[width] of one reference or of a mixture, scaled as in training."""
        if reference is None:
            return None
        references = list(reference) if isinstance(reference, list | tuple) else [reference]
        weights = [1.0] * len(references) if weights is None else list(weights)
        if len(weights) != len(references) or min(weights, default=0) < 0 or not sum(weights):
            raise ValueError(f"reference_weights={weights}: one a reference, from 0 up and not all 0, is wanted.")
        section = self.config.encoders["vision"]
        vectors = [
            encoders.encode_vision(section, self.image_encoder, one, self._execution_device) for one in references
        ]
        vector = sum(weight / sum(weights) * one for weight, one in zip(weights, vectors))
        if vector.shape != (width := self.transformer.config.vision_width,):
            raise ValueError(
                f"the reference's vector has the shape {tuple(vector.shape)}; the model takes {width} numbers."
            )
        return vector * (width**0.5 / vector.norm().clamp_min(1e-12)) if self.config.normalize_vision else vector

    def _velocity(
        self, x: Tensor, t: Tensor, given: Mapping[str, Tensor], absent: Sequence[Tensor], terms: list
    ) -> Tensor:
        """The guided velocity, all evaluations as one batch."""
        n, b = len(terms), len(x)
        drops = [
            torch.cat([one if not term[k] else torch.ones_like(one) for term, _ in terms])
            for k, one in enumerate(absent)
        ]
        dtype = self.transformer.dtype
        half = x.device.type == "cuda" and dtype == torch.float32  # as in training: only products are bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            velocity = self.transformer(
                x.repeat(n, 1, 1, 1).to(dtype),
                t.to(x.device).expand(n * b),
                given["text"].repeat(n, 1, 1).to(dtype),
                given["text_length"].repeat(n),
                given["vision"].repeat(n, 1).to(dtype),
                *drops,
            )
        return sum(weight * part for (_, weight), part in zip(terms, velocity.float().chunk(n)))

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.decode(latents)
        return [Image.fromarray(one) for one in pixels] if output_type == "pil" else pixels.astype(np.float32) / 255

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """[b, channels, h, w] raw latents -> [b, 8h, 8w, 3] uint8 sRGB."""
        return encoders.decode(self.config.encoders["vae"], self.vae, latents.to(self._execution_device))
