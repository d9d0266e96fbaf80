"""What to look at when the gate fails: each pattern of failures as a sentence that names layers, settings or losses.

The patterns are those that broken models of bench/gate_power.py show; the most general comes first and ends the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEANS = 0.3  # share of the way that the wrong half of the picture may go along before a signal is said to overpower


def words(
    checks: Mapping[str, Mapping], raw: Mapping[str, Mapping], numbers: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Advice for the averaged weights; [] where all is well.

    Args:
      checks: `judge.checks` of the averaged weights.
      raw: the same of the raw weights.
      numbers: `judge.measure` of the averaged weights.
      config: of the run.
    """
    failed = {name for name, check in checks.items() if not check["passed"]}
    flow, leaks = config["flow"], numbers["leaks"]
    memory = failed & {"memory_latent", "memory_ssim"}
    alone = failed & {"text_only_latent", "text_only_ssim"}
    light = failed & {"vision_light", "light_by_vector"}
    seen = failed & {"vision_encoder", "encoder_by_vector"}
    kept = failed & {"vision_composition", "composition_kept"}
    text = failed & {"text_composition", "composition_by_caption"}
    found = [*_average(failed, raw, config), *_projections(checks)]
    if memory and numbers["psnr"] < numbers["psnr_next"] + 1:
        return [*found, NOTHING.format(**numbers)]
    if memory:
        found.append(SHARED.format(**numbers))
    elif "memory_margin" in failed:
        found.append(MARGIN)
    if alone:
        found.append(TEXT_UNHEARD.format(**flow))
    elif text:
        found.append(SIDES)
    if (light or seen) and not kept:
        found.append((VECTOR_UNHEARD if light else COLOURS_ALONE).format(**flow, **config["data"]))
    elif light or seen:
        found.append(CONFUSED)
    elif kept and not alone:
        found.append(f"Another image's vector brings its composition along. {VECTOR_OVERPOWERS}")
    if not kept and leaks["composition_by_vector"] > LEANS:
        words = f"Another image's vector takes the composition {leaks['composition_by_vector']:.0%} of the way along."
        found.append(f"{words} {VECTOR_OVERPOWERS}")
    if not light and leaks["light_by_caption"] > LEANS:
        words = (
            f"An exchanged caption changes the light by {leaks['light_by_caption']:.0%} of what another vector does."
        )
        found.append(f"{words} {CAPTION_OVERPOWERS}")
    return found


NOTHING = (
    "The pictures are {psnr:.1f} dB from their images, and the most alike other image is {psnr_next:.1f}: next to nothing "
    "was learnt. Train longer. If the loss stays near 2, look at the learning rate and the warm-up; at latent_mean and "
    "latent_std, which normalise once and are undone before decoding; at the target, noise - x0; at the time embedding of "
    "1000 t."
)
SHARED = (
    "The pictures are {psnr:.1f} dB from their images, but not each is nearest to its own: what the images share was "
    "learnt, what tells them apart was not. Train longer. If the loss has stopped falling, look at the positions "
    "(model.position_embedding and the rotary ones), at the order of the patches, and whether caption, vector and latent "
    "of a record stay together."
)
MARGIN = "Each picture is nearest to its own image, but not by far: train longer, down to a lower last learning rate."
TEXT_UNHEARD = (
    "From its caption alone an image's composition does not come: the text is not heard well enough. Look at "
    "cross_attention, whose output begins at zero and must grow; at text_in and text_norm; at text_length, which masks the "
    "keys; whether captions lie beside their own images. flow.drop_text={drop_text:g} is how often the text is hidden, "
    "flow.drop_vision={drop_vision:g} how often it must do without the vector. A larger flow.shift (now {shift:g}) helps, "
    "the more the higher the resolution: composition is settled near t = 1. Images of several shapes that were cut to one "
    "bucket differ in what no caption says: the generated photographs are all square with encode.demo --side."
)
SIDES = (
    "Captions are remembered, but an exchanged one does not move the composition: left and right are not bound to the "
    "picture. Look at the mirror images: latent_flip must come with text_flip (flow.flip; the page of the encoded data "
    "counts the exchanged captions)."
)
VECTOR_UNHEARD = (
    "Light and colour do not follow the vector. Look at vision_in and vision_out; at the modulation of the blocks (adaLN); "
    "at the scale of the vectors (data.normalize_vision={normalize_vision}); whether vectors lie beside their own images. "
    "flow.drop_vision={drop_vision:g} is how often the vector is hidden. If the caption brings its own image's light "
    "along, it overpowers the vector: raise flow.drop_text (now {drop_text:g}), or sample with a higher --guidance_vision."
)
COLOURS_ALONE = (
    "Light and colour follow the vector, but its encoder does not see the vector's image in the pictures: of what the "
    "vector says only the colours were learnt. Train longer; look at the scale of the vectors "
    "(data.normalize_vision={normalize_vision})."
)
CONFUSED = (
    "With another image's vector neither its light nor the caption's composition comes: pairs of conditions that never met "
    "in training confuse the model. Train longer, on more images, with larger flow.drop_text and flow.drop_vision."
)
VECTOR_OVERPOWERS = (
    "The vector overpowers the caption: raise flow.drop_vision, or sample with a higher --guidance_text and a lower "
    "--guidance_vision."
)
CAPTION_OVERPOWERS = (
    "The caption overpowers the vector: raise flow.drop_text, or sample with a higher --guidance_vision."
)


def _average(failed, raw, config) -> list[str]:
    raw_passes = all(check["passed"] for check in raw.values())
    if failed and raw_passes:
        return [
            "The raw weights pass, only the average (EMA) is behind them: train longer, or with a lower optim.ema_decay (now "
            f"{config['optim']['ema_decay']:g})."
        ]
    if not failed and not raw_passes:
        return [
            "The raw weights fail where the average passes: the learning rate was still high at the end; let the schedule finish."
        ]
    return []


def _projections(checks) -> list[str]:
    dead = checks["conditioning"]["value"]
    if not dead:
        return []
    null = " A null condition learns only where flow.drop_both, drop_text or drop_vision hides the condition." * any(
        line.startswith("null") for line in dead
    )
    return [
        f"{'; '.join(dead)}: nothing is learnt through such a layer. Look at what it is given, and what hides it.{null}"
    ]
