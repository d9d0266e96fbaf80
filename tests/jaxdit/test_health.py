"""Verdicts on made-up runs of every kind, on noise, and on recorded runs (curves/record.py made those)."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from work import calls

from jaxdit import health

CURVES = Path(__file__).parent / "curves"
PAGE = Path(__file__).parents[2] / "docs" / "health.md"
PROJECTIONS = ("time", "vision", "text", "null_vision", "null_text", "modulation", "cross_attention")


def heavy(rng, size):
    """Noise of unit width as gradient norms have it: Student's t with 5 degrees, hairs upwards, some memory."""
    noise = rng.standard_t(5, size) + (rng.random(size) < 0.01) * rng.exponential(2.0, size)
    return 0.9 * noise + 0.3 * np.concatenate([[0.0], noise[:-1]])


def sound(seed, rows=300, spacing=20, scale=1.0, noise=None, eval_every=25, first=0):
    """A healthy run as columns: warm-up, a loss that falls from 2 to a floor, a norm that falls, drifts and has hairs.

    Shapes and noise are drawn anew by each seed, around what the recorded runs show (spread of the log norm 0.06 to 0.45,
    of the log loss 0.04 to 0.25); `first` leaves out rows at the start, as a view of the newest rows does.
    """
    rng = np.random.default_rng(seed)
    step = np.unique(np.concatenate([[1], spacing * np.arange(1, rows)]))
    time = step / spacing / rows
    wide = noise if noise is not None else rng.uniform(0.06, 0.45)
    floor, tempo = rng.uniform(0.3, 1.3), 10 ** rng.uniform(0.7, 2.0)
    level = floor + (2 - floor) / (1 + tempo * time)
    loss = level * np.exp(0.55 * wide * heavy(rng, len(step)))
    ramp = 1 - 0.4 * np.exp(-step / 15)  # zero-initialised layers open
    fall = (1 + tempo * time) ** rng.uniform(-0.9, -0.3) * np.exp(rng.uniform(-0.3, 0.9) * time)
    norm = scale * ramp * fall * np.exp(wide * heavy(rng, len(step)))
    warm = max(1, 0.05 * step[-1])
    target = 1.4 * np.exp(0.01 * rng.standard_normal(len(step)))
    columns = {
        "step": step,
        "updates": step,
        "voided": 0 * step,
        "voided_in_row": 0 * step,
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": 3e-4 * np.minimum(step / warm, 0.5 + 0.5 * np.cos(np.pi * time)),
        "velocity_rms": target * np.sqrt(np.maximum(1 - level / 2, 1e-4)),
        "target_rms": target,
        "ema_distance": 0.08 * np.minimum(1, 20 * time) * (1.05 - time),
    }
    for k in range(10):
        gain = (0.45, 0.6, 0.8, 0.95, 1.0, 1.05, 1.1, 1.1, 1.05, 1.0)[k]
        values = (2 - gain * (2 - level)) * np.exp(0.8 * wide * rng.standard_normal(len(step)))
        columns[f"loss_t/{k}"] = np.where(rng.random(len(step)) < (0.6 if k in (0, 9) else 0.1), np.nan, values)
    for name in PROJECTIONS:
        share = 10 ** rng.uniform(-3, -0.3)
        rests = (rng.random(len(step)) < 0.4) & name.startswith("null")
        columns[f"grad/{name}"] = np.where(rests, 0.0, share * norm)
        columns[f"move/{name}"] = (
            columns["learning_rate"] * rng.uniform(0.1, 3) * np.exp(0.2 * rng.standard_normal(len(step)))
        )
    lag = floor + (2 - floor) / (1 + tempo * np.maximum(0.9 * time - 0.3 / rows, 0))
    for name, values in (("held_out/ema", lag * 1.01), ("held_out/raw", level * 1.03), ("training/ema", lag)):
        column = values * np.exp(0.002 * rng.standard_normal(len(step)))
        columns[f"eval/{name}/text_vision"] = np.where(np.arange(len(step)) % eval_every == 0, column, np.nan)
    return {name: np.array(values[first:], float) for name, values in columns.items()}


