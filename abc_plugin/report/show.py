"""``abc-rlhf show``: completions recorded in training, in the terminal, as pictures, or as a page in the browser."""

from __future__ import annotations

import argparse
import io
import re
import webbrowser
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from abc_plugin.errors import UserError
from abc_plugin.report.recorded_completions import FILE, FLAG, Record, by_step, read_records
from abc_plugin.report.samples_file import Sample, read_samples, spread_over_ranks
from abc_plugin.report.token_colours import heat, swatches, token_text, visible

ROWS = 8  # of a completion's table
SHOWN = 4  # completions of a file that has no steps
SVG_COLUMNS = 100
SVG_FORMAT = re.sub(
    r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
)  # rich's asks the net for fonts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run's output directory, or a file of abc-rlhf evaluate")
    parser.add_argument("--step", type=int, metavar="N", help="a recorded step (default the last)")
    parser.add_argument("--sample", type=int, metavar="K", help="only that completion's number, with all its tokens")
    parser.add_argument(
        "--top", type=int, metavar="N", help=f"tokens in each table, those with most credit (default {ROWS}; 0: all)"
    )
    parser.add_argument("--png", metavar="DIR", help="also write one heat map per shown completion")
    parser.add_argument("--svg", metavar="DIR", help="also write what the terminal shows of each, as SVG")
    parser.add_argument("--html", action="store_true", help="also write a page of all recorded steps")
    parser.add_argument("--open", action="store_true", help="write that page and open it in the browser")


def run(args: argparse.Namespace) -> int:
    """Print the completions; the last lines say what was written and how to see more.

    Raises UserError when nothing was recorded, on a step or sample that was not, and on a file of another kind.
    """
    path, samples, notes = _read(args.run_dir)
    if (args.html or args.open) and not isinstance(samples[0], Record):
        raise UserError(f"{path} is not of a training run; abc-rlhf report RUN_DIR --after {path} makes a page of it")
    shown = _select(samples, args)
    console = Console(highlight=False)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    rows = args.top if args.top is not None else 0 if args.sample is not None else ROWS
    for sample in shown.values():
        _print(console, sample, rows)
    console.print(_legend(any(sample.signed for sample in shown.values()), coloured(console)))
    if args.png:
        _write_pngs(Path(args.png), shown)
    if args.svg:
        _write_svgs(Path(args.svg), shown, rows)
    if args.html or args.open:
        _write_page(path, samples, notes, args)
    print(_more(args.run_dir, path, samples))
    return 0


def _read(run_dir: str) -> tuple[Path, list[Sample], list[str]]:
    """(file, records of a run or samples of a file, notes)."""
    given = Path(run_dir)
    path = given / FILE if given.is_dir() else given
    if not given.exists():
        raise UserError(f"{run_dir} does not exist; give the output directory (--ckpt.output_dir) of a run")
    if not path.exists():
        raise UserError(f"{run_dir} has no {FILE}; runs record completions unless {FLAG} is 0")
    if path.name == FILE:
        records, notes = read_records(path)
        if not records:
            raise UserError(notes[-1])
        return path, records, notes
    return path, read_samples(path), []


def _select(samples: list[Sample], args: argparse.Namespace) -> dict[int, Sample]:
    """Completions of the step by number, in the order in which they stand in the file."""
    if not isinstance(samples[0], Record):
        if args.step is not None:
            raise UserError(f"--step {args.step}: {args.run_dir} is not of a training run and has no steps")
        numbered = dict(enumerate(samples))
        if args.sample is None:
            numbered = dict(item for _, item in spread_over_ranks([*numbered.items()], lambda it: it[1].reward, SHOWN))
    else:
        steps = by_step(samples)
        step = max(steps) if args.step is None else args.step
        if step not in steps:
            raise UserError(f"--step {step} was not recorded; recorded steps: {_listed([*steps])}")
        numbered = {record.sample: record for record in steps[step]}
    if args.sample is None:
        return numbered
    if args.sample not in numbered:
        raise UserError(f"--sample {args.sample} is not there; samples: {_listed([*numbered])}")
    return {args.sample: numbered[args.sample]}


def _listed(numbers: list[int]) -> str:
    """Numbers for a message; a long list by its ends."""
    words = [str(number) for number in numbers]
    return ", ".join(words if len(words) <= 24 else [*words[:12], "…", *words[-12:]])


