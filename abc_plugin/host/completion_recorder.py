"""Some completions of a training step, with the numbers of each token, as ``completions.jsonl`` and to the trackers.

Reads only: what the host computes is the same with it and without. The fields: ``report.recorded_completions``.
"""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from abc_plugin.errors import CannotWrite
from abc_plugin.host.experience_maker import RewardParts
from abc_plugin.report.recorded_completions import FILE, FLAG, Record, record_of
from abc_plugin.report.samples_file import spread_over_ranks
from abc_plugin.text.character_spans import token_texts

PICTURED = 256  # tokens in TensorBoard's picture, of all its completions: it takes the run a second at most


class Recorder:
    """Writes the completions of the first step and of every ``--shaping.show_every``-th, on rank 0."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.shaping = trainer, trainer.args.shaping
        self.tokenizer = getattr(trainer.tokenizer, "tokenizer", trainer.tokenizer)  # a vision model's is inside
        self.path = Path(trainer.args.ckpt.output_dir) / FILE
        self.run = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.pictures = True
        self.step = 0  # counted from 1; the trainer sets it

    @property
    def due(self) -> bool:
        """Whether completions of this step are recorded here."""
        every = self.shaping.show_every
        return every > 0 and (self.step == 1 or self.step % every == 0) and self.trainer.strategy.is_rank_0()

    @torch.no_grad()
    def record(self, experiences: list[Experience], parts: list[RewardParts]) -> None:
        """Write ``--shaping.show_samples`` completions, at evenly spaced ranks of the score, best and worst in.

        Those whose score or shaped reward is NaN or infinite have no rank; a line says how many.
        Raises CannotWrite.
        """
        rows, lost = [], 0
        for batch, (experience, part) in enumerate(zip(experiences, parts, strict=True)):
            fine_B = part.score_B.isfinite() & part.shaped_BA.isfinite().all(1)
            acting_B = experience.action_mask.any(1)
            lost += int((acting_B & ~fine_B).sum())
            rows += [(part.score_B[row].item(), batch, row) for row in (acting_B & fine_B).nonzero()[:, 0].tolist()]
        if lost:
            print(f"abc_plugin: step {self.step}: {lost} rewards are NaN or infinite, not recorded", flush=True)
        ranked = spread_over_ranks(rows, lambda row: row[0], self.shaping.show_samples)
        general = {"run": self.run, "step": self.step, "method": self.shaping.method, "beta": self.shaping.beta}
        lines = [
            general | self._line(experiences[batch], row, parts[batch]) | {"reward": _short(score)}
            for _, (score, batch, row) in ranked
        ]
        if not lines:  # not one response has a token
            return
        self._append(lines)
        self._track([record_of(line) for line in lines])

    def _line(self, experience: Experience, row: int, parts: RewardParts) -> dict[str, Any]:
        acts_A = experience.action_mask[row].bool()
        first, last = (int(acts_A.nonzero()[at]) for at in (0, -1))
        real_S = experience.attention_mask[row].bool()
        prompt = experience.sequences[row, : first + 1][real_S[: first + 1]].tolist()  # action t chose token t + 1
        ids = experience.sequences[row, first + 1 : last + 2].tolist()
        texts = token_texts(self.tokenizer, prompt + ids)
        inside = slice(first, last + 1)

        def numbers(value_BA: Tensor | None) -> list[float | None] | None:
            if value_BA is None:
                return None
            pairs = zip(value_BA[row, inside].tolist(), acts_A[inside].tolist(), strict=True)
            return [_short(value) if acts else None for value, acts in pairs]

        special = set(self.tokenizer.all_special_ids)
        return {
            "sample": experience.index[row],
            "truncated": bool(experience.truncated[row]) if experience.truncated is not None else False,
            "spread_reward": _short((parts.shaped_BA[row] * acts_A).sum().item()),
            "prompt": "".join(texts[: len(prompt)]),
            "special": [at for at, token in enumerate(ids) if token in special],
            "tokens": texts[len(prompt) :],
            "ids": ids,
            "credit": numbers(_shares(parts.credit_BA)),
            "shaped_reward": numbers(parts.shaped_BA),
            "kl_penalty": numbers(parts.penalty_BA),
            "value": numbers(parts.value_BA),
            "advantage": numbers(experience.advantages),
            "return": numbers(experience.returns),
        }

    def _append(self, lines: list[dict[str, Any]]) -> None:
        """One write per step, so that a kill leaves at most one line cut short; it is ended before the next begins."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell() and file.seek(-1, io.SEEK_END) and file.read(1) != b"\n":
                    file.write(b"\n")
                file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            raise CannotWrite(f"{self.path} cannot be written: {error.strerror}; {FLAG} 0 records nothing") from None

    def _track(self, records: list[Record]) -> None:
        """A picture for TensorBoard, a page for W&B, where the host logs there."""
        board, wandb = self.trainer.tensorboard_logger, self.trainer.wandb_logger
        if board and self.pictures:
            try:
                from PIL import Image

                from abc_plugin.report.heatmap_png import draw
            except ModuleNotFoundError as error:
                print(f"abc_plugin: no heat maps in TensorBoard, {error.name} is not installed", flush=True)
                self.pictures = False
            else:
                picture = Image.open(io.BytesIO(draw(records, max(1, PICTURED // len(records))))).convert("RGB")
                board.writer.add_image("completions/credit", np.asarray(picture), self.step, dataformats="HWC")
        if wandb:
            from abc_plugin.report.recorded_steps_html import fragment

            page = wandb.handle.Html(fragment(records), inject=False)
            wandb.handle.log({"train/completions": page, "train/global_step": self.step})


def _shares(credit_BA: Tensor) -> Tensor:
    """credit / sum |credit|, (B, A): weights stay what they are, signed credit sums to 1 in absolute value."""
    total_B1 = credit_BA.double().abs().sum(1, keepdim=True)
    return credit_BA.double() / total_B1.where(total_B1 > 0, 1.0)


def _short(value: float) -> float | None:
    """Six digits: what fp32 is good for, in half the file. None for what JSON has no word for: NaN and infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