def rows_of(columns):
    """Rows as metrics.jsonl has them: null for what is not finite, evaluations only where there was one."""
    rows = []
    for k in range(len(columns["step"])):
        row = {name: float(values[k]) if math.isfinite(values[k]) else None for name, values in columns.items()}
        row["step"] = int(row["step"])
        rows.append({name: value for name, value in row.items() if value is not None or not name.startswith("eval/")})
    return rows


def names(rows, start=1, every=1, **options):
    """The verdict at each row from `start` on, as the loop would have logged it."""
    return [health.judge(rows[:end], **options).name for end in range(start, len(rows) + 1, every)]


# What can go wrong: (verdict, what it does to a healthy run from row k on, rows until it must be seen)


def trouble_spike(c, k, rng):
    c["grad_norm"][k] = 100 * np.median(c["grad_norm"][k - 100 : k])


def trouble_unstable(c, k, rng):
    c["grad_norm"][k:] *= 12
    c["loss"][k:] *= 1.05


def trouble_unstable_by_many_spikes(c, k, rng):
    c["grad_norm"][k::11] = 40 * np.median(c["grad_norm"][k - 100 : k])


def trouble_diverged(c, k, rng):
    c["grad_norm"][k:] *= 30
    c["loss"][k:] = 3.5 * np.exp(0.2 * rng.standard_normal(len(c["loss"]) - k))


def trouble_diverged_by_velocity(c, k, rng):
    c["velocity_rms"][k:] = 2.5 * c["target_rms"][k:]


def trouble_collapsed(c, k, rng):
    c["velocity_rms"][k:] *= np.exp(-np.arange(len(c["step"]) - k))
    c["loss"][k:] = c["target_rms"][k:] ** 2


def trouble_back_at_the_start(c, k, rng):
    c["loss"][k:] = 1.95 * np.exp(0.1 * rng.standard_normal(len(c["loss"]) - k))


def trouble_lost_ground(c, k, rng):
    c["loss"][k:] *= 1.5 + 0.2 * (c["loss"][k] > 1.3)


def trouble_dying(c, k, rng):
    c["grad_norm"][k:] *= np.maximum(np.exp(-0.5 * np.arange(len(c["step"]) - k)), 1e-6)


def trouble_voided(c, k, rng):
    c["loss"][k:] = c["grad_norm"][k:] = np.nan


def trouble_one_voided(c, k, rng):
    c["loss"][k] = c["grad_norm"][k] = np.nan


def trouble_data_changed(c, k, rng):
    c["target_rms"][k:] *= 2
    c["loss"][k:] *= 4


def trouble_condition_ignored(c, k, rng):
    c["grad/text"][k:] = 0.0


def trouble_condition_ignored_unmoved(c, k, rng):
    c["move/vision"][k:] = 0.0


def trouble_memorising(c, k, rng):
    for split, slope in (("held_out", 0.15), ("training", -0.15)):
        values = c[f"eval/{split}/ema/text_vision"]
        known = np.flatnonzero(np.isfinite(values[:k]))[-1]
        after = np.exp(slope * (np.arange(k, len(values)) - known) / 100)
        values[k:] = np.where(np.isfinite(values[k:]), values[known] * after, np.nan)


def trouble_average_behind(c, k, rng):
    c["eval/held_out/ema/text_vision"][k:] *= 1.2
    c["ema_distance"][k:] = np.linspace(0.1, 0.2, len(c["step"]) - k)


def trouble_uneven(c, k, rng):
    c["loss_t/3"][k:] *= 1.8


TROUBLES = {  # function: rows within which it is seen
    trouble_spike: 1,
    trouble_unstable: 8,
    trouble_unstable_by_many_spikes: 70,
    trouble_diverged: 8,
    trouble_diverged_by_velocity: 8,
    trouble_collapsed: 12,
    trouble_back_at_the_start: 8,
    trouble_lost_ground: 40,
    trouble_dying: 16,
    trouble_voided: 3,
    trouble_one_voided: 1,
    trouble_data_changed: 8,
    trouble_condition_ignored: 4,
    trouble_condition_ignored_unmoved: 4,
    trouble_memorising: 110,
    trouble_average_behind: 120,
    trouble_uneven: 110,
}


