"""A study's plan: YAML read strictly, its blocks multiplied out. What flags mean, the host says (settings.py)."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from abc_plugin.errors import UserError

Words = tuple[str, ...]  # a flag's words on the command line; ("true",) is a switch that is on
Block = dict[str, list[Words]]  # the values of each flag of a grid

KEYS = ("like", "driver", "out", "flags", "runs", "keep_policies", "smoke")
DRIVERS = ("local", "ray")
OWNED = {
    "ckpt.output_dir": "each run has a folder of its own",
    "ckpt.path": "checkpoints lie in the run's folder",
    "ckpt.load_enable": "with ckpt.save_steps a stopped run always goes on from its checkpoint",
    "logger.tensorboard_dir": "curves lie in the run's folder",
}
FLAG = re.compile(r"[A-Za-z][\w.]*")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Plan:
    """A plan, with ``smoke`` and the environment applied.

    flags: what all runs have in common.  blocks: grids; ``grid`` is their runs.  keep_policies: whether finished runs
    keep their weights.  source: the file, for messages.
    """

    source: str
    driver: str
    out: str | None
    flags: dict[str, Words]
    blocks: list[Block]
    keep_policies: bool
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", list(dict.fromkeys([*self.flags, *itertools.chain(*self.blocks)])))

    def grid(self) -> list[dict[str, Words]]:
        """The flags of every run: all combinations of each block, which win over the common flags."""
        return [
            self.flags | dict(zip(block, values, strict=True))
            for block in self.blocks
            for values in itertools.product(*block.values())
        ]

    def text(self) -> str:
        """The plan as a file of its own, which ``read_plan`` reads as the same."""
        plan = {
            "driver": self.driver,
            "flags": {name: _plain(words) for name, words in self.flags.items()},
            "runs": [{name: [_plain(words) for words in values] for name, values in b.items()} for b in self.blocks],
            "keep_policies": str(self.keep_policies).lower(),
        }
        return yaml.dump(plan, Dumper=_Plain, sort_keys=False, default_flow_style=None, allow_unicode=True, width=119)


class _Plain(yaml.SafeDumper):
    """All text, without the quotes that tell text from numbers."""

    yaml_implicit_resolvers: dict = {}


class _Strict(yaml.BaseLoader):
    """Everything is text, as the host's parser wants it: no `off` that is False. A key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{twice!r} is there twice, line {node.start_mark.line + 1}; remove one")
        return super().construct_mapping(node, deep)


def read_plan(path: str | Path, *, smoke: bool = False) -> Plan:
    """The plan in a file. Raises UserError, naming file, value and remedy, for all that is wrong without the host."""
    document = _read(Path(path))
    try:
        return _plan(str(path), document, smoke)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's document; with ``like``, what it does not say itself of driver, flags and smoke is that plan's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; give a plan") from None
    try:
        document = _yaml(text)
        for name in ("flags", "smoke"):
            _mapping(name, document.setdefault(name, {}))
        if "like" not in document:
            return document
        like = document.pop("like")
        if not (isinstance(like, str) and (path.parent / like).is_file()):
            raise UserError(f"like {like!r} is no file beside it; give the name of a plan")
        if path.resolve() in above:
            raise UserError(f"like {like!r} comes back to it; give a plan that is not like this one")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = _read(path.parent / like, (*above, path.resolve()))
    over = {name: base[name] | document[name] for name in ("flags", "smoke")}
    return {"driver": base.get("driver", "local")} | document | over


def _yaml(text: str) -> dict[str, Any]:
    try:
        document = yaml.load(text, _Strict)
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}{where}") from None
    if not isinstance(document, dict):
        raise UserError(f"a plan has the keys {', '.join(KEYS)}; this file has none")
    if unknown := [key for key in document if key not in KEYS]:
        raise UserError(f"unknown key {unknown[0]!r}; a plan's keys are {', '.join(KEYS)}")
    return document


