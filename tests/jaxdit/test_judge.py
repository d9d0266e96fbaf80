"""The gate's checks on pictures by painters whose faults are known."""

import numpy as np
import pytest
from PIL import Image

from jaxdit import advice, judge, likeness

COUNT, WIDTH = 40, 64
CONFIG = {
    "flow": {"drop_vision": 0.1, "drop_text": 0.1}, "optim": {"ema_decay": 0.9999}, "data": {"normalize_vision": False}
}  # fmt: skip
MEMORY = {"memory_latent", "memory_ssim"}
ALONE = {"text_only_latent", "text_only_ssim"}
LIGHT = {"vision_light", "vision_encoder", "light_by_vector"}
TEXT = {"text_composition", "composition_by_caption"}


def scene(number):
    """[64, 64] in [0, 1]: a composition of its own."""
    rng = np.random.default_rng(number)
    small = Image.fromarray((rng.uniform(0.2, 1, (5, 5)) * 255).astype(np.uint8))
    return np.asarray(small.resize((WIDTH, WIDTH), Image.Resampling.BICUBIC)) / 255


def colour(number):
    """[3] in [0, 1]: a light of its own."""
    return np.random.default_rng(1000 + number).uniform(0.25, 1, 3)


def paint(shape, tint):
    return np.clip(255 * shape[..., None] * tint, 0, 255).astype(np.uint8)