def changes(found):
    return sum(a != b for a, b in itertools.pairwise(found))


def meant(trouble):
    """The verdict that a trouble's name promises."""
    found = [name for name in health.VERDICTS if trouble.__name__.startswith(f"trouble_{name.replace(' ', '_')}")]
    return max(found, key=len)


@pytest.mark.parametrize("spacing, scale", [(20, 1.0), (1, 1e-4), (50, 1e4)])
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__[8:])
def test_a_trouble_is_named_in_time_and_with_the_way_back(trouble, spacing, scale):
    begins, name = 180, meant(trouble)
    columns = sound(spacing, rows=begins + 130, spacing=spacing, scale=scale, noise=0.2)
    trouble(columns, begins, np.random.default_rng(1))
    rows = rows_of(columns)
    at, saved = rows[begins]["step"], (20, rows[begins - 60]["step"], rows[-1]["step"] + 1)
    assert {health.judge(rows[:end]).level for end in range(1, begins + 1, 20)} == {"good"}
    for end in range(begins + 1, begins + 1 + TROUBLES[trouble]):
        verdict = health.judge(rows[:end], saved=saved)
        if verdict.name == name:
            break
    assert verdict.name == name, f"{verdict} after {TROUBLES[trouble]} rows"
    assert verdict.level == health.VERDICTS[name] != "good"
    assert verdict.since <= rows[end - 1]["step"]
    assert "\n" not in verdict.words and "nan" not in verdict.words and len(verdict.words) < 320
    if "WORKDIR" in verdict.words:
        assert f"--config.train.restore=WORKDIR@{saved[1]}" in verdict.words
        assert abs(verdict.since - at) <= 15 * spacing


def test_not_learning_and_a_bin_that_never_leaves_its_start():
    columns = sound(3, noise=0.1)
    columns["loss"] = columns["target_rms"] ** 2 * np.exp(0.05 * heavy(np.random.default_rng(0), len(columns["step"])))
    columns["velocity_rms"] *= 1e-3
    found = names(rows_of(columns))
    assert found[-1] == "not learning" and found.index("not learning") <= 100  # 2,000 steps: after the warm-up
    columns = sound(3, noise=0.1)
    columns["loss"] *= 0.6
    columns["loss_t/9"] = np.full(len(columns["step"]), 1.97)
    verdict = health.judge(rows_of(columns))
    assert verdict.name == "uneven" and "[0.9, 1)" in verdict.words


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3, 1e4])
def test_only_the_runs_own_past_counts(scale):
    """NUM-13: a usual norm of 1,000 is sound, an outlier a hundred times as large is a spike, and then it is sound again."""
    columns = sound(7, noise=0.25)
    for name in ("grad_norm", *(f"grad/{name}" for name in PROJECTIONS)):
        columns[name] = columns[name] * scale
    columns["grad_norm"][200] = 100 * np.median(columns["grad_norm"][100:200])
    found = names(rows_of(columns))
    plain = [name for name in found if name not in ("sound", "hairy")]
    assert plain == ["young"] * 17 + ["spike"] * 20
    assert found.index("spike") == 200


def test_a_rise_of_the_norm_that_comes_with_learning_or_over_the_whole_run_is_sound():
    columns = sound(8, noise=0.2)
    columns["grad_norm"] = np.exp(0.2 * np.random.default_rng(0).standard_normal(300))
    columns["grad_norm"][150:190] *= np.interp(np.arange(40), [0, 15, 40], [1, 7, 4])
    columns["loss"][150:] *= np.maximum(np.exp(-0.04 * np.arange(len(columns["loss"]) - 150)), 0.2)
    assert not {"unstable", "dying", "lost ground"} & set(names(rows_of(columns), 140)[:40])
    columns = sound(9, noise=0.2)
    columns["grad_norm"] *= np.exp(2 * np.arange(len(columns["step"])) / len(columns["step"]))
    assert set(names(rows_of(columns), 20)) == {"sound"}


