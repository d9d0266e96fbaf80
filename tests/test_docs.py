"""What the pages say is there: commands, flags, fields, files and links; and every command is run by a test."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from encode import __main__ as encode_commands
from jaxdit import __main__ as jaxdit_commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
INSIDE = ("decode_previews",)  # a child of the trainer, no command of a person
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _source(module):
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def _modules(text):
    return set(re.findall(r"-m ((?:encode|jaxdit|bench|tests)\.[a-z_]+(?:\.[a-z_]+)?)", text))


@each_page
def test_commands_exist_and_know_their_flags(page):
    text = page.read_text().replace("\\\n", " ")
    for module in _modules(text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for line in text.splitlines():
        for module, rest in re.findall(r"-m ((?:encode|jaxdit|bench)\.[a-z_]+)([^`|#]*)", line):
            known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', _source(module))) | {"config", "help"}
            for flag in re.findall(r"--(\w+)(?=[\s=\]]|$)", rest):
                assert flag in known, f"{page.name}: {module} has no --{flag}"


@each_page
def test_fields_exist(page):
    found = set(re.findall(r"--config\.([a-z_0-9.]+)=", page.read_text()))
    configs = [importlib.import_module(f"configs.{path.stem}").get_config() for path in (ROOT / "configs").glob("*.py")]
    for field in found:
        assert any(_has(config, field.split(".")) for config in configs), f"{page.name}: config.{field}"


def _has(config, names):
    for name in names:
        if not isinstance(config, ConfigDict) or name not in config:
            return False
        config = config.get_oneway_ref(name).get() if config.get_type(name) is ConfigDict else config[name]
    return True


@each_page
def test_files_and_links_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    text = re.sub(r"\w+://\S+", "", text)
    for name in re.findall(r"\b((?:launch|bench|configs|docs|tests)/[\w/.-]+\.(?:py|sh|md|json|yaml|sbatch))\b", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for name in re.findall(r"\b(requirements[a-z-]*\.txt)\b", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_each_command_of_the_pages_is_run_by_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    tests += (ROOT / "launch" / "quickstart.sh").read_text()  # which .ci/run runs
    for module in set().union(*(_modules(page.read_text()) for page in PAGES)):
        package, name = module.rsplit(".", 1)
        assert module in tests or re.search(rf"from {package} import [^\n]*\b{name}\b", tests), module


@pytest.mark.parametrize("commands", [encode_commands, jaxdit_commands], ids=["encode", "jaxdit"])
def test_a_package_lists_its_commands(commands):
    package = commands.__name__.split(".")[0]
    ours = {path.stem for path in (ROOT / package).glob("*.py") if "    commandline.run(" in path.read_text()}
    assert set(commands.COMMANDS) == ours - set(INSIDE)
    done = subprocess.run([sys.executable, "-m", package], cwd=ROOT, capture_output=True, text=True, check=True)
    for name, words in commands.COMMANDS.items():
        assert re.search(rf"python -m {package}\.{name} +{re.escape(words)}\n", done.stdout)


def test_the_map_names_every_file_and_no_other():
    text = (ROOT / "docs" / "map.md").read_text()
    for package in ("encode", "jaxdit"):
        named = set()
        for line in text.splitlines():
            match = re.match(rf"\s+{package}/((?:[\w/]+\.py(?:, )?)+)", line)
            named |= {Path(name.strip()).stem for name in match[1].split(",") if name.strip()} if match else set()
        there = {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}
        left_out = there - named
        assert named <= there, f"docs/map.md names {named - there}"
        assert left_out <= _small(package), f"docs/map.md does not name {left_out - _small(package)} of {package}/"


def _small(package):
    """Rooms that only one other room of the package imports: parts of that one."""
    users = {}
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                for alias in node.names:
                    users.setdefault(alias.name, set()).add(path.stem)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
                users.setdefault(node.module.split(".")[1], set()).add(path.stem)
    return {name for name, by in users.items() if len(by) == 1}
