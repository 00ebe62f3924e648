"""``abc-rlhf prepare``: make the embedded default once; later calls find it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from abc_plugin.errors import UserError
from abc_plugin.tools.demo import sources
from abc_plugin.tools.demo.recipe import Recipe, default_dir, recipe_hash

FREE_BYTES = 700 * 2**20  # what is written, with some air
# Flags that make a reward model instead: (module with RECIPE, made_from, directory and build; help)
REWARD_MODELS = {
    "other_reward_model": (
        "abc_plugin.tools.demo.other",
        "make instead a reward model of another family and tokenizer, for --shaping.tokenizer_check map",
    ),
    "lexicon_reward_model": (
        "abc_plugin.tools.demo.lexicon",
        "make instead a reward model whose attention is its reasoning, the control for studies of dense credit",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``abc-rlhf prepare``."""
    parser.add_argument("--out", type=Path, help="directory to make (default: in $ABC_HOME or ~/.cache/abc_plugin)")
    which = parser.add_mutually_exclusive_group()
    for flag, (_, help_) in REWARD_MODELS.items():
        which.add_argument(f"--{flag}", action="store_const", const=flag, dest="reward_model", help=help_)
    parser.add_argument("--path", action="store_true", help="print only the directory, for scripts")
    parser.add_argument("--force", action="store_true", help="make it anew even if it is there")


def run(args: argparse.Namespace) -> int:
    """Make or find the directory and say in one line what lies there."""
    if args.reward_model:
        out = ensure_reward_model(args.reward_model, args.out, force=args.force)
    else:
        out = ensure(args.out, force=args.force)
    if args.path:
        print(out)
        return 0
    print(summary(out, json.loads((out / "card.json").read_text(encoding="utf-8"))))
    return 0


def ensure(out: Path | None = None, *, force: bool = False, recipe: Recipe | None = None) -> Path:
    """The directory of the embedded default, made first where it is missing (minutes); see the package for its files.

    Raises UserError when a package is missing, ``out`` cannot be written, holds something else, or was made by
    another recipe or another version of the packages.
    """
    recipe = recipe or Recipe()
    versions = sources.versions()
    out = out or default_dir(recipe, versions)
    return _made("abc_plugin.tools.demo.build", out, recipe, recipe_hash(recipe, versions), force)


def ensure_reward_model(flag: str, out: Path | None = None, *, force: bool = False, recipe: Any = None) -> Path:
    """The directory (reward_model/, card.json) of one of ``REWARD_MODELS``, made first where it is missing, likewise.

    Raises UserError as ``ensure``.
    """
    _quiet_threads()
    module = importlib.import_module(REWARD_MODELS[flag][0])
    recipe = recipe or module.RECIPE
    return _made(
        module.__name__, out or module.directory(recipe), recipe, recipe_hash(recipe, module.made_from()), force
    )


def _made(builder: str, out: Path, recipe: Any, wanted: str, force: bool) -> Path:
    """``out``, made by the module's ``build`` unless it is there."""
    out = Path(out).expanduser().absolute()
    if found(out, wanted, force) and not force:
        return out
    _quiet_threads()
    from abc_plugin.tools.demo.layout import whole_directory

    build = importlib.import_module(builder).build
    with whole_directory(out) as part, progress_bar() as report:
        if (free := shutil.disk_usage(part).free) < FREE_BYTES:
            needed = FREE_BYTES >> 20
            raise UserError(f"{out.parent} has {free >> 20} MB free and {needed} MB are needed; use another --out")
        build(part, recipe, report)
    return out


def _quiet_threads() -> None:
    """torch reads this when it is first imported: idle threads must not spin on a shared machine."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def found(out: Path, wanted: str, force: bool) -> bool:
    """Whether ``out`` was made already. Raises UserError when it holds what this command did not make."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made = json.loads((out / "card.json").read_text(encoding="utf-8"))["recipe_hash"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out} exists and was not made by `abc-rlhf prepare`; choose another --out") from None
    if made != wanted and not force:
        raise UserError(f"{out} was made by another recipe ({made}, now {wanted}); make it anew with --force")
    return True


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yield report(what, share): one bar of what is happening, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


def summary(out: Path, card: dict[str, Any]) -> str:
    """Where, how accurate, how long it took."""
    test = card["heldout"]["imdb_windows_of_24_tokens"]
    return (
        f"{out}: reward model right on {test['accuracy']:.1%} ± {test['standard_error']:.1%} of {test['n']} held-out "
        f"IMDb windows of 24 tokens; made in {card['seconds']:.0f} s"
    )