def test_the_norm_may_grow_in_the_warm_up():
    """As in the first hundred updates of the recorded run `memorising`, whose rows vary by 7% only."""
    columns = sound(19, rows=140, spacing=1, noise=0.06)
    noise = np.exp(0.06 * np.random.default_rng(0).standard_normal(len(columns["step"])))
    columns["learning_rate"] = 1e-3 * np.minimum(columns["step"] / 100, 1.2 - columns["step"] / 500)
    columns["grad_norm"] = np.interp(columns["step"], [0, 40, 75, 140], [0.4, 0.4, 1.2, 1.1]) * noise
    assert {health.VERDICTS[name] for name in names(rows_of(columns))} == {"good"}
    columns["learning_rate"][:] = 1e-3
    assert "unstable" in names(rows_of(columns))


def test_a_hairy_norm_that_falls_is_normal():
    found = names(rows_of(sound(10, noise=0.6)))
    assert found[-1] == "hairy" and set(found) <= {"young", "sound", "hairy", "spike"}
    assert changes(found) <= 5


def test_a_norm_that_falls_with_the_loss_is_no_death_and_a_common_rise_no_memory():
    columns = sound(17, noise=0.1)
    fall = np.exp(-0.08 * np.maximum(np.arange(len(columns["step"])) - 150, 0))
    columns["grad_norm"] *= fall
    assert "dying" in names(rows_of(columns), 150, 10)
    for name in ("loss", *(f"loss_t/{k}" for k in range(10))):
        columns[name] = columns[name] * fall
    assert "dying" not in names(rows_of(columns), 150, 10)
    columns = sound(18, noise=0.1)
    for split, rise in (("held_out", 1.5), ("training", 1.3)):
        columns[f"eval/{split}/ema/text_vision"] *= np.linspace(0.7, 1.7, len(columns["step"])) ** rise
    assert "memorising" not in names(rows_of(columns), 150, 10)


@pytest.mark.parametrize(
    "column, times, wave, noise, most", [("loss", 1.15, 0.0, 0.15, 24), ("grad_norm", 3.0, 0.12, 0.02, 8)]
)
def test_a_verdict_does_not_flap_around_its_limit(column, times, wave, noise, most):
    """Losses about the limit of `lost ground`, norms about that of `unstable`; three runs of 200 rows."""
    total = 0
    for seed in range(3):
        columns = sound(seed, noise=0.08, rows=420)
        after = np.arange(len(columns["step"]) - 200)
        level = np.median(columns[column][150:200]) * times * np.exp(wave * np.sin(after / 4))
        columns[column][200:] = level * np.exp(noise * np.random.default_rng(seed).standard_normal(len(after)))
        total += changes([name for name in names(rows_of(columns), 200) if name != "spike"])
    assert total <= most  # 42 and 16 without `hold`


def test_a_bin_is_held_against_the_mean():
    columns = sound(20, noise=0.3)
    assert "uneven" not in names(rows_of(columns), 180, 10)
    for name in ("loss", *(f"loss_t/{k}" for k in range(10))):
        columns[name][180:] *= 1.3
    for k in range(10):
        columns[f"loss_t/{k}"] = columns["loss"] * np.exp(0.05 * np.random.default_rng(k).standard_normal(300))
    assert "uneven" not in names(rows_of(columns), 180, 10)
    columns["loss_t/5"][180:] *= 1.3
    assert "uneven" in names(rows_of(columns), 180, 10)


def test_projections_may_be_late_and_null_tokens_may_rest():
    columns = sound(11, rows=60, spacing=1, noise=0.2)
    for name in ("cross_attention", "text", "time", "vision"):
        columns[f"grad/{name}"][:3] = columns[f"move/{name}"][:3] = 0.0
    columns["grad/null_text"][25:50] = 0.0
    assert {health.VERDICTS[name] for name in names(rows_of(columns))} == {"good"}
    columns["grad/null_text"][20:] = 0.0
    verdict = health.judge(rows_of(columns))
    assert verdict.name == "condition ignored" and "null_text" in verdict.words


