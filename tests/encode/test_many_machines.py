"""What surrounds the Ray engine and needs no Ray: shared folders, temporary names, URLs, and the recipes for clusters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from encode import main, ray_actor, whole_files
from encode.records import InputError
from tests.encode import fakes

ROOT = Path(__file__).resolve().parents[2]


def _order(images, out, token="x"):
    return ray_actor.Order({}, images, out, token, images / "000.png", {}, 0, 0, "")


def test_a_machine_proves_that_it_shares_both_folders(tmp_path):
    images, out = fakes.photographs(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    (out / ray_actor.TOKEN).write_text("x")
    order = _order(images, out)
    assert ray_actor.shares(order, "n1") is None and ray_actor.shares(order, "n1", probe=False) is None
    assert f"node n1 does not see what was written into config.out={out}" in ray_actor.shares(
        _order(images, out, "y"), "n1"
    )
    (images / "000.png").unlink()
    assert f"node n1 does not see the photographs ({images}/000.png)" in ray_actor.shares(order, "n1")
    assert ray_actor.shares(order, "n1", probe=False) is None  # one that was removed meanwhile is only refused itself
    for path in images.iterdir():
        path.unlink()
    assert "does not see the photographs" in ray_actor.shares(order, "n1", probe=False)
    (out / ray_actor.TOKEN).unlink()
    assert "does not see what was written" in ray_actor.shares(order, "n1")


def test_two_writers_of_one_folder_have_temporary_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_files, "_writer", "")
    target = tmp_path / "part.json"
    with whole_files.whole_file(target) as plain:
        whole_files.name_writer("node-1")
        with whole_files.whole_file(target) as own:
            assert len({plain, own, target}) == 3 and own.name.startswith(".")
            own.touch()
        plain.touch()
    (tmp_path / ".part.json.node-2.tmp").touch()
    (tmp_path / "128").mkdir()
    (tmp_path / "128" / ".index.npy.node-2.tmp").touch()
    whole_files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["128", "part.json"]


@pytest.mark.parametrize("field", ["images", "out"])
def test_a_bucket_by_its_url_is_refused_with_what_to_do(tmp_path, field):
    config = fakes.config(tmp_path, tmp_path / "out")
    config[field] = "s3://bucket/folder"
    with pytest.raises(
        InputError, match=rf"config\.{field}=s3://bucket/folder: a folder is wanted, .* mount the bucket"
    ):
        main.check(config)


def test_the_trainer_refuses_a_url_as_well(tmp_path):
    command = [sys.executable, "-m", "jaxdit.main", f"--workdir={tmp_path / 'run'}", "--config.data.path=gs://b/512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: config.data.path=gs://b/512: a folder is wanted")


def test_ray_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "encode.ray_engine", raising=False)
    config = fakes.config(tmp_path, tmp_path / "out", engine="ray")
    config.ray.actors = -1
    with pytest.raises(InputError, match=r"config\.ray\.actors=-1: at least 0"):
        main.check(config)
    config.ray.actors = 0
    with pytest.raises(InputError, match=r"needs Ray, which is not installed; .* -r requirements-ray\.txt"):
        main.check(config)
    config.engine = "spark"
    with pytest.raises(InputError, match=r"config\.engine='spark': unknown; the choices are local, ray"):
        main.check(config)


def test_the_recipe_for_kubernetes_is_a_rayjob_of_our_version():
    yaml = pytest.importorskip("yaml")
    claim, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "encode-rayjob.yaml").read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["spec"]["resources"]["requests"]["storage"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert "--config.engine=ray" in job["spec"]["entrypoint"] and job["metadata"]["name"]
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements-ray.txt").read_text().split()
    workers = cluster["workerGroupSpecs"][0]
    assert workers["groupName"] and workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "IMAGE" and container["name"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_scripts_are_sound_shell():
    for script in (*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm-encode.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.all
def test_the_recipe_for_slurm_runs_on_a_stand_in_for_slurm(tmp_path):
    """srun starts its command here, scontrol names this machine: the script's own steps are real, and so is Ray."""
    pytest.importorskip("ray")
    (tmp_path / "bin").mkdir()
    tools = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
        "scontrol": '[ "$1" != requeue ] || echo requeued; [ "$1" != show ] || hostname',
    }
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    images = fakes.photographs(tmp_path / "in", 6)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "this",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    command = ["bash", str(ROOT / "launch" / "slurm-encode.sbatch"), "--config=configs/encode_demo.py"]
    command += [f"--config.images={images}", f"--config.out={tmp_path / 'out'}", "--config.max_upscale=9.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    for path in ROOT.glob(f"ray-{os.getpid()}-*.log"):
        path.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 pictures encoded, 0 inputs refused" in done.stdout
    assert (tmp_path / "out" / "128" / "dataset.json").exists()