def coloured(console: Console) -> bool:
    """Whether a background colour would be seen."""
    return console.color_system is not None and not console.no_color


def _print(console: Console, sample: Sample, rows: int) -> None:
    console.print(Text(visible(sample.caption), Style(bold=True)))
    console.print(Text(visible(sample.prompt), Style(dim=True)))
    console.print(heat(sample, colour=coloured(console)) if sample.tokens else Text("(no tokens)"))
    if sample.tokens:
        console.print(_table(sample, rows))
    console.print()


def _table(sample: Sample, rows: int) -> Table:
    """The tokens with most credit, in the order of the text; all of them with ``rows`` 0."""
    generated = [at for at, share in enumerate(sample.credit) if share is not None]
    ranked = sorted(generated, key=lambda at: -abs(sample.credit[at]))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("token", overflow="fold", min_width=8)
    table.add_column("credit", justify="right", no_wrap=True)
    names = list(sample.numbers(generated[0])) if generated and isinstance(sample, Record) else []
    for name in names:
        table.add_column(name, justify="right")
    for at in sorted(ranked[:rows] if rows > 0 else ranked):
        values = sample.numbers(at)
        token = Text(token_text(sample.tokens[at]).replace("\n", ""))
        share = f"{100 * sample.credit[at]:.1f} %"
        table.add_row(str(at), token, share, *(values.get(name, "") for name in names))
    return table


def _legend(signed: bool, colour: bool) -> Text:
    """What colours or numbers mean."""
    meaning = "of the absolute credit, + raised the reward, - lowered it" if signed else "of the credit"
    if not colour:
        return Text(f"[n]: n % {meaning}")
    return swatches(signed).append(f" × the uniform share; credit: share {meaning}", Style(dim=True))


def _file(out: Path, number: int, sample: Sample, suffix: str) -> Path:
    step = f"step{sample.step:06d}-" if isinstance(sample, Record) else ""
    return out / f"{step}sample{number:04d}{suffix}"


def _write_pngs(out: Path, shown: dict[int, Sample]) -> None:
    try:
        from abc_plugin.report.heatmap_png import draw
    except ModuleNotFoundError as error:
        raise UserError(f"--png needs {error.name}; pip install 'abc-plugin[report]'") from None
    for number, sample in shown.items():
        _write(_file(out, number, sample, ".png"), draw([sample]))
    print(f"{len(shown)} heat maps in {out}")


def _write_svgs(out: Path, shown: dict[int, Sample], rows: int) -> None:
    for number, sample in shown.items():
        console = Console(
            record=True, width=SVG_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
        )
        console.no_color = False  # which the environment may ask of the terminal
        _print(console, sample, rows)
        console.print(_legend(sample.signed, True))
        title = f"Credit in {FILE}" if isinstance(sample, Record) else "Credit"
        svg = console.export_svg(title=title, theme=DEFAULT_TERMINAL_THEME, code_format=SVG_FORMAT, unique_id="credit")
        _write(_file(out, number, sample, ".svg"), svg.encode("utf-8", "replace"))
    print(f"{len(shown)} SVGs in {out}")


def _write_page(path: Path, samples: list[Sample], notes: list[str], args: argparse.Namespace) -> None:
    """A page of its own beside the file: the report's would lose what it was made with (--before, --compare)."""
    from abc_plugin.report.html_templates import document
    from abc_plugin.report.recorded_steps_html import section

    page, name = path.with_suffix(".html"), path.parent.resolve().name
    heading = f"{len(samples)} completions recorded in the training of {name}"
    html = document(name, heading, section(samples, notes), f"abc-rlhf show {args.run_dir} --html")
    _write(page, html.encode("utf-8", "replace"))
    if args.open and not webbrowser.open(page.resolve().as_uri()):
        print("no browser was found: open the page yourself")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _more(run_dir: str, path: Path, samples: list[Sample]) -> str:
    """The last line: what else there is."""
    if not isinstance(samples[0], Record):
        return f"{len(samples)} completions in {path} (--sample K)"
    written = path.with_suffix(".html")
    page = f"page: {written}" if written.exists() else f"a page of them: abc-rlhf show {run_dir} --html"
    return f"recorded steps: {_listed([*by_step(samples)])} (--step N), in {path}; {page}"