def test_a_spike_in_a_hairy_run_is_larger_than_a_hair():
    columns = sound(12, noise=0.3)
    columns["grad_norm"][250] = 6 * np.median(columns["grad_norm"][100:250])
    assert "spike" not in names(rows_of(columns), 240)
    quiet = sound(12, noise=0.08)
    quiet["grad_norm"][230] = 3 * np.median(quiet["grad_norm"][100:230])
    assert "spike" not in names(rows_of(quiet), 225)
    quiet["grad_norm"][250] = 6 * np.median(quiet["grad_norm"][100:250])
    assert names(rows_of(quiet), 240)[11] == "spike"


def test_anything_can_be_missing():
    assert health.judge([]).name == "young"
    assert health.judge([{"step": 1}]).name == health.judge([{}]).name == "young"
    assert health.judge([{"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": None}]).name == "young"
    bare = ("step", "loss", "grad_norm", "learning_rate")
    rows = rows_of(sound(13))
    assert health.judge([{name: row[name] for name in bare} for row in rows]).level == "good"
    assert health.judge([row | {"health": "spike", "note": "x", "target_rms": "?"} for row in rows]).level == "good"
    rng = np.random.default_rng(0)
    for _ in range(5):
        thinned = [{k: None if rng.random() < 0.1 else v for k, v in row.items() if rng.random() < 0.7} for row in rows]
        health.judge(thinned)
        odd = [{k: rng.choice([0.0, math.nan, math.inf, -1.0, 1e300, v or 0]) for k, v in row.items()} for row in rows]
        health.judge([row | {"step": k} for k, row in enumerate(odd)])
    flat = [{"step": k, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4} for k in range(1, 400)]
    assert set(names(flat, 60)) == {"sound"}
    assert health.judge([row | {"grad_norm": 0.0} if row["step"] > 300 else row for row in flat]).name == "dying"
    assert health.judge([row | {"grad_norm": None, "loss": math.nan} for row in flat]).name == "voided"


def test_a_resumed_run_is_judged_by_the_last_word_on_each_step():
    rows = rows_of(sound(14))
    left = [row | {"grad_norm": 1e6, "loss": 1e3} for row in rows[200:240]]
    assert health.judge(rows[:240]) == health.judge(rows[:200] + left + rows[200:240])


def test_the_newest_two_thousand_rows_are_enough():
    rows = rows_of(sound(15, rows=2600))
    assert health.judge(rows) == health.judge(rows[-2000:])
    assert health.judge(rows).name == "sound"


def test_options_out_of_range_are_refused():
    for wrong in ({"window": 5}, {"patience": 1}, {"spike": 0.0}):
        with pytest.raises(ValueError, match="health"):
            health.judge([], **wrong)


def test_judging_is_cheap():
    """NumPy does it, not a loop over the rows: two milliseconds."""
    assert calls(health.judge, rows_of(sound(16, rows=2001))) < 5000


def alarms(seeds, every):
    """(healthy runs with each verdict that is not good, verdicts given), over random lengths, spacings and scales."""
    runs, given = Counter(), 0
    for seed in seeds:
        rng = np.random.default_rng(seed + 10**6)
        rows, spacing = int(rng.choice([60, 150, 400, 800])), int(rng.choice([1, 20, 50]))
        found = names(rows_of(sound(seed, rows=rows, spacing=spacing, scale=10 ** rng.uniform(-4, 4))), every=every)
        runs.update({name for name in found if health.VERDICTS[name] != "good"})
        given += len(found)
    return runs, given


def test_healthy_noise_raises_no_alarm():
    runs, _ = alarms(range(20), every=11)
    assert set(runs) <= {"spike"} and runs["spike"] <= 4  # the noise has outliers of its own


