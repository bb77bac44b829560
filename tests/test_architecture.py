"""Imports point one way, and the command starts fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import muon_rl

PACKAGE = Path(muon_rl.__file__).parent
RECIPES = PACKAGE.parent / "recipes"

# A part may import itself and what stands in lower rows; parts of one row not each other.
ROWS = [
    {"policy"},
    {"cli"},
    {"agent", "callbacks", "experiments"},
    {"data", "tracking"},
    {"envs", "modules", "objectives", "optim", "diagnostics"},
    {"choices", "clock", "passwords", "specs", "tags", "turns", "two_hot", "unroll"},
]
DROP_IN = {"optim", "objectives", "modules", "envs", *ROWS[-1]}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "recipes")


def part_of(name: str) -> str:
    return name.removeprefix("muon_rl").lstrip(".").partition(".")[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # holds only the lazy public names: checked by the test of what it imports
    row = next(index for index, parts in enumerate(ROWS) if part in parts)
    allowed = {part, "__version__", ""}.union(*ROWS[row + 1 :])
    ours = {part_of(name) for name in imports_of(path) if name.split(".")[0] == "muon_rl"}
    assert ours <= allowed | ({"recipes"} if part == "cli" else set())


@pytest.mark.parametrize("part", sorted(DROP_IN))
def test_drop_in_parts_need_neither_lightning_nor_mlflow(part):
    paths = [path for path in files() if path.relative_to(PACKAGE).parts[0].startswith(part)]
    roots = {name.split(".")[0] for path in paths for name in imports_of(path)}
    assert not roots & {"lightning", "pytorch_lightning", "mlflow"}


def test_only_the_command_line_finds_recipes():
    for path in files():
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert not any(name.startswith("muon_rl.recipes") for name in imports_of(path))


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from muon_rl.cli import main; main(['--help']); main(['recipes'])\n"
        "heavy = {'torch', 'lightning', 'torchrl', 'mlflow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "muon-rl fit" in done.stdout


@pytest.mark.parametrize("path", [*files(), *sorted(RECIPES.glob("*.py"))], ids=lambda p: p.name)
def test_a_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 320
