import pytest

from bench import gate_power, listen
from jaxdit import judge


def row(step, share, margin):
    checks = dict.fromkeys(judge.THRESHOLDS, share) | {"memory_margin": margin}
    return {"step": step, "samples": 8 * step, "seconds": step / 10, "averaged": checks}


def test_a_check_passes_from_the_look_after_its_last_failure():
    rows = [row(100, 0.99, 0.4), row(200, 0.5, 0.9), row(300, 0.82, 0.6), row(400, 1.0, 0.3)]
    found = listen.first_passes(rows, "averaged", 80.0)
    assert found["vision_light"] == {"samples": 2400, "seconds": 30.0}  # the pass at 100 was chance
    assert found["memory_latent"] == {"samples": 3200, "seconds": 40.0}
    assert found["memory_margin"] == {"samples": 3200, "seconds": 40.0}  # at most a half
    assert listen.first_passes(rows[:2], "averaged", 80.0)["vision_light"] is None
    assert listen.first_passes(rows[3:], "averaged", 80.0)["vision_light"] == {"samples": 3200, "seconds": 40.0}


def test_seconds_are_those_of_the_fastest_stretch_of_a_settings_trainings():
    slow = [row(100, 0.9, 0.4) | {"seconds": 50.0}, row(200, 0.9, 0.4) | {"seconds": 150.0}]
    quick = [row(100, 0.2, 0.4) | {"seconds": 10.0}, row(200, 0.9, 0.4) | {"seconds": 30.0}]
    other = [row(100, 0.9, 0.4) | {"seconds": 90.0}, row(200, 0.9, 0.4) | {"seconds": 100.0}]  # costs something else
    curves = {"shift 1": {"0": slow, "1": quick}, "muon": {"0": other}}
    assert listen.fastest(curves["shift 1"]) == 40.0
    for rows in (slow, quick, other):
        for one in rows:
            one |= {"raw": one["averaged"], "guided": one["averaged"]}
    found = listen.firsts(curves)
    assert found["shift 1"]["0"]["averaged"]["vision_light"] == {"samples": 800, "seconds": 20.0}
    assert found["shift 1"]["1"]["raw"]["vision_light"] == {"samples": 1600, "seconds": 40.0}
    assert found["muon"]["0"]["raw"]["vision_light"] == {"samples": 800, "seconds": 10.0}


def test_the_plot_has_a_line_a_setting():
    curves = {name: {"0": [row(100, 0.2, 1.0), row(200, 0.9, 0.4)]} for name in ("shift 1", "shift 3")}
    page = listen.plot({"curves": curves})
    assert page.count("shift 3") >= 4 and "<svg" in page


def test_a_training_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_power.train, "train", lambda config, workdir: "stopped")
    with pytest.raises(KeyboardInterrupt):
        listen.listen(tmp_path, tmp_path / "run", {}, steps=9, every=3, seed=0)
