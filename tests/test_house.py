"""The rules of the house as tests: imports go down only, the wall between the halves, no unsafe loading."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("encode", "jaxdit", "configs", "torch_dit") for path in (ROOT / folder).glob("*.py"))
# Every file of jaxdit stands on a floor and imports only from floors below; rooms of one floor do not import each other.
FLOORS = [
    {"main", "sample", "validate", "evaluate", "plan", "export", "app"},
    {"train", "app_page", "forecast"},
    {"app_jobs"},
    {"previews", "measure", "render", "app_files", "exam", "begin"},
    {"programs", "progress", "preview_set", "album", "conditions", "drawing", "gate_page", "judged_images"},
    {"trained", "update", "heldout", "origin", "startup", "quality_page"},
    {"model", "flow", "sampler", "optim", "data", "checkpoint", "mesh", "workdir", "report", "card", "estimate"},
    {"facts"},
    {"metrics", "health", "charts", "report_pictures", "judge", "saved_shapes", "fused"},
    {
        "trackers",
        "history",
        "order",
        "orbax_log",
        "page",
        "decode_previews",
        "wishes",
        "sheet",
        "likeness",
        "quality",
        "advice",
        "attention",
        "layers",
        "processes",
        "state_dict",
        "seal",
        "cache",
    },
]
SHARED = {
    "encode.records",
    "encode.commandline",
    "encode.writing",
    "encode.page",
    "encode.whole_files",
}  # what both halves import
EDGE = {
    "sample",
    "conditions",
    "validate",
    "evaluate",
    "judged_images",
    "likeness",
    "decode_previews",
    "export",
    "app_jobs",
    "app_files",
}  # what may import more of encode, inside a function


def imports(path):
    """(module, whether at the top of the file) of each import, `from package import module` resolved."""
    tree = ast.parse(path.read_text())
    top = set(tree.body) | {node for guard in tree.body if isinstance(guard, ast.If) for node in guard.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            inside = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from ((f"{node.module}.{a.name}" if inside else node.module, node in top) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_down_and_stay_on_their_side(path):
    half, room = path.parent.name, path.stem
    for module, at_top in imports(path):
        package = module.split(".")[0]
        if half == "encode":
            assert package not in ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "jaxdit"), module
        if half in ("configs", "torch_dit"):
            assert package not in ("encode", "jaxdit", "jax", "flax"), module
        if half != "torch_dit":
            assert package != "torch_dit", module
        if half == "jaxdit":
            assert package not in ("torch", "diffusers", "transformers"), module
            if package == "encode" and module not in SHARED:
                assert room in EDGE and not at_top, f"{module} only inside a function of {EDGE}"
            if package == "jaxdit":
                floor = {name: level for level, names in enumerate(FLOORS) for name in names}
                below = module.split(".")[1]
                assert floor[below] > floor[room], f"{room} imports {below}"


@pytest.mark.parametrize("package", ["encode", "torch_dit"])
def test_no_file_needs_itself_to_be_imported(package):
    needs = {
        path.stem: {
            module.split(".")[1] for module, at_top in imports(path) if at_top and module.startswith(f"{package}.")
        }
        for path in (ROOT / package).glob("*.py")
    }
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError with the files


def test_ray_is_optional():
    for path in FILES:
        for module, at_top in imports(path):
            if module.split(".")[0] == "ray":
                assert path.stem == "ray_engine", path
            assert module != "encode.ray_engine" or not at_top, f"{path}: only inside a function"


def test_nicegui_is_optional():
    for path in FILES:
        for module, at_top in imports(path):
            assert (
                module.split(".")[0] != "nicegui" or path.stem == "app_page" or (path.stem == "app" and not at_top)
            ), path
            assert module != "jaxdit.app_page" or not at_top, f"{path}: only inside a function"


def test_every_file_of_jaxdit_stands_on_one_floor():
    rooms = [path.stem for path in (ROOT / "jaxdit").glob("*.py") if not path.stem.startswith("__")]
    assert sorted(rooms) == sorted(name for floor in FLOORS for name in floor)


def test_nothing_loads_pickles_or_foreign_code():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                words = {keyword.arg: keyword.value for keyword in node.keywords}
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "torch.load"), path
                for name in ("trust_remote_code", "allow_pickle"):
                    assert name not in words or getattr(words[name], "value", True) is False, f"{path}: {name}"


def test_files_are_short():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
    assert tests


def test_requirements_are_pinned_and_explained():
    readme = (ROOT / "README.md").read_text()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert version
            assert f"| {name} |" in readme, f"the README's table of dependencies does not explain {name}"
