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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from abc_plugin.demo import sources
from abc_plugin.demo.recipe import Recipe, default_dir, recipe_hash
from abc_plugin.errors import UserError

if TYPE_CHECKING:
    from abc_plugin.demo.other import OtherRecipe

FREE_BYTES = 700 * 2**20  # what is written, with some air


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``abc-rlhf prepare``."""
    parser.add_argument("--out", type=Path, help="directory to make (default: in $ABC_HOME or ~/.cache/abc_plugin)")
    parser.add_argument(
        "--other_reward_model",
        action="store_true",
        help="make instead a reward model of another family and tokenizer, for --shaping.tokenizer_check map",
    )
    parser.add_argument("--path", action="store_true", help="print only the directory, for scripts")
    parser.add_argument("--force", action="store_true", help="make it anew even if it is there")


def run(args: argparse.Namespace) -> int:
    """Make or find the directory and say in one line what lies there."""
    out = (ensure_other if args.other_reward_model else ensure)(args.out, force=args.force)
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
    return _made("abc_plugin.demo.build", out, recipe, recipe_hash(recipe, versions), force)


def ensure_other(out: Path | None = None, *, force: bool = False, recipe: OtherRecipe | None = None) -> Path:
    """The directory of the reward model with GPT-2's tokenizer (reward_model/, card.json), likewise.

    Raises UserError as ``ensure``.
    """
    _quiet_threads()
    from abc_plugin.demo import other

    recipe = recipe or other.OtherRecipe()
    wanted = recipe_hash(recipe, other.made_from())
    return _made("abc_plugin.demo.other", out or other.directory(recipe), recipe, wanted, force)


def _made(builder: str, out: Path, recipe: Recipe | OtherRecipe, wanted: str, force: bool) -> Path:
    """``out``, made by the module's ``build`` unless it is there."""
    out = Path(out).expanduser().absolute()
    if found(out, wanted, force) and not force:
        return out
    _quiet_threads()
    from abc_plugin.demo.layout import whole_directory

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
