"""An exported model draws what ours draws, without JAX and without this repository; and comes back bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import exported_run
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import load_file, save_file

from encode.records import InputError
from encode.whole_files import write_json
from jaxdit import card, checkpoint, export, model, origin, sampler, trained
from torch_dit.pipeline import DiTModel

ROOT = Path(__file__).parents[2]
PROMPT, SEED, SIZE = "a red kite on the left", 5, (48, 80)
# Runs in the exported folder: JAX cannot be imported, and of our packages only what lies there.
ALONE = """
import sys
for name in ("jax", "jaxlib", "flax", "jaxdit", "encode"):
    sys.modules[name] = None
sys.path.insert(0, ".")
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    return exported_run.make(root / "run", exported_run.demo_dataset(root / "64"))


def command(*arguments):
    words = [sys.executable, "-m", "jaxdit.export", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def exported(workdir):
    out = workdir.parent / "exported"
    done = command(f"--workdir={workdir}", f"--out={out}")
    assert done.returncode == 0 and "step 40, averaged weights" in done.stdout, done.stderr
    return out


@pytest.fixture(scope="module")
def imported(exported):
    new = exported.parent / "imported"
    done = command(f"--import={exported}", f"--workdir={new}")
    assert done.returncode == 0 and "step 40" in done.stdout, done.stderr
    return new


@pytest.fixture(scope="module")
def reference(workdir):
    pixels = np.random.default_rng(3).integers(0, 256, (9, 14, 3), np.uint8)
    path = workdir.parent / "evening.png"
    Image.fromarray(pixels).resize((140, 90)).save(path)
    return path


def alone(folder, code):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def noise(seed=SEED, size=SIZE):
    """What jaxdit.sample starts from, as PyTorch lays it out."""
    shape = (size[1] // 8, size[0] // 8, 16)
    return np.asarray(sampler.initial_noise(np.array([seed], np.uint32), np.zeros(1, np.int32), shape)).transpose(
        0, 3, 1, 2
    )


def test_the_exported_module_has_our_velocity(workdir, exported):
    run = trained.load(workdir)
    theirs = DiTModel.from_pretrained(exported / "transformer", low_cpu_mem_usage=False).eval()
    rng = np.random.default_rng(1)
    x, text, vision = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((3, 6, 10, 16), (3, 7, 128), (3, 16))
    )
    t, length = np.array([0.02, 0.5, 1.0], np.float32), np.array([7, 1, 4], np.int32)
    drops = np.array([False, False, True]), np.array([False, True, False])
    ours = nnx.merge(run.graph, run.params)(x, t, {"text": text, "text_length": length, "vision": vision}, *drops)
    with torch.no_grad():
        found = theirs(*map(torch.from_numpy, (x.transpose(0, 3, 1, 2).copy(), t, text, length, vision, *drops)))
    assert np.asarray(ours).std() > 0.3
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), ours, rtol=0, atol=1e-4)


