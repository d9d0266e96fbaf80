import pytest

from bench import gate_power, optimizers


@pytest.fixture
def small_trainings(tmp_path, monkeypatch):
    """The trainings of bench.optimizers with a tiny model, four images at a time, a row a step, and results in tmp_path."""
    monkeypatch.setenv("JAXDIT_BENCH_RESULTS", str(tmp_path))
    monkeypatch.setattr(optimizers, "BATCH", 4)
    monkeypatch.setattr(gate_power, "SIZE", {"layers": 1, "width": 32, "heads": 2})
    configured = gate_power.configured

    def quick(*arguments, **named):
        config = configured(*arguments, **named)
        config.train.log_every = 1
        return config

    monkeypatch.setattr(gate_power, "configured", quick)