def latents(pictures):
    """[n, 8, 8, 3]: what stands for the image encoder."""
    return np.stack([p.reshape(8, WIDTH // 8, 8, WIDTH // 8, 3).mean((1, 3)) / 64 for p in pictures]).astype(np.float32)


@pytest.mark.parametrize("size", [1.0, 32.0, 300.0])
def test_images_that_share_a_vector_are_never_partners_however_long_it_is(size):
    """A person's own vectors, one a series of photographs: of norm 32 where 1,024 numbers are near 1."""
    made, rng = examples(), np.random.default_rng(0)
    shared = rng.normal(size=(8, 1024))
    shared *= size / np.linalg.norm(shared, axis=1, keepdims=True)
    for number, example in enumerate(made):
        example.record["vision"] = shared[number % 8].astype(np.float32)
    asked = judge.questions(made)
    assert all(number % 8 != partner % 8 for number, partner in enumerate(asked.pairs)) and len(asked.lit) == COUNT


def vectors(pictures):
    """[n, 6]: what stands for the vision encoder."""
    return np.stack([likeness.light(pixels) for pixels in pictures])


def examples(count=COUNT, *, sides=True, captions=True, lights=True):
    """Images of which text[0, 0] is the number of the caption, negative for the mirror image's."""
    made = []
    for n in range(count):
        pixels = paint(scene(n), colour(n))
        record = {
            "id": f"{n}.png".encode(),
            "caption": f"scene {n if captions else 0}".encode(),
            "pixel_hash": f"{n:04d}".encode(),
            "text": np.full((2, 3), n + 1, np.float32),
            "text_flip": np.full((2 if sides else 0, 3), -(n + 1), np.float32),
            "vision": vectors([pixels])[0] if lights else np.ones(6),
        }
        flipped = np.ascontiguousarray(pixels[:, ::-1])
        made.append(judge.Example(record, "64x64", pixels, flipped, latents([pixels])[0]))
    return made


def perfect(n, mirrored, tint, own_tint):
    return (scene(n)[:, ::-1] if mirrored else scene(n)), tint


def judged(made, painter=perfect, rule=judge.GENERATED, dead=()):
    """(failed checks, numbers, checks) of a painter: (scene, mirrored, colour of the vector, of the image) -> shape, colour."""
    asked = judge.questions(made)
    assert judge.cannot(made, asked) == ""

    def draw(texts, visions):
        pictures = []
        for i, (text, vision) in enumerate(zip(texts, visions)):
            n = int(abs(text[0, 0])) - 1
            tint = colour(500 + n if vision is None else vision)  # no caption names the light
            pictures.append(paint(*painter(n, text[0, 0] < 0, tint, colour(i))))
        return judge.Drawn(pictures, latents(pictures), vectors(pictures))

    texts, own = [example.record["text"] for example in made], list(range(len(made)))
    drawn = {
        "own": draw(texts, own),
        "text_only": draw(texts, [None] * len(made)),
        "vision": draw(texts, list(asked.pairs)),
        "text": draw(asked.exchanged, own),
    }
    if rule == judge.OWN:
        drawn["control"] = draw(texts, list(asked.thirds))
    numbers, ratios, nexts = judge.measure(made, asked, drawn)
    checks = judge.checks(numbers, dead, rule, encoder=True)
    assert set(ratios) == set(judge.THRESHOLDS) - {"memory_margin"} and set(nexts) == MEMORY | ALONE
    return {name for name, check in checks.items() if not check["passed"]}, numbers, checks


def words(made, painter, dead=()):
    _, numbers, checks = judged(made, painter, dead=dead)
    return " ".join(advice.words(checks, checks, numbers, CONFIG))


def test_a_perfect_painter_passes_and_gets_no_advice():
    failed, numbers, checks = judged(examples())
    assert failed == set() and advice.words(checks, checks, numbers, CONFIG) == []
    assert numbers["memory_latent"] == 1 and numbers["psnr"] == pytest.approx(100) and numbers["psnr_next"] < 60
    assert numbers["effects"]["light_by_vector"]["mean"] == pytest.approx(1, abs=0.02)
    assert numbers["effects"]["composition_by_caption"]["mean"] == pytest.approx(1, abs=0.02)
    assert numbers["effects"]["composition_kept"]["mean"] == pytest.approx(1, abs=0.05)
    assert abs(numbers["leaks"]["composition_by_vector"]) < 0.05


def test_one_that_does_not_hear_the_vector_fails_at_the_light_alone():
    def painter(n, mirrored, tint, own_tint):
        return perfect(n, mirrored, colour(n), own_tint)

    failed, *_ = judged(examples(), painter)
    assert failed == LIGHT
    assert "do not follow the vector" in words(examples(), painter) and "vision_in" in words(examples(), painter)


def test_one_that_does_not_hear_the_caption_fails_at_the_text():
    number = {tuple(colour(n)): n for n in range(COUNT)}

    def painter(n, mirrored, tint, own_tint):
        return perfect(number[tuple(own_tint)] * 7 % COUNT, False, tint, own_tint)

    failed, *_ = judged(examples(), painter)
    assert failed >= ALONE | TEXT


def test_one_that_remembers_the_image_of_the_vector_is_said_to_be_overpowered():
    number = {tuple(colour(n)): n for n in range(COUNT)}

    def painter(n, mirrored, tint, own_tint):
        return perfect(number.get(tuple(tint), n), False, tint, own_tint)

    failed, numbers, _ = judged(examples(), painter)
    assert failed == {"vision_composition"} | TEXT
    assert numbers["leaks"]["composition_by_vector"] == pytest.approx(1, abs=0.1)
    assert "vector overpowers the caption" in words(examples(), painter)


def test_one_that_ignores_sides_fails_at_the_exchange_alone():
    def painter(n, mirrored, tint, own_tint):
        return perfect(n, False, tint, own_tint)

    failed, *_ = judged(examples(), painter)
    assert failed == TEXT
    assert "text_flip" in words(examples(), painter)


def test_one_that_tosses_a_coin_for_the_side_fails_at_the_exchange():
    rng = np.random.default_rng(0)

    def painter(n, mirrored, tint, own_tint):
        return perfect(n, rng.uniform() < 0.5, tint, own_tint)

    assert "text_composition" in judged(examples(), painter)[0]


def test_backgrounds_alone_are_no_memory():
    """What all images share, at a high PSNR: the model of the trial had 20 dB, and its own image nearest in 11 of 100."""
    made = examples()
    shared = np.mean([scene(n) for n in range(COUNT)], 0)

    def painter(n, mirrored, tint, own_tint):
        return shared, np.full(3, 0.6)

    failed, numbers, checks = judged(made, painter)
    assert failed >= MEMORY | ALONE | LIGHT | TEXT and numbers["psnr"] > 12
    assert "next to nothing" in " ".join(advice.words(checks, checks, numbers, CONFIG))


def test_own_nearest_by_a_hair_fails_at_the_margin_alone():
    def painter(n, mirrored, tint, own_tint):
        shape, tint = perfect(n, mirrored, tint, own_tint)
        return 0.5 * shape + 0.5 * scene((n + 1) % COUNT)[:, :: -1 if mirrored else 1] + 0.01 * shape, tint

    failed, numbers, _ = judged(examples(), painter)
    assert "memory_margin" in failed and numbers["memory_margin"] > 0.5


def test_a_weak_effect_fails_on_generated_photographs_and_passes_on_a_person_s_own():
    def painter(n, mirrored, tint, own_tint):
        return perfect(n, mirrored, 0.7 * colour(n) + 0.3 * tint, own_tint)

    assert "vision_light" in judged(examples(), painter)[0]
    failed, numbers, checks = judged(examples(), painter, judge.OWN)
    assert failed == set() and "vision_light" not in checks
    assert 0.2 < numbers["effects"]["light_by_vector"]["mean"] < 0.4


def test_an_effect_that_is_sure_but_next_to_nothing_passes_nowhere():
    def painter(n, mirrored, tint, own_tint):
        return perfect(n, mirrored, 0.95 * colour(n) + 0.05 * tint, own_tint)

    for rule in (judge.GENERATED, judge.OWN):
        failed, numbers, _ = judged(examples(), painter, rule)
        assert numbers["effects"]["light_by_vector"]["low"] > 0 and "light_by_vector" in failed


@pytest.mark.parametrize("seed", range(3))
def test_chance_passes_no_exchange_of_a_person_s_own_photographs(seed):
    rng = np.random.default_rng(seed)

    def painter(n, mirrored, tint, own_tint):
        return scene(rng.integers(COUNT)), rng.uniform(0.25, 1, 3)

    failed, *_ = judged(examples(), painter, judge.OWN)
    assert len(set(judge.EFFECTS) & failed) >= 2 and failed >= MEMORY


def test_any_other_vector_answered_with_the_mean_light_is_not_beyond_the_controls():
    mean = np.mean([colour(n) for n in range(COUNT)], 0)

    def painter(n, mirrored, tint, own_tint):
        return perfect(n, mirrored, tint if np.allclose(tint, own_tint) else mean, own_tint)

    failed, numbers, _ = judged(examples(), painter, judge.OWN)
    effect = numbers["effects"]["light_by_vector"]
    assert effect["low"] > 0.2 and effect["mean"] <= effect["control"] and "light_by_vector" in failed


def test_few_sides_exchange_whole_captions():
    made = examples(sides=False)
    failed, _, _ = judged(made)
    asked = judge.questions(made)
    assert failed == set() and "whole captions exchanged" in asked.by and (asked.partners >= 0).all()

    def deaf(n, mirrored, tint, own_tint):
        return perfect(next(k for k in range(COUNT) if np.allclose(colour(k), own_tint)), mirrored, tint, own_tint)

    assert judged(made, deaf)[0] >= TEXT


def test_a_check_that_did_not_run_has_failed():
    _, numbers, checks = judged(examples())
    assert all(check["passed"] for check in checks.values())
    for name in judge.THRESHOLDS:
        without = {key: value for key, value in numbers.items() if key != name}
        assert not judge.checks(without, [], judge.GENERATED, encoder=True)[name]["passed"]
    without = numbers | {"effects": {}}
    assert not judge.checks(without, [], judge.OWN, encoder=True)["composition_kept"]["passed"]
    assert not judge.checks(numbers, None, judge.GENERATED, encoder=True)["conditioning"]["passed"]
    assert not judge.checks(numbers | {"memory_latent": float("nan")}, [], judge.GENERATED, encoder=True)[
        "memory_latent"
    ]["passed"]


def test_dead_projections_fail_and_are_named():
    assert judged(examples(), dead=["text has not moved"])[0] == {"conditioning"}
    assert "text has not moved" in words(examples(), perfect, dead=["text has not moved"])


def test_the_average_behind_raw_weights_that_pass_is_named():
    _, numbers, passing = judged(examples())
    _, behind, failing = judged(examples(), lambda n, mirrored, tint, own: (scene(n + 500), tint))
    assert "Only the average" in " ".join(
        advice.words(failing, passing, behind, CONFIG)
    ) or "only the average" in " ".join(advice.words(failing, passing, behind, CONFIG))
    assert "learning rate was still high" in " ".join(advice.words(passing, failing, numbers, CONFIG))


def test_what_cannot_be_judged_is_said():
    made = examples(8)
    assert "at least 10" in judge.cannot(made, None)
    made = examples(lights=False)
    assert "different light" in judge.cannot(made, judge.questions(made))
    made = examples(sides=False, captions=False)
    assert "caption to exchange" in judge.cannot(made, judge.questions(made))


def test_precomputed_vectors_are_not_seen_by_an_encoder_that_nobody_knows():
    _, numbers, _ = judged(examples())
    for rule in (judge.GENERATED, judge.OWN):
        checks = judge.checks(numbers, [], rule, encoder=False)
        assert not {"vision_encoder", "encoder_by_vector"} & set(checks)


def test_copies_count_as_their_originals_and_equal_captions_as_one():
    made = examples()
    made[1] = judge.Example(
        made[1].record | {"pixel_hash": b"0000"}, "64x64", made[0].pixels, made[0].flipped, made[0].latent
    )
    asked = judge.questions(made)
    assert asked.pairs.shape == (COUNT,)
    picture = judge.Drawn(
        [e.pixels for e in made], np.stack([e.latent for e in made]), vectors([e.pixels for e in made])
    )
    numbers, _, _ = judge.measure(made, asked, dict.fromkeys(("own", "text_only", "vision", "text"), picture))
    assert numbers["memory_latent"] == numbers["memory_ssim"] == 1.0


def measured(made, **changed):
    whole = judge.Drawn([e.pixels for e in made], np.stack([e.latent for e in made]), vectors([e.pixels for e in made]))
    names = ("own", "text_only", "vision", "text")
    return judge.measure(made, judge.questions(made), {name: changed.get(name, whole) for name in names})[0]


def test_equal_captions_are_one_for_the_caption_alone_and_two_for_memory():
    made = examples(12)
    made[1].record["caption"] = made[0].record["caption"]
    shown = [made[0], made[0], *made[2:]]  # image 0 is drawn for image 1
    first = judge.Drawn(
        [e.pixels for e in shown], np.stack([e.latent for e in shown]), vectors([e.pixels for e in shown])
    )
    numbers = measured(made, own=first, text_only=first)
    assert numbers["text_only_latent"] == numbers["text_only_ssim"] == 1.0
    assert numbers["memory_latent"] == numbers["memory_ssim"] == pytest.approx(11 / 12)


def test_what_is_no_number_is_not_remembered_and_a_copy_is_no_next():
    made = examples(12)
    latents = np.stack([e.latent for e in made])
    latents[0, 0, 0, 0] = np.nan
    broken = judge.Drawn([e.pixels for e in made], latents, vectors([e.pixels for e in made]))
    assert measured(made, own=broken)["memory_latent"] == pytest.approx(11 / 12)
    made[1] = judge.Example(
        made[1].record | {"pixel_hash": b"0000"}, "64x64", made[0].pixels, made[0].flipped, made[0].latent
    )
    assert measured(made)["psnr_next"] < 30


def test_an_effect_whose_interval_holds_zero_has_failed():
    effect = {"mean": 0.5, "low": -0.01, "high": 0.9, "control": 0.0}
    found = judge.checks({"effects": {"light_by_vector": effect}}, [], judge.GENERATED, encoder=True)
    assert not found["light_by_vector"]["passed"]


@pytest.mark.parametrize(
    ("name", "passes", "fails"),
    [("memory_latent", 0.95, 0.94), ("memory_margin", 0.5, 0.51)]
    + [(name, 0.8, 0.79) for name in judge.THRESHOLDS if not name.startswith("memory")],
)
def test_each_check_begins_to_pass_at_the_share_that_is_published(name, passes, fails):
    for value, passed in ((passes, True), (fails, False)):
        found = judge.checks({name: value}, (), judge.GENERATED, encoder=True)
        assert found[name]["passed"] == passed