def test_the_folder_alone_draws_what_jaxdit_sample_draws_of_the_imported_one(exported, imported, reference, tmp_path):
    np.save(tmp_path / "noise.npy", noise())
    said = alone(exported, f"""
import numpy as np, os, runpy, shutil, torch
from PIL import Image
from torch_dit.pipeline import JaxditPipeline
pipeline = JaxditPipeline.from_pretrained(".")
pipeline.set_progress_bar_config(disable=True)
start = torch.from_numpy(np.load({str(tmp_path / "noise.npy")!r}))
options = dict(width={SIZE[0]}, height={SIZE[1]}, latents=start, num_inference_steps=3)
picture = Image.open({str(reference)!r})
for name, given in dict(
    both=dict(prompt={PROMPT!r}, reference=picture, guidance_text=3.0, guidance_vision=1.5), text=dict(prompt={PROMPT!r}),
).items():
    pipeline(**given, **options).images[0].save({str(tmp_path)!r} + f"/{{name}}.png")
sys.argv = ["pipeline.py", "--prompt={PROMPT}", "--steps=1", "--count=2", "--reference={reference}", "--out={tmp_path}/cli"]
runpy.run_path("pipeline.py", run_name="__main__")
odd = os.fsdecode({str(tmp_path)!r}.encode() + b"/caf\\xe9.png")
shutil.copy({str(reference)!r}, odd)
sys.argv[1:5] = ["--prompt=another", "--steps=1", "--count=1", "--reference=" + odd]
runpy.run_path("pipeline.py", run_name="__main__")
for wrong in ("--steps=0", "--guidance_text=nan", "--size=0x0", "--seed=-1"):
    sys.argv[2:] = [wrong, "--out={tmp_path}/cli"]
    try:
        runpy.run_path("pipeline.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 2
print(sorted(name for name in ("jax", "jaxdit", "encode") if sys.modules.get(name) is not None))
""")  # fmt: skip
    assert said.splitlines()[-1] == "[]"
    assert [path.name for path in sorted((tmp_path / "cli").glob("*.png"))] == ["0-2.png", "0.png", "1.png"]
    told = [Image.open(tmp_path / "cli" / name).text["prompt"] for name in ("0.png", "0-2.png")]
    assert told == [PROMPT, "another"]
    assert Image.open(tmp_path / "cli" / "0.png").text["command"].startswith("python pipeline.py ")
    words = [sys.executable, "-m", "jaxdit.sample", f"--workdir={imported}", f"--out={tmp_path / 'ours'}", "--cache="]
    words += ["--steps=3", "--solver=euler", f"--prompts={tmp_path / 'list.jsonl'}"]
    row = {"prompt": PROMPT, "seed": SEED, "size": "{}x{}".format(*SIZE)}
    rows = [row | {"reference": str(reference), "scales": [3.0, 1.5]}, row]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [entry["file"] for entry in json.loads((tmp_path / "ours" / "samples.json").read_text())]
    pictures = []
    for ours, theirs in zip(files, ("both", "text"), strict=True):
        one, other = (
            np.asarray(Image.open(path).convert("RGB"), int)
            for path in (tmp_path / "ours" / ours, tmp_path / f"{theirs}.png")
        )
        assert one.shape == other.shape == (SIZE[1], SIZE[0], 3) and one.std() > 10
        assert np.abs(one - other).max() <= 1
        pictures.append(one)
    assert np.abs(pictures[0] - pictures[1]).max() > 20  # so that a reference that is not heard would show


def test_import_gives_the_same_weights_bit_for_bit_and_a_folder_to_start_from(workdir, exported, imported):
    _, shapes = model.abstract(
        trained.model_settings(trained.describe(workdir)[0]["model"], {"latent": 16, "text": 128, "vision": 16})
    )
    (step, before), (again, after) = (checkpoint.restore_weights(folder, shapes) for folder in (workdir, imported))
    assert step == again == exported_run.STEP
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert origin.parse("train.init_from", str(imported), "ema")[1] == step
    assert trained.describe(imported)[1]["latent_std"] == trained.describe(workdir)[1]["latent_std"]
    raw = exported.parent / "raw"
    assert export.export(workdir, raw, raw=True)["weights"] == "raw"
    twice, once = (load_file(folder / export.WEIGHTS) for folder in (raw, exported))
    assert all((twice[name] == 2 * once[name]).all() for name in once)


@pytest.fixture
def damaged(exported, tmp_path):
    """A copy of the exported folder with a change."""

    def make(change):
        folder = tmp_path / "copy"
        for path in exported.rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(exported)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        change(folder)
        return folder

    return make