@pytest.mark.parametrize(
    "seed, rows, spacing", [(98, 800, 50), (27, 800, 20), (447, 150, 50), (531, 60, 20), (954, 400, 50)]
)
def test_noise_that_once_raised_an_alarm(seed, rows, spacing):
    """Losses with heavy tails and some memory: few rows of them say little about the level, and less about the noise."""
    rows = rows_of(sound(seed, rows=rows, spacing=spacing))
    found = names(rows[:80], 8) + names(rows, 81, 5)
    assert "act" not in {health.VERDICTS[name] for name in found}


@pytest.mark.all
def test_a_thousand_healthy_runs_raise_hardly_an_alarm():
    runs, given = alarms(range(1000), every=3)
    print(f"{dict(runs)} in {given:,} verdicts of 1,000 runs")
    assert sum(runs[name] for name in runs if health.VERDICTS[name] == "act") <= 2
    assert runs["spike"] <= 150


def recorded(name, every=1):
    rows = [json.loads(line) for line in (CURVES / f"{name}.jsonl").read_text().splitlines()]
    return rows[:1] + rows[1::every]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["healthy", "healthy_all"])
def test_a_recorded_healthy_run_is_sound_all_along(name, every):
    found = names(recorded(name, every))
    assert {health.VERDICTS[verdict] for verdict in found} == {"good"}
    assert changes(found) <= 2 and found[-1] == "sound"


def at_step(name):
    """{step: verdict} of a recorded run."""
    rows = recorded(name)
    return dict(zip((row["step"] for row in rows), names(rows)))


def test_a_recorded_spike_is_spoken_of_for_twenty_rows():
    rows = recorded("spike")
    words = [health.judge([row for row in rows if row["step"] <= step]).words for step in (601, 602)]
    assert "come back" not in words[0].split(". ")[0] and "it has come back" in words[1]
    verdicts = at_step("spike")  # one update at thirty times the size, then all is as before
    assert [step for step, name in verdicts.items() if name == "spike"] == list(range(601, 621))
    assert {health.VERDICTS[name] for name in verdicts.values() if name != "spike"} == {"good"}


def test_recorded_runs_at_too_high_a_rate_are_told_to_stop():
    verdicts = at_step("high_rate")  # 200 times the usual rate: wrecked at step 165, never well again until it decays
    assert {health.VERDICTS[verdicts[step]] for step in range(5, 165, 5)} == {"good"}
    assert all(health.VERDICTS[verdicts[step]] == "act" for step in range(225, 700, 5))
    assert verdicts[165] == "spike" and verdicts[180] == "diverged"
    rows = [row for row in recorded("high_rate") if row["step"] <= 180]
    kept = {"saved": (50, 100, 180), "averages": (50, 100, 150, 180)}
    assert "restore=WORKDIR@100" in health.judge(rows, **kept).words
    assert "init_from=WORKDIR@150" in health.judge(rows, **kept | {"saved": (180,)}).words
    assert "start again" in health.judge(rows, saved=(180,)).words
    verdicts = at_step("too_high_rate")  # 20 times: a spike at 120 does harm that the run makes good
    assert verdicts[120] == "spike"
    assert {health.VERDICTS[verdicts[step]] for step in range(700, 1000, 5)} == {"good"}


def test_recorded_wrong_data_are_told_from_a_wrong_rate():
    verdicts = at_step("wrong_data")  # latents ten times as large from step 600 to 900
    assert {health.VERDICTS[verdicts[step]] for step in range(5, 600, 5)} == {"good"}
    assert {verdicts[step] for step in range(620, 900, 5)} == {"data changed"}
    assert {health.VERDICTS[verdicts[step]] for step in range(905, 1000, 5)} == {"act"}


def test_a_recorded_run_that_memorises_is_told_after_its_best_step():
    rows = recorded("memorising")
    found = [health.judge(rows[:end]) for end in range(1, len(rows) + 1)]
    first = next(verdict for verdict in found if verdict.level != "good")
    assert first.name == "memorising" and first.since == 601
    assert changes([verdict.name for verdict in found]) <= 3 and found[-1].name == "memorising"


