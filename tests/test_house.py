"""The house: the ground floor stands without the extras, its imports run one way, and the README
names its files."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {path.stem: path for path in ROOT.glob("*.py")}
EXTRAS = {f"extras.{path.stem}": path for path in ROOT.glob("extras/*.py")}


def parse(path):
    return ast.parse(path.read_text())


def imports(tree) -> list[tuple[str, str]]:
    """(module, name) of every import, wherever in the file it is; name "" for the whole module."""
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            pairs += [(node.module, alias.name) for alias in node.names]
    return pairs


def imported_files(path) -> set[str]:
    """The files of the ground floor that this one imports."""
    return {module for module, _ in imports(parse(path)) if module in CORE}


def test_the_ground_floor_is_there():
    names = "adaspec cells cli data distillspec evaluate head models ranks run_all settings"
    names += " speculative stages storage tables teacher train"
    assert set(names.split()) <= set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_the_ground_floor_imports_no_extras(name):
    modules = [module.split(".")[0] for module, _ in imports(parse(CORE[name]))]
    assert "extras" not in modules and "tests" not in modules


def test_import_arrows_run_one_way():
    """No cycles, imports inside functions included; and what can be copied stands alone."""
    order = list(TopologicalSorter({n: imported_files(p) for n, p in CORE.items()}).static_order())
    assert set(order) == set(CORE)
    assert imported_files(CORE["adaspec"]) == set()
    roots = {module.split(".")[0] for module, _ in imports(parse(CORE["adaspec"]))}
    assert roots == {"math", "torch"}
    top = ast.Module(
        [n for n in parse(CORE["speculative"]).body if isinstance(n, ast.Import | ast.ImportFrom)],
        [],
    )
    assert not {module for module, _ in imports(top)} & set(CORE), "its command line apart"


@pytest.mark.parametrize("name", [*CORE, *EXTRAS])
def test_nothing_private_of_another_file_is_used(name):
    tree = parse((CORE | EXTRAS)[name])
    house = {*CORE, *EXTRAS, "extras"}
    pairs = [(module, part) for module, part in imports(tree) if module in house]
    assert [part for _, part in pairs if part.startswith("_")] == []
    modules = {module.split(".")[-1] for module, part in pairs if not part}
    modules |= {part for module, part in pairs if module == "extras"}
    private = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    ]
    assert private == []


@pytest.mark.slow
def test_the_ground_floor_stands_alone(tmp_path):
    """rm -r extras docs results: the tiny preset runs, and the core's tests can be imported."""
    house = tmp_path / "house"
    (house / "tests").mkdir(parents=True)
    for path in [*CORE.values(), ROOT / "pytest.ini", *ROOT.glob("tests/*.py")]:
        shutil.copy(path, house / path.relative_to(ROOT))
    flags = "--preset tiny --limit 16 --max-steps 1 --eval-prompts 2 --timed-prompts 1"
    argv = [*flags.split(), "--max-new-tokens", "4", "--out", str(tmp_path / "runs")]
    program = (
        f"import sys, run_all, pytest; run_all.main({argv!r}); "
        "sys.exit(pytest.main(['--collect-only', '-q', '--assert=plain']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=house,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "\nAcceptance:\n" in done.stdout and "tests/test_run_all.py::" in done.stdout
    assert (tmp_path / "runs" / "results.json").is_file()


def test_the_readme_names_every_file_and_is_short():
    text = (ROOT / "README.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    for path in CORE.values():
        assert any(path.name in line for line in table), f"{path.name} is in no table"
    assert text.count("\n") <= 150
