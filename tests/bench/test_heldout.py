import json
from types import SimpleNamespace

from bench import gate_power, heldout, optimizers


def test_each_setting_is_what_its_name_says_and_trained_once_a_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDIT_BENCH_RESULTS", str(tmp_path))
    monkeypatch.setattr(gate_power, "photographs", lambda folder, count: tmp_path)
    asked = []

    def trained(config, _):
        asked.append((config.train.seed, config.flow.direction, config.model.heads, config.model.width))
        return {"held-out loss": {}}

    monkeypatch.setattr(optimizers, "trained", trained)
    given = SimpleNamespace(settings=["direction 2"], seeds=1, steps=20)
    monkeypatch.setattr(heldout, "flags", SimpleNamespace(FLAGS=given))
    assert heldout.main() == 0
    given.settings, given.seeds = ["direction 2", "squares", "heads of 128"], 2
    assert heldout.main() == 0
    (file,) = tmp_path.glob("heldout-*.json")
    rows = [(row["setting"], row["seed"]) for row in json.loads(file.read_text())["trainings"]]
    assert rows == [
        ("direction 2", 0),
        *(("squares", 0), ("2 heads of 128", 0)),
        *(("squares", 1), ("direction 2", 1), ("2 heads of 128", 1)),
    ]
    assert asked[:3] == [(0, 2.0, 3, 192), (0, 0.0, 3, 192), (0, 0.0, 2, 256)]
