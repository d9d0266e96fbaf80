"""What a run may cost, held by counters instead of clocks: programs, transfers, buffers, operations, bytes, waiting reads.

One real training run is watched from outside, then programs of nano's width are held against the plan's arithmetic.
"""

import threading
from collections import Counter, deque
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import make_data
import pytest
from jax._src.array import ArrayImpl
from tiny_run import tiny

from jaxdit import attention, estimate, mesh, model, optim, train, trained, update

BUCKETS = {"64x64": 9, "48x80": 6, "80x48": 5}
STEPS, MICRO_BATCHES, LOG_EVERY = 24, 2, 4
OURS = {"accumulate_gradients", "apply_update", "new_total", "new_state", "losses"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run of three buckets, watched: each list has (updates until then, what happened).

    `quiet` are the steps after every shape has come, but for the last, which saves.
    """
    root = tmp_path_factory.mktemp("counted")
    make_data.dataset(root / "64", BUCKETS)
    seen = SimpleNamespace(
        compiled=[], put=[], read=[], blocked=[], donated=[], arrays=[], shapes={}, rows=deque(maxlen=2), updates=0
    )
    with pytest.MonkeyPatch.context() as patch:
        watch(seen, patch)
        changes = {"train.total_steps": STEPS, "train.log_every": LOG_EVERY, "checkpoint.every": 1000}
        changes |= {"data.holdout_fraction": 0.0, "train.eval_every": 0}
        try:
            assert train.train(tiny(root / "64", **changes), root / "run") == "done"
        finally:
            jax.monitoring.unregister_event_duration_listener(seen.listener)
    seen.quiet = range(max(seen.shapes.values()) + 2, STEPS)
    assert len(seen.shapes) == len(BUCKETS) and len(seen.quiet) > 8
    return seen


def watch(seen, patch):
    """Count what the training loop does, on its thread alone: checkpoints are written by others."""
    main, jit, put, block = threading.current_thread(), jax.jit, jax.device_put, jax.block_until_ready
    value = ArrayImpl._value  # where every read of an array by the host passes

    def note(kind, what):
        if threading.current_thread() is main:
            getattr(seen, kind).append((seen.updates, what))

    def counting_jit(function, **options):
        compiled, donated = jit(function, **options), options.get("donate_argnums")
        if donated is None:
            return compiled

        def call(*arguments):
            found = compiled(*arguments)
            first = donated if isinstance(donated, int) else donated[0]
            note("donated", all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[first])))
            if isinstance(found, tuple):  # an update: (state, row)
                seen.rows.append(found[1])
                seen.updates += 1
                note("arrays", (len(jax.live_arrays()), sum(leaf.nbytes for leaf in jax.live_arrays())))
            else:
                seen.shapes.setdefault((arguments[2]["latent"].shape, arguments[2]["text"].shape), seen.updates)
            return found

        return call

    def reading(array):
        note("read", len(seen.rows) == 2 and any(array is leaf for leaf in seen.rows[0].values()))
        return value.fget(array)

    def listen(event, duration, **about):
        if event.endswith("backend_compile_duration"):
            note("compiled", about.get("fun_name", "?").removeprefix("jit(").removesuffix(")"))

    seen.listener = listen
    jax.monitoring.register_event_duration_secs_listener(listen)
    patch.setattr(mesh, "compiled", mesh.compiled.__wrapped__)
    patch.setattr(update, "new_state", update.new_state.__wrapped__)
    patch.setattr(jax, "jit", counting_jit)
    patch.setattr(jax, "device_put", lambda *a, **k: (note("put", type(a[0]).__name__), put(*a, **k))[1])
    patch.setattr(jax, "block_until_ready", lambda tree: (note("blocked", ""), block(tree))[1])
    patch.setattr(ArrayImpl, "_value", property(reading))


def test_each_function_is_compiled_once_a_shape_and_none_after_that(seen):
    count = Counter(name for _, name in seen.compiled)
    assert OURS - {"losses"} <= count.keys()
    assert all(count[name] <= len(seen.shapes) + 1 for name in OURS), count
    assert count["accumulate_gradients"] == len(seen.shapes) and count["apply_update"] == 1
    assert [name for step, name in seen.compiled if step in seen.quiet] == []


def test_a_micro_batch_is_two_copies_to_the_device(seen):
    copies = Counter(step for step, _ in seen.put if step in seen.quiet)
    assert copies == dict.fromkeys(seen.quiet, 2 * MICRO_BATCHES)  # the batch, and where it stands


def test_a_batch_that_is_not_placed_is_an_error(tmp_path, monkeypatch):
    make_data.dataset(tmp_path / "64", {"64x64": 9})
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *rest: x if isinstance(x, dict) else put(x, *rest))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train.train(tiny(tmp_path / "64"), tmp_path / "run")


def test_the_programs_ask_the_host_for_nothing():
    step, shapes = gradients(NANO | {"layers": 2}, 2, (16, 16, 16), 8)
    names = {type(effect).__name__ for effect in jax.make_jaxpr(step)(*shapes).effects}
    assert names <= {"InternalMutableArrayEffect"}  # gradients are added in place, within the program
    change, shapes = applied(NANO | {"layers": 2})
    assert not jax.make_jaxpr(change)(*shapes).effects


def test_buffers_do_not_grow_from_step_to_step_and_the_old_ones_are_given_away(seen):
    assert len(seen.donated) == STEPS * (MICRO_BATCHES + 1) and all(given for _, given in seen.donated)
    counts, sizes = zip(*(alive for step, alive in seen.arrays if step in seen.quiet))
    # A logged row may live a step longer than another, and a batch is of one bucket or of another.
    assert max(counts) - min(counts) <= 40 and max(sizes) - min(sizes) < 20_000, (counts, sizes)


def test_the_host_reads_one_number_a_step_and_only_of_the_step_before(seen):
    for step in seen.quiet:
        read = [before for at, before in seen.read if at == step]
        assert read and all(read), f"after the update of step {step} the host waits for another step than {step - 1}"
        assert len(read) == 1 or (step - 1) % LOG_EVERY == 0
    assert not [step for step, _ in seen.blocked if step in seen.quiet]


NANO = {
    "layers": 12,
    "width": 384,
    "heads": 6,
    "patch": 2,
    "channels": 16,
    "text_width": 1024,
    "vision_width": 1024,
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 1,
    "attention": "xla",
}
FLOW = {"mean": 0.0, "std": 1.0, "shift": 1.0, "drop_both": 0.1, "drop_text": 0.1, "drop_vision": 0.1}


def gradients(settings, count, latent, text):
    """The trainer's sum over a micro-batch and the shapes that it takes."""
    graph, params = model.abstract(settings)
    shape = jax.ShapeDtypeStruct
    batch = {
        "latent": shape((count, *latent), jnp.float32),
        "text": shape((count, text, settings["text_width"]), jnp.bfloat16),
        "text_length": shape((count,), jnp.int32),
        "vision": shape((count, settings["vision_width"]), jnp.float32),
    }
    total = jax.eval_shape(partial(update.new_total, params, separate=trained.separate(settings)))
    step = partial(update.accumulate_gradients, graph, FLOW, 0)
    return step, (params, total, batch, shape((2,), jnp.int32))


def applied(settings):
    """The trainer's update and the shapes that it takes."""
    schedule = optim.learning_rate(peak=1e-3, end=1e-5, warmup=1, total=100)
    optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.03, clip_norm=1.0)
    state = jax.eval_shape(partial(update.new_state, settings, optimizer, 0))
    total = jax.eval_shape(partial(update.new_total, state["params"]))
    return partial(update.apply_update, optimizer, schedule, 0.999, 8), (state, total)


