"""A study's plan: YAML, checked against a schema by OmegaConf, its grids multiplied out.

Values are text until the host's own parser reads them (run_settings.py), so that no `off` is taken for False.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from abc_plugin.errors import UserError, first_line

Words = tuple[str, ...]  # an option's words on the command line; ("true",) is a switch that is on

OWNED = {
    "ckpt.output_dir": "each run has a folder of its own",
    "ckpt.path": "checkpoints lie in the run's folder",
    "ckpt.load_enable": "with ckpt.save_steps a stopped run always goes on from its checkpoint",
    "logger.tensorboard_dir": "curves lie in the run's folder",
}
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass
class Schema:
    """The keys of a plan file."""

    driver: Literal["local", "ray"] = "local"
    out: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    keep_policies: bool = False
    smoke: dict[str, Any] = field(default_factory=dict)


KEYS = ("like", *Schema.__dataclass_fields__)


@dataclass(frozen=True)
class Plan:
    """A plan, with ``smoke`` and the environment applied.

    source: the file, for messages.  common: the options that all runs share.  runs: the options of each run, common
    ones included.  keep_policies: whether finished runs keep their weights.  text: it as a file of its own.
    """

    source: str
    driver: str
    out: str | None
    common: dict[str, Words]
    runs: list[dict[str, Words]]
    keep_policies: bool
    text: str


def read_plan(path: str | Path, *, smoke: bool = False) -> Plan:
    """The plan in a file. Raises UserError, naming the file and what is wrong, for all that needs no host."""
    try:
        return _plan(Path(path), smoke)
    except OSError as error:
        wrong = f"{error.filename} cannot be read: {error.strerror}"
    except OmegaConfBaseException as error:
        wrong = f"{error.full_key}: {first_line(error)}; a plan's keys are {', '.join(KEYS)}"
    except TypeError as error:  # of OmegaConf, which does not name the key
        wrong = f"{error}; flags and smoke map names to values, runs is a list of such maps"
    except (UserError, ValueError, yaml.YAMLError) as error:
        wrong = " ".join(str(error).split())
    raise UserError(f"{path}: {wrong}")


def _plan(path: Path, smoke: bool) -> Plan:
    plan = _load(path)
    common, grids = OmegaConf.to_container(plan.flags), OmegaConf.to_container(plan.runs)
    if smoke:
        common, grids = _in_small(common, grids, OmegaConf.to_container(plan.smoke))
    # The environment's variables are put in only now: those of what smoke replaces may be unset.
    resolved = OmegaConf.to_container(OmegaConf.create({"flags": common, "runs": grids}), resolve=True)
    common = {name: tuple(_texts(name, value)) for name, value in resolved["flags"].items()}
    runs = []
    for grid in resolved["runs"]:
        values = [[(text,) for text in _texts(name, value, ranges=True)] for name, value in grid.items()]
        runs += [common | dict(zip(grid, each, strict=True)) for each in itertools.product(*values)]
    if not runs:
        raise UserError("runs is empty; give grids, such as {reward_shaping: [none, abc], train.seed: 1..9}")
    if owned := [name for name in {**common, **dict.fromkeys(itertools.chain(*grids))} if name in OWNED]:
        raise UserError(f"{owned[0]} is the study's own business ({OWNED[owned[0]]}); leave it out")
    out = f"{plan.out}-smoke" if smoke and plan.out else plan.out
    text = OmegaConf.to_yaml(
        OmegaConf.create({"driver": plan.driver, **resolved, "keep_policies": plan.keep_policies})
    )
    return Plan(str(path), plan.driver, out, common, runs, plan.keep_policies, text)


def _load(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """A file's plan; with ``like``, driver, flags and smoke start from that plan's. ${NAME} is short for oc.env."""
    content = yaml.load(VARIABLE.sub(r"${oc.env:\1}", path.read_text(encoding="utf-8")), _Text)
    if not isinstance(content, dict):
        raise UserError(f"a plan has the keys {', '.join(KEYS)}; this file has none")
    base, schema, above = {}, OmegaConf.structured(Schema), (*above, path)
    if like := content.pop("like", None):
        if path.parent / str(like) in above:
            raise UserError(f"like {like!r} comes back to it; give a plan that is not like this one")
        base = OmegaConf.masked_copy(_load(path.parent / str(like), above), ["driver", "flags", "smoke"])
    return OmegaConf.merge(schema, base, content)


class _Text(yaml.BaseLoader):
    """All scalars as text, as the host's parser wants them; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{twice!r} is there twice, line {node.start_mark.line + 1}; remove one")
        return super().construct_mapping(node, deep)


def _in_small(common: dict, grids: list[dict], smoke: dict) -> tuple[dict, list[dict]]:
    """``smoke`` replaces values of the grids that have the option, and common ones.

    A list for an option of a grid is a list of values, so it does not become the common value.
    """
    varied = set(itertools.chain(*grids))
    shared = {name: value for name, value in smoke.items() if name not in varied or isinstance(value, str)}
    return common | shared, [grid | {name: smoke[name] for name in grid if name in smoke} for grid in grids]


def _texts(name: str, value: object, ranges: bool = False) -> list[str]:
    """One value or a list of them, each once where ``ranges`` such as 1..10 are written out."""
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{name}: {value!r} is no value; give a word or number, true for a switch, or a list")
    if not ranges:
        return texts
    values: list[str] = []
    for text in texts:
        ends = RANGE.fullmatch(text)
        if ends and int(ends[2]) < int(ends[1]):
            raise UserError(f"{name}: the range {text} is empty; write the smaller end first")
        values += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [text]
    return list(dict.fromkeys(values))


def command_words(options: dict[str, Words]) -> list[str]:
    """A command line's words; a switch that is true is its name alone, one that is false is left out."""
    words = []
    for name, values in options.items():
        if values != ("false",):
            words += [f"--{name}", *(() if values == ("true",) else values)]
    return words