def flip_a_bit(folder):
    content = bytearray((folder / export.WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / export.WEIGHTS).write_bytes(content)


def mark_again(folder, **changes):
    record = json.loads((folder / export.MARK).read_text())
    (folder / export.MARK).unlink()
    export._mark(folder, record | changes)


def another_width(folder):
    config = json.loads((folder / "training" / "config.json").read_text())
    config["model"]["width"] = 64
    write_json(folder / "training" / "config.json", config)
    mark_again(folder)


def without_a_layer(folder):
    state = load_file(folder / export.WEIGHTS)
    save_file({name: value for name, value in state.items() if name != "blocks.0.mlp_in.bias"}, folder / export.WEIGHTS)
    mark_again(folder)


def no_safetensors(folder):
    (folder / export.WEIGHTS).write_bytes(b"\0" * 100)
    mark_again(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_a_bit, "its SHA-256 differs"),
        (another_width, r"time_in/bias has shape \[32\].*the model needs \[64\]"),
        (without_a_layer, "layer 0 of blocks/mlp_in/bias is missing"),
        (no_safetensors, "does not hold this model"),
        (lambda folder: (folder / export.WEIGHTS).unlink(), "diffusion_pytorch_model.safetensors is missing"),
        (lambda folder: (folder / export.MARK).unlink(), "export.json is missing, so jaxdit.export did not write"),
        (lambda folder: (folder / export.MARK).write_text("{"), "is damaged"),
        (lambda folder: mark_again(folder, step="last"), "step is missing or not a int"),
        (lambda folder: mark_again(folder, format="comfyui"), "a node for ComfyUI; its model is in .*model"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_and_leaves_nothing(damaged, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        export.take_in(damaged(change), tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_a_workdir_that_is_in_use_is_not_imported_into(exported, workdir):
    with pytest.raises(InputError, match="is there already"):
        export.take_in(exported, workdir)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "mine.txt").write_text("x"), "mine.txt would be lost"),
        (lambda folder: (folder / "README.md").write_text("license: mit"), "README.md would be lost"),
        (lambda folder: (folder / "my-export.json").write_text("{}"), "my-export.json would be lost"),
        (lambda folder: flip_a_bit(folder), "diffusion_pytorch_model.safetensors would be lost"),
        (lambda folder: (folder / export.MARK).unlink(), "no export.json, so it is no export of ours"),
    ],
)
def test_what_is_not_ours_is_never_replaced(workdir, damaged, change, words):
    folder = damaged(change)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match=words):
        export.export(workdir, folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_export_of_ours_is_replaced_whole_or_not_at_all(workdir, damaged, monkeypatch):
    folder = damaged(lambda folder: (folder / "torch_dit" / "__pycache__").mkdir(exist_ok=True))
    (folder / "torch_dit" / "__pycache__" / "model.pyc").write_bytes(b"what Python leaves")
    before = (folder / export.MARK).read_text()

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(card, "write", fail)
        export.export(workdir, folder, raw=True)
    assert (folder / export.MARK).read_text() == before and [*folder.parent.iterdir()] == [folder]
    os.rename(folder, folder.with_name(".copy.old"))  # a kill between the two renames
    folder.with_name(".copy.new").mkdir()
    export.export(workdir, folder, raw=True)
    assert json.loads((folder / export.MARK).read_text())["weights"] == "raw" and [*folder.parent.iterdir()] == [folder]
    assert export.MARK in os.listdir(folder)


def test_the_card_says_what_the_records_say(workdir, exported):
    text = (exported / "README.md").read_text()
    front = ModelCard(text).data
    assert (front.library_name, front.pipeline_tag, front.license) == ("diffusers", "text-to-image", "unknown")
    for words in (
        "| images | 8 |", "| 48x80 | 3 |", "| held out of training | 12.5% |", "320 in 40 of 40 steps of 8",
        "| passes over the data | 4.0 |", r"| optim.peak\_learning\_rate | 0.1 | 0.01 |", "Verdict at step 40: **sound**",
        "| 40 | 0.0250 | 1.0250 | 2.0250 |", "Verdict at step 30, on 9 images: **pass**", "another run, step 7",
        r"| memory\_ssim | 0.9877 | at least 0.95 | yes |", "averaged, of step 40", "![](samples/00.png)",
        r"a \`kite\` \| &lt;b&gt;left&lt;/b&gt; of \# a \*house\*; n |",
    ):  # fmt: skip
        assert words in text, words
    with Image.open(exported / "samples" / "00.png") as picture:
        assert picture.getpixel((0, 0)) == (exported_run.STEP, 0, 0) and not picture.info


def test_a_card_without_records_says_that_they_are_unknown(workdir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "dataset.json", "checkpoints"):
        (bare / name).symlink_to(workdir / name)
    (bare / "metrics.jsonl").write_text("{not json\n")
    (bare / "gate").mkdir()
    (bare / "gate" / "gate.json").write_text("[")
    export.export(bare, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "No sample pictures",
        "No evaluation on held-out",
        "No verdict is recorded",
        "No verdict of the gate",
        "gate.json cannot be read",
    ):
        assert words in text, words


def test_no_path_of_this_machine_leaves_it(exported):
    for path in exported.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert b"somebody" not in path.read_bytes(), path


def test_what_is_shipped_is_the_code_that_is_tested(exported):
    for name in ("__init__.py", "model.py", "encoders.py", "pipeline.py"):
        assert (exported / "torch_dit" / name).read_bytes() == (ROOT / "torch_dit" / name).read_bytes()


@pytest.mark.all
def test_the_comfyui_folder_loads_and_draws_as_comfyui_would_call_it(workdir, exported, reference, tmp_path):
    out = tmp_path / "my-model"
    export.export(workdir, out, form="comfyui")
    assert "Not tested: ComfyUI itself" in (out / "README.md").read_text()
    assert (out / "model" / export.WEIGHTS).read_bytes() == (exported / export.WEIGHTS).read_bytes()
    alone(tmp_path, f"""
import importlib.util, numpy as np, torch
from PIL import Image
folder = {str(out)!r}  # as ComfyUI's nodes.py loads a custom node
spec = importlib.util.spec_from_file_location(folder.replace(".", "_x_"), folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
nodes = module.NODE_CLASS_MAPPINGS
assert nodes.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()

def call(name, **given):
    node = nodes[name]
    asked = node.INPUT_TYPES()
    asked = asked["required"] | asked.get("optional", {{}})
    defaults = {{key: spec[1]["default"] for key, spec in asked.items() if len(spec) > 1 and "default" in spec[1]}}
    assert given.keys() <= asked.keys()
    found = getattr(node(), node.FUNCTION)(**defaults | given)
    assert len(found) == len(node.RETURN_TYPES)
    return found[0]

model = call("JaxditLoad my-model")
image = torch.from_numpy(np.asarray(Image.open({str(reference)!r}), np.float32) / 255)[None]
conditions = call("JaxditConditions", prompt={PROMPT!r}, reference=image, second_reference=1 - image, mix=0.25)
latent = call("JaxditSample", model=model, conditions=conditions, seed=3, batch_size=2, steps=2, width=48, height=80)
assert latent["samples"].shape == (2, 16, 10, 6)
picture = call("JaxditDecode", model=model, latent=latent)
assert picture.shape == (2, 80, 48, 3) and picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
alone = call("JaxditSample", model=model, conditions=conditions, seed=4, batch_size=1, steps=2, width=48, height=80)
assert (alone["samples"][0] - latent["samples"][1]).abs().max() < 1e-4
other = call("JaxditConditions", prompt={PROMPT!r}, reference=image)
other = call("JaxditSample", model=model, conditions=other, seed=4, batch_size=1, steps=2, width=48, height=80)
assert (alone["samples"] - other["samples"]).abs().max() > 0.05
""")  # fmt: skip


def test_a_wrong_call_ends_with_exit_code_2(exported, tmp_path):
    wrong = command(f"--import={exported / 'transformer'}", f"--workdir={tmp_path / 'new'}")
    assert wrong.returncode == 2 and "export.json is missing" in wrong.stderr
