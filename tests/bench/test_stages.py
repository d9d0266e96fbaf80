import json
from types import SimpleNamespace

import make_data
import pytest

from bench import gate_power, optimizers, stages
from jaxdit import origin


@pytest.mark.all
def test_two_stages_cost_what_one_does_and_are_judged_in_the_large_size(small_trainings, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "EVERY", 4)
    for side in (32, 64):
        make_data.dataset(tmp_path / str(side), {f"{side}x{side}": 40})
    monkeypatch.setattr(gate_power, "photographs", lambda folder, count, sizes: tmp_path / str(sizes[-1]))
    looked, trained = [], optimizers.trained

    def watched(config, workdir):
        found = trained(config, workdir)
        looked.append((config, origin.read(workdir)))
        return found

    monkeypatch.setattr(optimizers, "trained", watched)
    given = SimpleNamespace(sizes=["32", "64"], shares=["0", "0.5"], rates=["5e-3"], seeds=["3"], steps=24)
    monkeypatch.setattr(stages, "flags", SimpleNamespace(FLAGS=given))
    assert stages.main() == 0
    (file,) = tmp_path.glob("stages-*.json")
    alone, climbed = json.loads(file.read_text())["trainings"]
    assert alone["steps"] == [24] and climbed["steps"][1] == 12
    (whole, _), (small, _), (large, came) = looked
    assert climbed["steps"][0] * stages.operations(small) == pytest.approx(
        12 * stages.operations(large), abs=stages.operations(small)
    )
    assert climbed["steps"][0] > 12
    assert {config.train.seed for config, _ in looked} == {3}
    assert alone["samples"] == 4 * 24 and climbed["samples"] == 4 * sum(climbed["steps"])
    assert list(alone["held-out loss"]) == ["4", "8", "12", "16", "20", "24"]
    assert list(climbed["held-out loss"]) == ["4", "8", "12"]
    assert (whole.flow.shift, small.flow.shift, large.flow.shift) == (3.0, 1.5, 3.0)
    assert small.train.total_steps == climbed["steps"][0] and "32" in json.dumps(came)
    monkeypatch.setattr(
        optimizers, "trained", None
    )  # what is done is not made again, nor one stage at the rate of a second
    given.rates, given.shares = ["5e-3", "1e-3"], ["0"]
    assert stages.main() == 0