def test_the_page_explains_every_verdict():
    lines = PAGE.read_text().splitlines()
    explained = [line.split("|")[1].strip().strip("`") for line in lines if line.startswith("| `")]
    assert explained == list(health.VERDICTS)


def test_the_way_back_is_a_step_before_the_trouble_began_and_not_the_one_where_it_did():
    columns = sound(20, rows=220, noise=0.2)
    trouble_diverged(columns, 180, np.random.default_rng(1))
    rows = rows_of(columns)
    since = health.judge(rows).since
    assert f"restore=WORKDIR@{since - 1}" in health.judge(rows, saved=(since - 1, since)).words
    assert f"init_from=WORKDIR@{since - 1}" in health.judge(rows, saved=(since,), averages=(since - 1, since)).words
    assert "start again" in health.judge(rows, saved=(since,), averages=(since,)).words


def test_data_of_half_the_size_are_other_data_too():
    columns = sound(20, rows=220, noise=0.2)
    columns["target_rms"][180:] *= 0.5
    columns["loss"][180:] *= 0.25
    assert "data changed" in names(rows_of(columns), 181)[:8]


def test_three_huge_spikes_are_unstable_and_many_are_so_no_longer_than_they_last():
    columns = sound(7, noise=0.2)
    columns["grad_norm"][[200, 212, 224]] = 200 * np.median(columns["grad_norm"][100:200])
    assert health.judge(rows_of(columns)[:226]).name == "unstable"
    assert health.judge(rows_of(columns)[:290]).name in ("sound", "hairy")  # 64 rows later: it has come back


def memory_of(held_out, training):
    """The verdict on a sound run whose evaluations, every 25 rows, end with these."""
    columns = sound(18, rows=300, noise=0.1)
    for split, values in (("held_out", held_out), ("training", training)):
        column = columns[f"eval/{split}/ema/text_vision"]
        known = np.flatnonzero(np.isfinite(column))
        column[known[: -len(values)]] = 1.0
        column[known[-len(values) :]] = values
    columns["eval/held_out/raw/text_vision"][:] = np.nan
    return health.judge(rows_of(columns)).name


def test_what_is_learnt_by_heart_gets_worse_on_held_out_images_for_long_and_further_from_the_training_images():
    falling = [0.8, 0.75, 0.7, 0.65, 0.6]
    assert memory_of([0.8, 0.85, 0.9, 0.95, 1.0], falling) == "memorising"
    assert memory_of([0.8, 1.0, 0.95, 0.9, 0.85], falling) != "memorising"  # it comes down again
    assert memory_of([0.95, 0.9, 0.8, 0.85, 0.9], falling) != "memorising"  # twice is too soon to tell


def test_an_average_that_catches_up_is_not_behind():
    def verdict(behind, distance=(0.1, 0.2)):
        columns = sound(5, rows=330, noise=0.1)
        raw = columns["eval/held_out/raw/text_vision"]
        known = np.flatnonzero(np.isfinite(raw))[-len(behind) :]
        columns["eval/held_out/ema/text_vision"][known] = raw[known] * behind
        columns["eval/training/ema/text_vision"][known] = columns["eval/held_out/ema/text_vision"][known]
        columns["ema_distance"] = np.linspace(*distance, len(raw))
        return health.judge(rows_of(columns)).name

    assert verdict([1.2, 1.2, 1.2, 1.2, 1.2]) == "average behind"
    assert verdict([1.3, 1.25, 1.2, 1.15, 1.1]) != "average behind"  # the gap closes
    assert verdict([1.2, 1.2, 1.2, 1.2, 1.2], (0.2, 0.1)) != "average behind"  # the weights come nearer


def test_of_a_spike_that_came_back_it_is_said_and_of_one_that_stays_it_is_not():
    columns = sound(7, noise=0.1)
    columns["grad_norm"][200] = 100 * np.median(columns["grad_norm"][100:200])
    assert "it has come back" not in health.judge(rows_of(columns)[:201]).words
    assert "it has come back" in health.judge(rows_of(columns)[:203]).words