def _plan(source: str, document: dict[str, Any], smoke: bool) -> Plan:
    driver, out = document.get("driver", "local"), document.get("out")
    if driver not in DRIVERS:
        raise UserError(f"driver {driver!r} is none of {', '.join(DRIVERS)}")
    if out is not None and not (isinstance(out, str) and out):
        raise UserError(f"out {out!r} is no directory's name")
    keep = document.get("keep_policies", "false")
    if keep not in ("true", "false"):
        raise UserError(f"keep_policies {keep!r} is neither true nor false")
    flags, over = document["flags"], document["smoke"]
    blocks = document.get("runs")
    if not isinstance(blocks, list) or not blocks:
        raise UserError("runs is empty; give a list of grids such as {reward_shaping: [none, abc], train.seed: 1..10}")
    blocks = [_mapping("runs", block) for block in blocks]
    if smoke:
        flags, blocks = _overridden(flags, blocks, over)
        out = out and f"{out}-smoke"
    return Plan(
        source,
        driver,
        out,
        {name: tuple(_scalars(name, value)) for name, value in flags.items()},
        [{name: _values(name, value) for name, value in block.items()} for block in blocks],
        keep == "true",
    )


def _overridden(flags: dict, blocks: list[dict], over: dict) -> tuple[dict, list[dict]]:
    """What ``smoke`` makes of a plan: its values replace the blocks', where a block has the flag, and the common ones.

    A list replaces only the blocks' where one has the flag: there it is a grid, in ``flags`` the words of one value.
    """
    blocks = [block | {name: over[name] for name in block if name in over} for block in blocks]
    in_a_block = set(itertools.chain(*blocks))
    common = {name: value for name, value in over.items() if name not in in_a_block or isinstance(value, str)}
    only_blocks = {name for name in common if all(name in block for block in blocks)}
    return flags | {name: value for name, value in common.items() if name not in only_blocks}, blocks


def _mapping(where: str, value: object) -> dict[str, Any]:
    """A mapping of flags to values. Raises UserError for another thing, and for names that are no flags of a plan."""
    if not isinstance(value, dict) or (where == "runs" and not value):
        given = "empty" if value in ("", {}, []) else f"{str(value)[:40]!r}"
        raise UserError(f"{where} has to map flags to values, such as algo.kl.init_coef: 0.1; this is {given}")
    for name in value:
        if not isinstance(name, str) or not FLAG.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no flag's name; write it without dashes, as in train.seed")
        if name in OWNED:
            raise UserError(f"{where}: {name} is the study's own business ({OWNED[name]}); leave it out")
    return value


def _values(name: str, value: object) -> list[Words]:
    """A grid's values of one flag: ranges written out, each once."""
    scalars = []
    for scalar in _scalars(name, value):
        span = RANGE.fullmatch(scalar)
        scalars += [scalar] if span is None else map(str, range(int(span[1]), int(span[2]) + 1))
        if span and int(span[2]) < int(span[1]):
            raise UserError(f"{name}: the range {scalar} is empty; write the smaller end first")
    return [(scalar,) for scalar in dict.fromkeys(scalars)]


def _scalars(name: str, value: object) -> list[str]:
    """One value, or a list of them, the environment's variables put in."""
    scalars = value if isinstance(value, list) else [value]
    if not scalars:
        raise UserError(f"{name}: an empty list makes no run; give it a value")
    for scalar in scalars:
        if not isinstance(scalar, str):
            raise UserError(f"{name}: {str(scalar)[:40]} is no single value; give a word or number, or a list of them")
        if not scalar:
            raise UserError(f"{name} has no value; give it one, true for a switch")
    return [VARIABLE.sub(lambda match: _variable(name, match[1]), scalar) for scalar in scalars]


def _variable(flag: str, name: str) -> str:
    if not os.environ.get(name):
        raise UserError(f"{flag} needs the environment variable {name}, which is not set; export {name}=… first")
    return os.environ[name]


def _plain(words: Words) -> str | list[str]:
    return words[0] if len(words) == 1 else list(words)


def command_words(flags: dict[str, Words]) -> list[str]:
    """A command line's words; a switch that is true is its flag alone, one that is false is left out."""
    words = []
    for name, values in flags.items():
        if values != ("false",):
            words += [f"--{name}", *(() if values == ("true",) else values)]
    return words
