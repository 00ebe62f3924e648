"""python launch/paper/prompts.py imdb|hh OUT.jsonl: the paper's prompts from the Hugging Face hub, one per line."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset

SOURCES = {"imdb": {"path": "stanfordnlp/imdb"}, "hh": {"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base"}}


def imdb(rows: list[dict]) -> Iterator[str]:
    """The first two to eight words of each review of more than 200 characters."""
    words = random.Random(0)
    for row in rows:
        if len(row["text"]) > 200:
            yield " ".join(row["text"].replace("<br />", " ").split()[: words.randint(2, 8)])


def hh(rows: list[dict]) -> Iterator[str]:
    """The question of each dialogue of a single turn, in the words that the reward model was trained with."""
    for row in rows:
        turns = row["chosen"].split("\n\nHuman: ")[1:]
        if len(turns) == 1:
            yield f"###Human: {turns[0].split(chr(10) * 2 + 'Assistant:')[0].strip()} ###Assistant:"


def main(task: str, out: str) -> None:
    """Write OUT unless it is there."""
    if Path(out).exists():
        sys.exit(f"error: {out} exists; nothing was overwritten")
    rows = load_dataset(**SOURCES[task], split="train").shuffle(seed=0)  # the reviews lie sorted by label
    prompts = dict.fromkeys({"imdb": imdb, "hh": hh}[task](rows))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{out}.part")
    part.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    part.replace(out)
    print(f"{len(prompts)} prompts: {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SOURCES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
