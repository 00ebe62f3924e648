"""The architecture that the tree shows: who may import whom and what a file may be called, checked."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_python

import abc_plugin

PACKAGE = Path(abc_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room and those it may import from, besides itself and the files at the top (config, errors).
MAY_IMPORT = {
    "credit": set(),
    "attention": {"credit"},
    "text": set(),
    "report": {"text"},
    "host": {"credit", "attention", "text", "report"},
    "local": {"credit", "attention", "text", "report", "host"},
    "tools": {"credit", "attention", "text", "report"},
}
IMPORT_OPENRLHF = {"host", "local"}
PATCH = {"local"}  # the room in which mock.patch may stand, where the host leaves no method to override

# Importing the left must not import any on the right.
MUST_NOT_IMPORT = {
    "abc_plugin": ("torch", "transformers", "openrlhf", "ray", "matplotlib"),
    "abc_plugin.cli": ("torch", "transformers", "openrlhf", "ray", "matplotlib"),
    "abc_plugin.config": ("torch", "transformers", "openrlhf", "ray"),
    "abc_plugin.credit.methods, abc_plugin.credit.metrics": ("transformers", "openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.attention": ("openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.text.tokenizer_differences": ("torch", "transformers", "openrlhf"),
    "abc_plugin.report.show": ("torch", "transformers", "openrlhf", "matplotlib", "tensorboard"),
    "abc_plugin.report.command": ("torch", "transformers", "openrlhf"),
    "abc_plugin.tools.study.command": ("torch", "transformers", "openrlhf"),
    "abc_plugin.tools.audit.command": ("openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.tools.lab.command": ("transformers", "openrlhf", "ray"),
    "abc_plugin.tools.demo.prepare": ("openrlhf", "ray", "deepspeed"),
}


@pytest.mark.parametrize("modules", MUST_NOT_IMPORT)
def test_importing_stays_within_bounds(modules):
    forbidden = MUST_NOT_IMPORT[modules]
    code = f"import sys, {modules}; print([name for name in {forbidden!r} if name in sys.modules])"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def room(path: Path) -> str:
    """The folder below the package; "" for the files at its top."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(path: Path) -> set[str]:
    """Modules named in the file's import statements, also those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path):
    here = room(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "openrlhf":
            assert here in IMPORT_OPENRLHF, f"{name}: only {IMPORT_OPENRLHF} import the host"
        if top == "abc_plugin" and rest and rest[0] in MAY_IMPORT and here:
            assert rest[0] == here or rest[0] in MAY_IMPORT[here], f"{here} imports {name}"
        if name.startswith("unittest.mock"):
            assert here in PATCH, f"{here} patches: override a method, or return what others want to see"


def test_a_file_has_a_name_of_its_own():
    names = Counter(path.name for path in FILES if path.name not in ("__init__.py", "__main__.py", "command.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_folder_is_crowded():
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 13} == {}
