from bench import scaling
from jaxdit import estimate


def test_a_stand_in_is_opened_read_and_resumed_and_its_position_stays_small(tmp_path):
    found = {}
    for count in (40, 4_000):
        root = tmp_path / str(count) / "64"
        root.mkdir(parents=True)
        scaling.stand_in(root, count)
        found[count] = scaling.start(root)
    assert all(value >= 0 for name, value in found[40].items() if name.endswith(", s"))
    digits = 3 * (1 + scaling.BUCKETS)  # the numbers are a hundred times as large
    assert found[4_000]["bytes of the position"] <= found[40]["bytes of the position"] + digits


def test_a_step_compiles_one_program_a_bucket_and_counts_its_work():
    step = scaling.Step(tokens=16, batch=2, layers=1, buckets=2)
    assert step.accumulate._cache_size() == 2
    assert len({h * w for h, w in step.sides}) == 1  # as many tokens in each shape
    assert step.flops == 2 * estimate.training_flops(
        scaling.MODEL | {"layers": 1, "channels": 16, "text_width": 1024, "vision_width": 1024}, (8, 8, 16), 64
    )
    table = scaling.table({"16": {"milliseconds": 12.5, "programs": 3}, "4": {"milliseconds": 1234.5, "programs": 12}})
    assert len({len(line) for line in table.splitlines()}) == 1 and "1,234.5" in table
