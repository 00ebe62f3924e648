"""Some completions of a training step, with the numbers of each token, as ``completions.jsonl`` and to the trackers.

Reads only: what the host computes is the same with it and without. See ``report.records`` for the file's fields.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from openrlhf.trainer.ppo_utils import experience_maker as host
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from abc_plugin.credit.redistribute import last_action
from abc_plugin.errors import UserError
from abc_plugin.host.options import option
from abc_plugin.report.records import FILE, FLAG, Record, record_of
from abc_plugin.report.samples import spread_over_ranks
from abc_plugin.text.spans import token_texts

PICTURED = 256  # tokens in TensorBoard's picture, of all its completions: it takes the run a second at most


class Parts(NamedTuple):
    """What one experience's reward consists of, each (B, A)."""

    credit_BA: Tensor  # the method's, in any unit; its sign is kept where the method is signed
    shaped_BA: Tensor  # reward units, without the KL penalty
    penalty_BA: Tensor  # reward units


class Recorder:
    """Writes the completions of the first step and of every ``--shaping.show_every``-th, on rank 0."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.shaping = trainer, trainer.args.shaping
        self.tokenizer = getattr(trainer.tokenizer, "tokenizer", trainer.tokenizer)  # a vision model's is inside
        self.path = Path(option(trainer.args, "ckpt.output_dir")) / FILE
        self.run = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.pictures = True

    def due(self, step: int) -> bool:
        """Whether completions of this step, counted from 1, are recorded here."""
        every = self.shaping.show_every
        return every > 0 and (step == 1 or step % every == 0) and self.trainer.strategy.is_rank_0()

    @contextlib.contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """While the host makes the step's experiences. Raises UserError when the file cannot be written."""
        if not self.due(step):
            yield
            return
        maker = self.trainer.experience_maker
        stock = maker.compute_advantages_and_returns

        def compute_advantages_and_returns(experiences: list[Experience]) -> list[Experience]:
            scores = [experience.info.get("reward", experience.rewards).clone() for experience in experiences]
            with self._parts(maker) as parts:
                made = stock(experiences)
            self.record(step, made, scores, [Parts(*parts[id(experience.action_mask)]) for experience in made])
            return made

        with mock.patch.object(maker, "compute_advantages_and_returns", compute_advantages_and_returns):
            yield

    @contextlib.contextmanager
    def _parts(self, maker: Any) -> Iterator[dict]:
        """Filled while the host asks for rewards: id of an action mask -> Parts; by the maker where it shapes them."""
        parts: dict[int, tuple] = {}
        stock = host.compute_reward

        def compute_reward(
            r: Tensor, kl_coef: float, kl: Tensor, action_mask: Tensor, reward_clip_range: tuple
        ) -> Tensor:
            reward_BA = stock(r, 0.0, torch.zeros_like(kl), action_mask, reward_clip_range)
            penalty_BA = stock(torch.zeros_like(r), kl_coef, kl, action_mask, None)
            parts[id(action_mask)] = (last_action(action_mask), reward_BA, penalty_BA)
            return stock(r, kl_coef, kl, action_mask, reward_clip_range)

        dense = self.shaping.dense
        with mock.patch.object(*((maker, "parts", parts) if dense else (host, "compute_reward", compute_reward))):
            yield parts

    @torch.no_grad()
    def record(self, step: int, experiences: list[Experience], scores: list[Tensor], parts: list[Parts]) -> None:
        """Write ``--shaping.show_samples`` completions, at evenly spaced ranks of the score, best and worst in.

        Those whose score or shaped reward is NaN or infinite have no rank; a line says how many.
        """
        rows, lost = [], 0
        for place, (experience, score_B) in enumerate(zip(experiences, scores, strict=True)):
            fine_B = score_B.isfinite() & parts[place].shaped_BA.isfinite().all(1)
            acting_B = experience.action_mask.any(1)
            lost += int((acting_B & ~fine_B).sum())
            rows += [(score_B[row].item(), place, row) for row in (acting_B & fine_B).nonzero()[:, 0].tolist()]
        if lost:
            print(f"abc_plugin: step {step}: {lost} rewards are NaN or infinite, not recorded", flush=True)
        chosen = spread_over_ranks(rows, lambda found: found[0], self.shaping.show_samples)
        general = {"run": self.run, "step": step, "method": self.shaping.method, "beta": self.shaping.beta}
        lines = [
            general | self._line(experiences[place], row, parts[place]) | {"reward": _short(score)}
            for _, (score, place, row) in chosen
        ]
        if not lines:  # not one response has a token
            return
        self._append(lines)
        self._track(step, [record_of(line) for line in lines])

    def _line(self, experience: Experience, row: int, parts: Parts) -> dict[str, Any]:
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
            "value": numbers(experience.values),
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
            raise UserError(f"cannot write {self.path}: {error.strerror}; {FLAG} 0 records nothing") from None

    def _track(self, step: int, records: list[Record]) -> None:
        """A picture for TensorBoard, a page for W&B, where the host logs there."""
        board, wandb = self.trainer.tensorboard_logger, self.trainer.wandb_logger
        if board and self.pictures:
            try:
                from PIL import Image

                from abc_plugin.report.heatmap import draw
            except ModuleNotFoundError as error:
                print(f"abc_plugin: no heat maps in TensorBoard, {error.name} is not installed", flush=True)
                self.pictures = False
            else:
                picture = Image.open(io.BytesIO(draw(records, max(1, PICTURED // len(records))))).convert("RGB")
                board.writer.add_image("completions/credit", np.asarray(picture), step, dataformats="HWC")
        if wandb:
            from abc_plugin.report.training import fragment

            page = wandb.handle.Html(fragment(records), inject=False)
            wandb.handle.log({"train/completions": page, "train/global_step": step})


def _shares(credit_BA: Tensor) -> Tensor:
    """credit / sum |credit|, (B, A): weights stay what they are, signed credit sums to 1 in absolute value."""
    total_B1 = credit_BA.double().abs().sum(1, keepdim=True)
    return credit_BA.double() / total_B1.where(total_B1 > 0, 1.0)


def _short(value: float) -> float | None:
    """Six digits: what fp32 is good for, in half the file. None for what JSON has no word for: NaN and infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
