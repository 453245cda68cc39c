"""Imports point one way. The order is the one CONTRIBUTING.md draws."""

import ast
import pathlib

import pytest

import sksm

pytestmark = [pytest.mark.check, pytest.mark.pure]

ROOT = pathlib.Path(sksm.__file__).parent
LAYERS = """
    spans report errors
    linux
    process
    pages fingerprints store
    engines regranting
    pipeline twins holding estimate gain outcomes hotness misaligned
    daemon
    scanner
    session buffers api others unmerging running ancestry stand_in
    commands reporters
"""
RANK = {name: i for i, row in enumerate(LAYERS.split("\n")) for name in row.split()}


def imported(path):
    """Name the parts of the package that a module imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sksm":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("sksm."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (name[1] for name in names if name[0] == "sksm" and name[1:])


def modules():
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part != "__init__":
            yield part, path


def test_every_module_has_a_place():
    """Whoever adds a part of the package decides where it stands."""
    assert {part for part, _ in modules()} <= RANK.keys()


def test_imports_point_down():
    """No module imports one that stands above it."""
    upward = [
        f"{path.relative_to(ROOT)} imports {there}"
        for here, path in modules()
        for there in imported(path)
        if RANK.get(there, 0) > RANK[here]
    ]
    assert upward == []


def test_raw_addresses_are_turned_into_bytes_low_down_only():
    """Code that could crash the process lives in `linux` and `process`."""
    bold = [
        str(path.relative_to(ROOT))
        for here, path in modules()
        if here not in ("linux", "process")
        and any(word in path.read_text() for word in ("from_address", "string_at("))
    ]
    assert bold == []
