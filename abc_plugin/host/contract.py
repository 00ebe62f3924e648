"""The check that an OpenRLHF on disk is supported and still has what the plugin relies on (contract_table.py).

Sources are parsed, never imported: the check takes no GPU, none of the host's dependencies and a fraction of a second,
and runs on any unpacked release.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from abc_plugin.errors import UserError
from abc_plugin.host.contract_table import CONTRACT, LOCAL_CONTRACT, Needs
from abc_plugin.host.options import FLAT

SUPPORTED = ">=0.9.9,<0.12"
LOCAL_SUPPORTED = ">=0.11,<0.12"  # before 0.11 train() needs vLLM engines
TESTED = "0.11.2"  # what the remedies install


def refuse_broken_host(*, local: bool = False) -> None:
    """Raises UserError unless the installed OpenRLHF is supported and has what the plugin relies on.

    The message names the version and the first symbol, with what was expected and what was found. ``local``: also
    what the local driver relies on.
    """
    package, version = installed()
    refuse_unsupported(version, local=local)
    wrong = broken(package) + (broken(package, LOCAL_CONTRACT) if local else [])
    if wrong := wrong or missing_flags(package):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"OpenRLHF {version} in {package} is not what abc_plugin was written against: {wrong[0]}{more}; "
            f"pip install --no-deps --force-reinstall openrlhf=={TESTED}"
        )


def refuse_unsupported(version: str, *, local: bool = False) -> None:
    """Raises UserError unless this version of OpenRLHF is supported; so are pre-releases within the range."""
    supported = LOCAL_SUPPORTED if local else SUPPORTED
    try:
        fits = SpecifierSet(supported).contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        who = "abc-rlhf local" if local else "abc_plugin"
        raise UserError(
            f"OpenRLHF {version} is not supported: {who} needs {supported}; pip install --no-deps openrlhf=={TESTED}"
        )


def installed() -> tuple[Path, str]:
    """Where the importable OpenRLHF lies and its version; nothing of it is imported. Raises UserError without one."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"OpenRLHF is not installed; pip install --no-deps openrlhf=={TESTED}")
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"OpenRLHF in {spec.submodule_search_locations[0]} has no version: install it, e.g. with pip install "
            "--no-deps -e on its repository"
        ) from None
    return Path(spec.submodule_search_locations[0]), version


def broken(package: Path, contract: dict[str, dict[str, Needs]] = CONTRACT) -> list[str]:
    """What the OpenRLHF in directory ``package`` lacks or has otherwise, one line per finding; empty is good."""
    findings = []
    for file, symbols in contract.items():
        try:
            tree = ast.parse((package / file).read_text(encoding="utf-8"))
        except (OSError, SyntaxError) as error:
            findings.append(f"{file}: cannot be read ({type(error).__name__})")
            continue
        for symbol, expected in symbols.items():
            findings += [
                f"{file} {symbol}: {difference}" for difference in _differences(_find(tree, symbol), expected)
            ]
    return findings


def missing_flags(package: Path) -> list[str]:
    """Which of the host's settings that the plugin reads its command line no longer has, one line per setting."""
    file = "cli/train_ppo_ray.py"
    constants = ast.walk(ast.parse((package / file).read_text(encoding="utf-8")))
    words = {node.value for node in constants if isinstance(node, ast.Constant)}
    return [
        f"{file}: expected the flag --{dotted} or --{flat}, found neither"
        for dotted, flat in FLAT.items()
        if not {f"--{dotted}", f"--{flat}"} & words
    ]


def _differences(node: ast.AST | None, expected: Needs) -> list[str]:
    if node is None:
        return [f"expected {expected.signature}, found nothing"]
    if (found := _signature(node)) != expected.signature:
        return [f"expected {expected.signature}, found {found}"]
    body = ast.unparse(node)
    return [f"expected `{fragment}` in its body, found none" for fragment in expected.body if fragment not in body]


def _find(tree: ast.AST, symbol: str) -> ast.AST | None:
    """The last definition or import of a dotted name, as Python would have it."""
    node: ast.AST | None = tree
    for name in symbol.split("."):
        named = (child for child in reversed(getattr(node, "body", [])) if name in _names(child))
        node = next(named, None)
    return node


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    return [getattr(node, "name", "")]


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        return f"{prefix}({_without_annotations(node.args)})"
    if isinstance(node, ast.ClassDef):
        callees = [
            decorator.func if isinstance(decorator, ast.Call) else decorator for decorator in node.decorator_list
        ]
        decorators = "".join(f"@{ast.unparse(callee)} " for callee in callees)
        return f"{decorators}class({', '.join(map(ast.unparse, node.bases))})"
    if isinstance(node, ast.Import):
        return ast.unparse(node)
    if isinstance(node, ast.ImportFrom):
        return f"from {'.' * node.level}{node.module or ''}"
    return type(node).__name__


def _without_annotations(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)
