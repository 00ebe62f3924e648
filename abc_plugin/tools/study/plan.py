"""A study's plan: YAML, checked against a schema by OmegaConf, its grids multiplied out.

Values are text until the host's own parser reads them (settings.py), so that no `off` is taken for False.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from abc_plugin.errors import UserError

Words = tuple[str, ...]  # an option's words on the command line; ("true",) is a switch that is on
Grid = dict[str, list[Words]]  # the values of each option; all combinations are runs

OWNED = {
    "ckpt.output_dir": "each run has a folder of its own",
    "ckpt.path": "checkpoints lie in the run's folder",
    "ckpt.load_enable": "with ckpt.save_steps a stopped run always goes on from its checkpoint",
    "logger.tensorboard_dir": "curves lie in the run's folder",
}
OPTION = re.compile(r"[A-Za-z][\w.]*")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass
class Schema:
    """The keys of a plan file."""

    like: str | None = None
    driver: Literal["local", "ray"] = "local"
    out: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    keep_policies: bool = False
    smoke: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A plan, with ``smoke`` and the environment applied.

    source: the file, for messages.  common: the options that all runs share.  keep_policies: whether finished runs
    keep their weights.  text: it as a file of its own.
    """

    source: str
    driver: str
    out: str | None
    common: dict[str, Words]
    grids: list[Grid]
    keep_policies: bool
    text: str

    @property
    def names(self) -> list[str]:
        """Every option that the plan sets."""
        return list(dict.fromkeys([*self.common, *itertools.chain(*self.grids)]))

    def runs(self) -> list[dict[str, Words]]:
        """The options of every run: all combinations of each grid, which win over the common ones."""
        return [
            self.common | dict(zip(grid, values, strict=True))
            for grid in self.grids
            for values in itertools.product(*grid.values())
        ]


def read_plan(path: str | Path, *, smoke: bool = False) -> Plan:
    """The plan in a file. Raises UserError, naming file, value and remedy, for all that is wrong without the host."""
    plan = _load(Path(path))
    with _named(path):
        if not plan.runs:
            raise UserError("runs is empty; give grids, such as {reward_shaping: [none, abc], train.seed: 1..9}")
        common, grids = OmegaConf.to_container(plan.flags), OmegaConf.to_container(plan.runs)
        if smoke:
            common, grids = _in_small(common, grids, OmegaConf.to_container(plan.smoke))
        # The environment's variables are put in only now: those of what smoke replaces may be unset.
        resolved = OmegaConf.to_container(OmegaConf.create({"flags": common, "runs": grids}), resolve=True)
        written = {"driver": plan.driver, **resolved, "keep_policies": plan.keep_policies}
        return Plan(
            source=str(path),
            driver=plan.driver,
            out=f"{plan.out}-smoke" if smoke and plan.out else plan.out,
            common={name: tuple(_texts(name, value)) for name, value in resolved["flags"].items()},
            grids=[{name: _values(name, value) for name, value in grid.items()} for grid in resolved["runs"]],
            keep_policies=plan.keep_policies,
            text=OmegaConf.to_yaml(OmegaConf.create(written)),
        )


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Errors within name the file, in one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_explained(error)}") from None


def _load(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """A file's plan; with ``like``, driver, flags and smoke start from that plan's."""
    with _named(path):
        schema, content = OmegaConf.structured(Schema), _yaml(path)
        plan = OmegaConf.merge(schema, content)
        for where, options in [("flags", plan.flags), ("smoke", plan.smoke), *(("runs", grid) for grid in plan.runs)]:
            _check_names(where, options)
        if plan.like is None:
            return plan
        like = path.parent / plan.like
        if not like.is_file():
            raise UserError(f"like {plan.like!r} is no file beside it; give the name of a plan")
        if like.resolve() in (path.resolve(), *above):
            raise UserError(f"like {plan.like!r} comes back to it; give a plan that is not like this one")
    base = _load(like, (*above, path.resolve()))
    return OmegaConf.merge(schema, OmegaConf.masked_copy(base, ["driver", "flags", "smoke"]), content)


class _Text(yaml.BaseLoader):
    """All scalars as text, as the host's parser wants them; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{twice!r} is there twice, line {node.start_mark.line + 1}; remove one")
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> dict[str, Any]:
    """A file's mapping; ${NAME} is short for OmegaConf's ${oc.env:NAME}."""
    try:
        content = yaml.load(VARIABLE.sub(r"${oc.env:\1}", path.read_text(encoding="utf-8")), _Text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}; give a plan") from None
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        where = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"not YAML: {getattr(error, 'problem', None) or error}{where}") from None
    if not isinstance(content, dict):
        raise UserError(f"a plan has the keys {', '.join(Schema.__dataclass_fields__)}; this file has none")
    for name, kind in {"flags": dict, "smoke": dict, "runs": list}.items():  # OmegaConf would not name the key
        if not isinstance(content.get(name, kind()), kind):
            raise UserError(f"{name} {str(content[name])[:40]!r} is no {kind.__name__}; see the plans in launch/study")
    return content


def _explained(error: OmegaConfBaseException) -> str:
    """One line of an error of OmegaConf."""
    reason = str(error).splitlines()[0].replace(Schema.__name__, "a plan")
    if "Environment variable" in reason:
        name = reason.split("'")[1]
        return f"{error.full_key} needs the environment variable {name}, which is not set; export {name}=… first"
    return f"{error.full_key}: {reason}; a plan's keys are {', '.join(Schema.__dataclass_fields__)}"


def _in_small(common: dict, grids: list[dict], smoke: dict) -> tuple[dict, list[dict]]:
    """``smoke`` replaces values of the grids that have the option, and common ones.

    A list for an option of a grid is a list of values, so it does not become the common value.
    """
    varied = set(itertools.chain(*grids))
    shared = {name: value for name, value in smoke.items() if name not in varied or isinstance(value, str)}
    return common | shared, [grid | {name: smoke[name] for name in grid if name in smoke} for grid in grids]


def _check_names(where: str, options: dict[str, Any]) -> None:
    if where == "runs" and not options:
        raise UserError("runs has an empty grid; map options to values, such as algo.kl.init_coef: [0.1, 0.2]")
    for name in options:
        if not OPTION.fullmatch(name):
            raise UserError(f"{where}: {name!r} is no flag's name; write it without dashes, as in train.seed")
        if name in OWNED:
            raise UserError(f"{where}: {name} is the study's own business ({OWNED[name]}); leave it out")


def _values(name: str, value: object) -> list[Words]:
    """A grid's values of one option: ranges written out, each once."""
    values: list[str] = []
    for text in _texts(name, value):
        ends = RANGE.fullmatch(text)
        values += [text] if ends is None else map(str, range(int(ends[1]), int(ends[2]) + 1))
        if ends and int(ends[2]) < int(ends[1]):
            raise UserError(f"{name}: the range {text} is empty; write the smaller end first")
    return [(each,) for each in dict.fromkeys(values)]


def _texts(name: str, value: object) -> list[str]:
    """One value, or a list of them."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise UserError(f"{name}: an empty list makes no run; give it a value")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name}: {str(text)[:40]} is no single value; give a word or number, or a list of them")
        if not text:
            raise UserError(f"{name} has no value; give it one, true for a switch")
    return texts


def command_words(options: dict[str, Words]) -> list[str]:
    """A command line's words; a switch that is true is its name alone, one that is false is left out."""
    words = []
    for name, values in options.items():
        if values != ("false",):
            words += [f"--{name}", *(() if values == ("true",) else values)]
    return words
