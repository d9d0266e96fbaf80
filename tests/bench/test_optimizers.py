import json
from types import SimpleNamespace

import make_data

from bench import gate_power, optimizers


def test_a_training_is_judged_on_held_out_images_and_made_once(small_trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "EVERY", 2)
    make_data.dataset(tmp_path / "64", {"64x64": 40})
    monkeypatch.setattr(gate_power, "photographs", lambda folder, count: tmp_path / "64")
    given = SimpleNamespace(names=["muon"], rates=["1e-2"], steps=10)
    monkeypatch.setattr(optimizers, "flags", SimpleNamespace(FLAGS=given))
    assert optimizers.main() == 0
    (file,) = tmp_path.glob("optimizers-*.json")
    (row,) = json.loads(file.read_text())["trainings"]
    assert row["optimizer"] == "muon" and row["images a second, at best"] > 0
    assert list(row["held-out loss"]) == ["2", "4", "6", "8", "10"]
    assert row["held-out loss"]["10"] < row["held-out loss"]["2"]
    found = [loss for loss in row["at the end, by tenths of t"] if loss is not None]
    assert len(row["at the end, by tenths of t"]) == 10 and min(found) <= row["held-out loss"]["10"] <= max(found)
    given.names = ["muon", "adamw"]
    monkeypatch.setattr(optimizers, "trained", lambda config, folder: {"peak": config.optim.peak_learning_rate})
    assert optimizers.main() == 0
    assert json.loads(file.read_text())["trainings"] == [
        row,
        {"optimizer": "adamw", "rate": 0.01, "peak": 0.01},
    ]
