"""The shape of the house: who imports whom, how long things are, and that every test is found."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, check_collected

FLOORS = ["utils", "wan", "pipeline"]  # each may import itself and those before it
UPSTAIRS = {"inference", "evaluation", "training", "benchmarks"}  # clients, which none of the floors imports
FILE_LINES, FUNCTION_LINES, CORE_LINES = 400, 70, 8_000
OURS = sorted(
    file for room in [*FLOORS, *UPSTAIRS - {"inference"}, "tests"] for file in (ROOT / room).rglob("*.py")
) + [ROOT / "inference.py"]


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}: relative imports hide who imports whom"
            yield node.module


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_one_way(floor: str):
    """utils <- wan <- pipeline <- the rest."""
    above = set(FLOORS[FLOORS.index(floor) + 1:]) | UPSTAIRS
    wrong = {(name(file), module) for file in (ROOT / floor).rglob("*.py") for module in imports(file)
             if module.split(".")[0] in above}
    assert wrong == set()


def test_policies_know_the_policy_file_alone():
    """A new policy is one file that needs to know one file."""
    folder = ROOT / "wan" / "kv_cache" / "policies"
    policies = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
    known = {module for file in policies for module in imports(file) if module.split(".")[0] in {*FLOORS, *UPSTAIRS}}
    assert len(policies) >= 4 and known == {"wan.kv_cache.policy"}


def test_one_file_reads_yaml():
    """YAML is read in one place, so every key is checked in one place."""
    packages = {name(file): {module.split(".")[0] for module in imports(file)} for file in OURS}
    readers = {file for file, used in packages.items() if {"yaml", "omegaconf"} & used}
    assert {file for file in readers if not file.startswith("tests/")} == {"utils/yaml_files.py"}


def test_nothing_is_too_long():
    """A file is at most 400 lines, a function 70, wan and pipeline together 7,920."""
    lines = {file: file.read_text(encoding="utf-8").splitlines() for file in OURS}
    assert {name(file): len(text) for file, text in lines.items() if len(text) > FILE_LINES} == {}
    core = sum(len(text) for file, text in lines.items() if name(file).startswith(("wan/", "pipeline/")))
    assert 1000 < core < CORE_LINES
    functions = {
        f"{name(file)}: {node.name}": node.end_lineno - node.lineno + 1
        for file in OURS for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {where: length for where, length in functions.items() if length > FUNCTION_LINES} == {}


def test_every_module_says_what_it_is():
    """Each file begins with a docstring; only an empty package file may do without."""
    texts = {name(file): file.read_text(encoding="utf-8") for file in OURS}
    assert {file for file, text in texts.items() if text.strip() and not ast.get_docstring(ast.parse(text))} == set()


def test_a_test_that_is_not_found_is_noticed():
    """The hook that counts tests complains about a silent file and about a lack of tests."""
    files = [ROOT / "tests" / "test_one.py", ROOT / "tests" / "gpu" / "test_two.py"]
    check_collected(files, files, count=10, least=10)
    with pytest.raises(pytest.UsageError, match="gpu/test_two.py"):
        check_collected(files, files[:1], count=10, least=10)
    with pytest.raises(pytest.UsageError, match="9 tests"):
        check_collected(files, files, count=9, least=10)
