import pytest

from bench import train_step
from configs import nano
from jaxdit import estimate, model, trained


@pytest.fixture(scope="module")
def config():
    small = nano.get_config()
    small.model.update({"layers": 2, "width": 64, "heads": 2})
    return small


def test_our_side_trains_and_knows_its_costs(config):
    run, facts, _ = train_step.ours(config, train_step.noise(32, 2, 8), accumulation=2)
    run(2)
    settings = dict(config.model) | {"channels": 16, "text_width": 1024, "vision_width": 1024, "dtype": "float32"}
    assert facts["flops an image"] == estimate.training_flops(settings, (4, 4, 16), 8)
    assert facts["peak flops"] > 0 and facts["GB by the compiled program"] > facts["GB of temporaries"] > 0
    assert facts["products"] == "float32"


@pytest.mark.parametrize("name", ["torch_dit eager", "diffusers pixart eager"])
def test_the_peers_train_the_same_size(config, name):
    from bench import peers  # diffusers' models take seconds to import

    run, facts = peers.prepare(name, config.model, config.optim, train_step.WIDTHS, train_step.noise(32, 2, 8), 2)
    run(2)
    _, shapes = model.abstract(trained.model_settings(config.model, train_step.WIDTHS))
    assert name in train_step.PEERS[2:] or facts["parameters"] == model.count_parameters(shapes)
    assert facts["products"] == "float32" and facts["threads"] > 0


def test_ratios_set_our_best_against_their_best():
    rates = {
        "jaxdit none unroll 1": 3.0,
        "jaxdit block unroll 1": 2.0,
        "torch_dit eager": 2.0,
        "torch_dit compiled": 2.5,
        "diffusers pixart eager": 4.0,
    }
    found = {name: {"images a second": rate, "at best": 2 * rate} for name, rate in rates.items()}
    ratios = train_step.ratios(found | {"diffusers pixart compiled": {"problem": "no compiler"}})
    assert ratios == {
        "images a second, jaxdit over the same in PyTorch": 1.2,
        "images a second, jaxdit over PixArt": 0.75,
        "at best, jaxdit over the same in PyTorch": 1.2,
        "at best, jaxdit over PixArt": 0.75,
    }


def test_a_side_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(train_step.Side, "__init__", lambda self: None)
    side = train_step.Side()
    side.problem = ""
    side.process = type("Process", (), {"stdout": ["warning\n", "MemoryError: no memory\n", "\n"]})
    assert side._answer() == {} and side.problem == "MemoryError: no memory"


@pytest.mark.parametrize(
    ("platform", "share", "expected"),
    [
        (
            "cpu",
            "",
            "begin A, ready A, begin B, ready B, A, B, B, A, close A, close B",
        ),  # one after the other, then turns
        ("cuda", "0.28", "begin A, begin B, ready A, ready B, A, B, B, A, close A, close B"),  # the card holds both
        ("cuda", "0.9", "begin A, ready A, A, A, close A, begin B, ready B, B, B, close B, close A, close B"),
    ],
)
def test_sides_take_turns_where_the_memory_holds_all(monkeypatch, platform, share, expected):
    done = []

    class Side:
        facts, problem, rounds = {}, "none ran", []

        def __init__(self, name, *_):
            self.name = name
            done.append(f"begin {name}")

        def get_ready(self):
            done.append(f"ready {self.name}")

        def take_turn(self, _):
            done.append(self.name)

        def close(self):
            done.append(f"close {self.name}")

    monkeypatch.setattr(train_step, "Side", Side)
    monkeypatch.setattr(train_step.flags, "FLAGS", type("Flags", (), {"accumulation": 1}))
    environment = {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_MEM_FRACTION": share}
    train_step.case(["A", "B"], 256, 8, environment, rounds=2, updates=1)
    assert ", ".join(done) == expected
