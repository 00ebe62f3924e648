"""Who may import whom: the architecture that the tree shows, checked in fresh processes and in the sources."""

import ast
from pathlib import Path

import pytest
from conftest import run_python

import abc_plugin

PACKAGE = Path(abc_plugin.__file__).parent

# Importing the left must not import any on the right.
MUST_NOT_IMPORT = {
    "abc_plugin": ("torch", "transformers", "openrlhf", "ray", "matplotlib"),
    "abc_plugin.cli": ("torch", "transformers", "openrlhf", "ray", "matplotlib"),
    "abc_plugin.config": ("torch", "transformers", "openrlhf", "ray"),
    "abc_plugin.credit.methods, abc_plugin.credit.metrics": ("transformers", "openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.recovery.tap, abc_plugin.recovery.rerun": ("openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.tokenizers": ("torch", "transformers", "openrlhf"),
    "abc_plugin.report.show": ("torch", "transformers", "openrlhf", "matplotlib", "tensorboard"),
    "abc_plugin.report.command": ("torch", "transformers", "openrlhf"),
    "abc_plugin.study.runner": ("torch", "transformers", "openrlhf"),
    "abc_plugin.study.report_command": ("torch", "transformers", "openrlhf"),
    "abc_plugin.audit.command": ("openrlhf", "ray", "deepspeed", "peft"),
    "abc_plugin.demo.prepare": ("openrlhf", "ray", "deepspeed"),
}


@pytest.mark.parametrize("modules", MUST_NOT_IMPORT)
def test_importing_stays_within_bounds(modules):
    forbidden = MUST_NOT_IMPORT[modules]
    code = f"import sys, {modules}; print([name for name in {forbidden!r} if name in sys.modules])"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_only_the_host_package_names_openrlhf_and_nothing_below_it_names_the_host():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "host":
            continue
        for name in imports(path):
            assert name.split(".")[0] != "openrlhf", f"{path} imports {name}"
            assert not name.startswith("abc_plugin.host"), f"{path} imports {name}"
