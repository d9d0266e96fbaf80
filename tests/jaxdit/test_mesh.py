"""One mesh for one device and for many: the same numbers, parameters that are really cut, and the collectives expected."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import ROOT, WIDTHS, command, curve, tiny

from configs import full
from encode.records import InputError
from jaxdit import estimate, heldout, measure, mesh, metrics, model, optim, train, trained, update

MESHES = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (8, 1, 8)]  # devices, data, fsdp
SEPARATE = (2, 2, 1)  # with the layers taken apart, as on GPUs
MUON = [(1, 1, 1), (2, 2, 1), (4, 2, 2)]
LAYERS = 3
STEPS, MICRO_BATCHES, ROWS = 3, 2, 8
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(scope="module")
def found():
    """What `main` below finds on eight devices, by (devices, data, fsdp)."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {tuple(row["mesh"]): row for row in map(json.loads, done.stdout.splitlines())}


def main():
    """Train a tiny model a few steps on each mesh and look at how its arrays lie and what its programs send."""
    config = tiny("", **{"model.layers": LAYERS, "model.width": 64, "model.heads": 2})
    settings = trained.model_settings(config.model, WIDTHS)
    graph, shapes = model.abstract(settings)
    optimizer = optim.make_optimizer(lambda _: 1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    start = jax.tree.map(np.asarray, jax.jit(partial(update.new_state, settings, optimizer, 0))())
    for count, data, fsdp in MESHES:
        devices = mesh.make_mesh(data, fsdp, jax.devices()[:count])
        whole = mesh.gathering(devices, graph, shapes)
        zeros, accumulate, change, judge = mesh.compiled(
            devices,
            start,
            new_total=partial(update.new_total, separate=(count, data, fsdp) == SEPARATE, dtype="bfloat16"),
            accumulate=partial(update.accumulate_gradients, whole, dict(config.flow), 0),
            change=partial(update.apply_update, optimizer, lambda _: 1e-2, 0.999, MICRO_BATCHES * ROWS),
            judge=partial(heldout.losses, whole, dict(config.flow)),
        )
        state = jax.device_put(start, mesh.shardings(devices, start))
        rows, everywhere = mesh.over_batch(devices), mesh.replicated(devices)
        random, losses, programs = np.random.default_rng(0), [], []
        for step in range(STEPS):
            total = zeros(state["params"])
            for micro in range(MICRO_BATCHES):
                batch = jax.device_put(batch_of(random), rows)
                where = jax.device_put(np.array([step, micro * ROWS], np.int32), everywhere)
                if not programs:
                    programs = [accumulate.lower(state["params"], total, batch, where).compile()]
                    programs += [change.lower(state, total).compile()]
                total = programs[0](state["params"], total, batch, where)
            shard = {
                name: leaf.addressable_shards[0].data.shape for name, leaf in named({"state": state, "sums": total})
            }
            state, row = programs[1](state, total)
            losses.append([float(row["loss"]), float(row["grad_norm"])])
        found = {
            "mesh": (count, data, fsdp),
            "losses": losses,
            "shards": shard,
            "sent": [collectives(program.as_text()) for program in programs],
            "temporary": programs[0].memory_analysis().temp_size_in_bytes,
        }
        if count in (1, 8):
            numbers = jax.device_put(random.integers(2**32, size=(ROWS, 3), dtype=np.uint32), rows)
            judged, _ = judge(state["params"], batch, numbers, jax.device_put(np.zeros(3, np.float32), everywhere))
            found["judged"] = np.asarray(judged).tolist()
        if (count, data, fsdp) in MUON:
            found["muon"] = moved_by_muon(devices, settings, shapes, whole)
        print(json.dumps(found))


def moved_by_muon(devices, settings, shapes, whole):
    """By how much an update by Muon moves each parameter: its products want whole kernels, wherever their rows lie."""
    optimizer = optim.make_optimizer(
        lambda _: 1e-2, name="muon", b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0
    )
    fresh = partial(update.new_state, settings, optimizer, 0)
    start = jax.tree.map(np.asarray, jax.jit(fresh)())
    zeros, _, change, _ = mesh.compiled(
        devices,
        start,
        new_total=update.new_total,
        accumulate=partial(update.accumulate_gradients, whole, {}, 0),
        change=partial(update.apply_update, optimizer, lambda _: 1e-2, 0.999, ROWS),
        judge=partial(heldout.losses, whole, {}),
    )
    random = np.random.default_rng(1)
    gradients = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    state = jax.device_put(start, mesh.shardings(devices, start))
    total = zeros(state["params"])

    def laid(gradient, sums):
        parts = np.broadcast_to(gradient / (sums.shape[0] if devices.size > 1 else 1), sums.shape)
        return jax.device_put(parts, sums.sharding)

    total["gradients"] = jax.tree.map(laid, gradients, total["gradients"])
    state, _ = change(state, total)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state["params"], start["params"])
    return {name: leaf.ravel()[:: max(leaf.size // 50, 1)].tolist() for name, leaf in named(moved)}


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def batch_of(random):
    return {
        "latent": random.standard_normal((ROWS, 8, 8, 16), np.float32),
        "text": random.standard_normal((ROWS, 16, WIDTHS["text"]), np.float32),
        "text_length": random.integers(1, 17, ROWS).astype(np.int32),
        "vision": random.standard_normal((ROWS, WIDTHS["vision"]), np.float32),
    }


def collectives(text):
    """{"entry KIND" or "loop KIND": how many arrays} of a compiled program."""
    counts, place = Counter(), ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            place = "entry" if line.startswith("ENTRY") else "loop"
        sent = re.search(rf"= (\(?)(.*?)\)? ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if sent:
            counts[f"{place} {sent[3]}"] += sent[2].count("[") if sent[1] else 1
    return counts


def kernels(shards):
    """(names of the parameters that are to be cut, all names)."""
    names = [name.removeprefix("state/params/") for name in shards if name.startswith("state/params/")]
    return [name for name in names if name.endswith("kernel")], names


def test_losses_and_gradients_are_the_same_on_every_mesh(found):
    one = found[1, 1, 1]
    for row in found.values():
        np.testing.assert_allclose(row["losses"], one["losses"], rtol=1e-5)
        np.testing.assert_allclose(row.get("judged", one["judged"]), one["judged"], rtol=1e-5)
    assert len({loss for loss, _ in one["losses"]}) == STEPS


@pytest.mark.parametrize("sizes", MUON[1:])
def test_muon_moves_whole_kernels_on_every_mesh(found, sizes):
    ours, one = found[sizes]["muon"], found[1, 1, 1]["muon"]
    assert ours.keys() == one.keys() and max(map(max, one.values())) > 1e-3
    for name, moved in ours.items():
        np.testing.assert_allclose(moved, one[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 2, 2), (8, 1, 8)])
def test_parameters_moments_averages_and_sums_are_cut_over_fsdp(found, sizes):
    shards, whole = found[sizes]["shards"], found[1, 1, 1]["shards"]
    cut, names = kernels(shards)
    for name in names:
        divides = whole[f"state/params/{name}"][name.startswith("blocks")] % sizes[2] == 0  # rows, behind the layers
        for kept in ("state/params", "state/ema", "state/opt_state/1/0/mu", "state/opt_state/1/0/nu", "sums/gradients"):
            shape, full = shards[f"{kept}/{name}"], whole[f"{kept}/{name}"]
            share = sizes[2] if name in cut and divides else 1
            assert np.prod(shape) * share == np.prod(full), (kept, name)
            if name.startswith("blocks"):
                assert shape[-len(full)] == LAYERS
    size = {
        key: sum(np.prod(rows[f"state/params/{name}"]) for name in names) for key, rows in ((1, whole), (2, shards))
    }
    assert size[2] < size[1] / sizes[2] * (
        1.2 if sizes[2] == 2 else 1.5
    )  # biases and norms weigh more in a small model


def test_a_micro_batch_sends_what_fsdp_needs_and_an_update_sums_once(found):
    """A kernel of the blocks is gathered in the scan, once forward and once backward: a layer at a time, not all at once."""
    for (count, data, fsdp), row in found.items():
        cut, names = kernels(row["shards"])
        inside = sum(name.startswith("blocks") for name in cut)
        arrays = len(names)
        if (count, data, fsdp) == SEPARATE:
            arrays += (LAYERS - 1) * sum(name.startswith("blocks") for name in names)
        accumulate, change = row["sent"]
        if fsdp == 1:
            assert accumulate == {}  # whatever the number of micro-batches
            assert change == ({"entry all-reduce": arrays + 5} if data > 1 else {})  # each gradient, each kind of loss
        else:
            outside = len(cut) - inside - 2 * (fsdp == 8)  # text_in and vision_in have 12 and 6 rows
            assert accumulate == {
                "loop all-gather": 2 * inside,
                "loop reduce-scatter": inside,
                "entry all-gather": outside,
                "entry reduce-scatter": outside,
            }
            assert change.keys() == {"entry all-reduce"}  # gradients over data, and numbers such as norms


def test_a_mesh_that_cannot_be_is_refused_before_anything_is_touched(tmp_path):
    for changes in ({"mesh.fsdp": 3}, {"mesh.data": 2}, {"mesh.data": -1, "mesh.fsdp": -1}, {"mesh.data": 0}):
        with pytest.raises(InputError, match=r"mesh\.data=.* and mesh\.fsdp=.* do not make up 1 device"):
            train.train(tiny(tmp_path / "none", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.all
def test_a_run_on_a_mesh_goes_on_on_another_and_says_so(path, tmp_path, caplog):
    """Eight devices as 2 x 4, then one, then sixteen as 8 x 2."""
    options = {"train.batch_size": 16, "train.micro_batch": 16, "optim.warmup_steps": 0}
    whole = options | {"train.total_steps": 9}
    train.train(tiny(path, **whole), tmp_path / "one")

    def go_on(count, fsdp, steps):
        flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
        arguments = command(path, tmp_path / "run", **whole | {"mesh.fsdp": fsdp, "train.total_steps": steps})
        environment = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = go_on(8, 4, 9)
    assert "8 x cpu (data 2 x fsdp 4)" in said and "vision_in/kernel" in said and "Saved on" not in said
    losses, alone = ([row[1] for row in curve(tmp_path / name, "loss")] for name in ("run", "one"))
    np.testing.assert_allclose(losses, alone, rtol=1e-4)

    caplog.set_level("INFO")
    train.train(tiny(path, **whole | {"train.total_steps": 11}), tmp_path / "run")
    assert (
        "Saved on 8 x cpu (data 2 x fsdp 4), going on with 1 x cpu" in caplog.text and "not bit for bit" in caplog.text
    )
    said = go_on(16, 2, 13)
    assert "Saved on 1 x cpu, going on with 16 x cpu (data 8 x fsdp 2)" in said
    assert [row["step"] for row in metrics.read(tmp_path / "run")] == list(range(1, 14))
    # The whole position is how many samples each bucket has given: every one of them, whatever the devices.
    folder = tmp_path / "run" / "checkpoints" / "13" / "data"
    (kept,) = (json.loads(file.read_text()) for file in folder.iterdir() if file.name == "metadata")
    assert sum(kept["position"]["taken"].values()) == 13 * 16


@pytest.mark.all
def test_the_plan_measures_the_mesh_of_the_run_and_its_estimate_holds_there():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__, "measure"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, compiled, by_hand, rate = json.loads(line)
        assert rate > 0 and 0.85 * compiled < by_hand < (1.15 if name == "adamw" else 1.5) * compiled, line


def measured():
    """What `jaxdit.plan --measure` finds on eight devices: bytes of each by the compiled programs, by hand, images a second."""
    measure.UPDATES = 1
    config = full.get_config("256")
    config.model.update({"layers": 4, "width": 256, "heads": 4, "dtype": "float32"})
    config.train.update({"batch_size": 16, "micro_batch": 16})
    bucket = measure.Bucket("128x128", 1, (32, 32, 16), 64)
    for data, fsdp, name in ((1, 8, "adamw"), (2, 4, "adamw"), (1, 8, "muon")):
        config.mesh.update({"data": data, "fsdp": fsdp})
        config.optim.name = name
        found = measure.measure(config, [bucket], WIDTHS)[bucket.name]
        settings = trained.model_settings(config.model, WIDTHS, fsdp)
        held, how = mesh.held(model.abstract(settings)[1], fsdp), {"remat": settings["remat"], "optimizer": name}
        parts = estimate.memory(settings, held, 2, bucket.latent, bucket.text, **how)
        print(json.dumps([name, found.memory, sum(parts.values()), found.rate]), flush=True)


if __name__ == "__main__":
    measured() if "measure" in sys.argv else main()


@pytest.mark.parametrize(
    ("before", "platforms", "refused"),
    [
        ("1 x NVIDIA GeForce RTX 4090", "", True),
        ("8 x NVIDIA H100 (data 2 x fsdp 4) in 2 processes", "cuda,cpu", True),
        ("1 x NVIDIA GeForce RTX 4090", "cpu", False),
        ("2 x cpu (data 1 x fsdp 2)", "", False),
        ("16 devices (data 8 x fsdp 2)", "", False),  # until November 2026 the kind was not kept
        ("1 device", "", False),
        ("", "", False),
    ],
)
def test_a_run_that_lost_its_card_does_not_go_on_unasked(monkeypatch, before, platforms, refused):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if not refused:
        return mesh.refuse_lost_card(before)
    with pytest.raises(InputError, match=r"was saved on .*, and JAX finds only this machine's CPU"):
        mesh.refuse_lost_card(before)


def test_what_was_written_before_kinds_were_told_is_compared_without_them():
    one = mesh.make_mesh()
    assert mesh.describe(one) == "1 x cpu" and mesh.describe(one, like="8 x cpu (data 1 x fsdp 8)") == "1 x cpu"
    assert mesh.describe(one, like="1 device") == "1 device"
    assert mesh.describe(one, like="2 devices (data 1 x fsdp 2)") == "1 device"


def test_the_cpu_may_be_asked_for_before_others_and_was_no_card_before(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,cuda")
    mesh.refuse_lost_card("8 x NVIDIA H100 (data 1 x fsdp 8)")
    monkeypatch.delenv("JAX_PLATFORMS")
    mesh.refuse_lost_card("4 x cpu (data 4 x fsdp 1)")


def test_nothing_for_the_rest_is_a_sentence_and_no_division(tmp_path):
    with pytest.raises(InputError, match=r"mesh.data=-1 and mesh.fsdp=0 do not make up 8 devices"):
        mesh.sizes(-1, 0, 8)
    assert mesh.sizes(-1, 2, 8) == (4, 2) and mesh.sizes(4, -1, 8) == (4, 2)


def test_compiled_programs_are_kept_where_jax_was_told_and_else_in_the_cache():
    told = jax.config.jax_compilation_cache_dir
    try:
        for before, after in (("/somewhere", "/somewhere"), (None, str(Path("~/.cache/jaxdit/compiled").expanduser()))):
            jax.config.update("jax_compilation_cache_dir", before)
            mesh.keep_programs()
            assert jax.config.jax_compilation_cache_dir == after
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


def test_the_dtype_of_products_is_float32_on_the_cpu_and_an_unknown_one_is_refused(monkeypatch):
    assert mesh.compute_dtype("auto") == mesh.compute_dtype("float32") == "float32"
    assert mesh.compute_dtype("bfloat16") == "bfloat16"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert mesh.compute_dtype("auto") == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.dtype=float64: choose auto, bfloat16 or float32"):
        mesh.compute_dtype("float64")


def test_a_kernel_is_sent_as_it_is_multiplied_and_its_gradient_comes_back_in_float32():
    rows, gather = jax.sharding.PartitionSpec("fsdp"), mesh._gather(-2, "bfloat16")
    over = jax.shard_map(
        partial(gather, None), mesh=mesh.make_mesh(), in_specs=rows, out_specs=jax.sharding.PartitionSpec(), check_vma=False
    )  # fmt: skip
    value = np.ones((4, 2), np.float32)
    assert jax.eval_shape(over, value).dtype == "bfloat16"
    program = str(jax.make_jaxpr(jax.grad(lambda value: over(value).sum()))(value))
    assert re.search(r"bf16\[4,2\] = all_gather", program) and re.search(r"f32\[4,2\] = reduce_scatter", program)


def test_a_card_that_is_there_or_none_that_was_lost_refuses_nothing(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    mesh.refuse_lost_card("1 x NVIDIA GeForce RTX 4090")


def test_kernels_are_cut_over_their_rows_and_never_over_the_layers():
    def kernel(*shape):
        return {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}

    found = mesh._specs(
        SimpleNamespace(shape={"data": 2, "fsdp": 4}),
        {"blocks": {"mlp": kernel(4, 8, 12), "odd": kernel(4, 6, 12)}, "out": kernel(8, 12)},
    )
    cut = {name: spec["kernel"] for name, spec in (found["blocks"] | {"out": found["out"]}).items()}
    spec = jax.sharding.PartitionSpec
    assert cut == {"mlp": spec(None, "fsdp"), "odd": spec(), "out": spec("fsdp")}