@pytest.mark.parametrize(
    ("latent", "text", "remat"),
    [
        ((32, 32, 16), 64, "none"),
        ((32, 32, 16), 64, "block"),
        pytest.param((16, 24, 16), 40, "none", marks=pytest.mark.all),
    ],
)
def test_operations_of_the_compiled_step_are_those_that_we_count(monkeypatch, latent, text, remat):
    """XLA counts the body of a loop once, however often it runs: three layers as one, and so all heads at once.

    It counts sums and products of single numbers too (1% here), and what attention's backward pass and remat compute
    again: that is `hardware_flops`. The MFU's count, `training_flops`, is the same without the repetition.
    """
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", 2**40)
    one = NANO | {"layers": 1, "remat": remat}
    step, shapes = gradients(one | {"layers": 3}, 2, latent, text)
    counted = jax.jit(step, donate_argnums=1).lower(*shapes).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(2 * estimate.hardware_flops(one, latent, text, remat=remat), rel=0.03)
    if remat == "none":
        assert counted == pytest.approx(2 * estimate.training_flops(one, latent, text), rel=0.05)


# Of small pictures the update needs more than the gradients; test_estimate.py holds that program.
PROGRAMS = [  # layers, micro-batch, latent, text, remat
    (2, 4, (32, 32, 16), 64, "none"),
    (12, 8, (32, 32, 16), 64, "block"),
    pytest.param(12, 8, (32, 32, 16), 64, "none", marks=pytest.mark.all),
    pytest.param(12, 2, (64, 64, 16), 64, "none", marks=pytest.mark.all),
    pytest.param(12, 8, (64, 64, 16), 128, "block", marks=pytest.mark.all),
    pytest.param(24, 2, (48, 80, 16), 192, "block", marks=pytest.mark.all),
]


@pytest.mark.parametrize(("layers", "count", "latent", "text", "remat"), PROGRAMS)
def test_memory_of_the_compiled_step_is_what_the_plan_says(layers, count, latent, text, remat):
    settings = NANO | {"layers": layers, "remat": remat}
    step, shapes = gradients(settings, count, latent, text)
    params, _, batch, _ = shapes
    sizes = jax.jit(step, donate_argnums=1).lower(*shapes).compile().memory_analysis()
    parameters, temporaries = model.count_parameters(params), sizes.temp_size_in_bytes
    program = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + temporaries
    plan = estimate.memory(settings, parameters, count, latent, text, remat=remat)
    # Beside it lie moments and average, and the next batch. What is known exactly must not hide a fault in the rest.
    beside = 3 * 4 * parameters + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    assert sum(plan.values()) == pytest.approx(program + beside, rel=0.15)
    assert plan["activations"] == pytest.approx(temporaries, rel=0.15)  # no second copy of the gradients
