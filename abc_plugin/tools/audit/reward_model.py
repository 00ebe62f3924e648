"""The reward model in plain transformers, read as OpenRLHF reads it: scores, evidence, attention rows."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from abc_plugin.attention import attach
from abc_plugin.attention.evidence_readers import attach_readers, record, rows
from abc_plugin.attention.layers import attention_layers
from abc_plugin.attention.scalar_head import FLAG, load_reward_model
from abc_plugin.errors import CreditError, NotFinite, UserError

TOKENS = {"cpu": 4096, "cuda": 2**18}  # padded tokens of a forward to begin with; halved where memory runs out


@dataclass(frozen=True)
class Explanation:
    """What a sequence of S tokens shows of the model."""

    score: float
    evidence: dict[str, Tensor]  # what methods need, by name (``credit.methods.NEEDS``), each (S,)
    rows_LHS: Tensor  # attention of the last token, by layer and head


class RewardModel:
    """A checkpoint with a scalar head, its score read at the last token.

    path: a directory or hub name.  head: the scalar layer's name, where the config has no ``value_head_prefix``.
    normalise: subtract the config's mean and divide by its std, as ``--reward.normalize_enable`` does.
    layer, heads: whose row ABC reads (``layers.target_layer``; None: all heads).  needs: of the methods audited.
    ``layers`` are the indices of the layers of ``Explanation.rows_LHS``, and ``configured`` is an index among them.
    Raises UserError on what is no reward model, on a model whose attention cannot be read, and on gradients of a
    quantised one.
    """

    def __init__(
        self,
        path: str,
        *,
        layer: str = "last_full",
        heads: list[int] | None = None,
        needs: frozenset[str] = frozenset(),
        head: str = "score",
        normalise: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_reward_model(path, head=head, dtype=dtype, normalise=normalise).to(self.device).eval()
        if "gradient" in needs and getattr(self.model, "is_quantized", False):
            raise UserError(
                f"{FLAG} {path} is a quantised checkpoint, whose kernels need not have a backward pass: audit the "
                "unquantised one, which training with --ds.load_in_4bit quantises itself, or give --methods without "
                "grad_input"
            )
        self.model.requires_grad_(False)
        self.layer, self.heads = layer, heads
        self.layers = list(attention_layers(self.model, outside=True))
        self._readers = attach_readers(self.model, needs | {"attention"}, layer=layer, heads=heads)
        self.configured = self.layers.index(self._readers["attention"].layer_index)
        self._taps = [attach(self.model, str(index), per_head=True) for index in self.layers]
        self._tokens = TOKENS[self.device.type]

    @property
    def window(self) -> int | None:
        """The longest sequence that the model has positions for; None where the config sets no bound."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def read(self, need: str) -> None:
        """Read this evidence too, tried on two tokens. Raises UserError or CreditError where the model has none."""
        self._readers |= attach_readers(self.model, {need}, layer=self.layer, heads=self.heads)
        try:
            self.explain([0, 1])
        except CreditError:
            del self._readers[need]
            raise

    def scores(self, sequences: list[list[int]]) -> list[float]:
        """Score of each sequence, in batches of like length as large as memory allows."""
        waiting = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        while waiting:
            count = 1
            while count < len(waiting) and (count + 1) * len(sequences[waiting[count]]) <= self._tokens:
                count += 1
            batch, waiting = waiting[:count], waiting[count:]
            for i, score in zip(batch, self._score_or_halve([sequences[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    def _score_or_halve(self, sequences: list[list[int]]) -> list[float]:
        """Where memory runs out, each half by itself, and smaller batches from here on."""
        try:
            return self._forward(sequences)
        except RuntimeError as error:
            if len(sequences) == 1 or not should_reduce_batch_size(error):
                raise
        self._tokens = max(1, sum(map(len, sequences)) // 2)
        clear_device_cache()
        middle = len(sequences) // 2
        return self._score_or_halve(sequences[:middle]) + self._score_or_halve(sequences[middle:])

    @torch.no_grad()
    def _forward(self, sequences: list[list[int]]) -> list[float]:
        mask_BS = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in sequences], batch_first=True)
        ids_BS = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
        score_B = self.model(ids_BS.to(self.device), mask_BS.to(self.device)).float()
        for ids, score in zip(sequences, score_B.tolist(), strict=True):
            if not math.isfinite(score):
                raise NotFinite(f"{FLAG}: the score of the tokens {ids[:8]}… is {score}; check the model's weights")
        return score_B.tolist()

    def explain(self, ids: list[int]) -> Explanation:
        """Score, evidence, and every layer's and head's row of one sequence."""
        ids_BS = torch.tensor([ids], device=self.device)
        mask_BS = torch.ones_like(ids_BS)
        with torch.no_grad(), ExitStack() as stack:
            read = stack.enter_context(record(self._readers, mask_BS))
            recordings = [stack.enter_context(tap.record(mask_BS)) for tap in self._taps]
            score = self.model(ids_BS, mask_BS).item()
            rows_LHS = torch.stack([recording.row_BHS[0] for recording in recordings]).float().cpu()
        evidence = {name: row_BS[0] for name, row_BS in rows(read).items()}
        return Explanation(score, evidence, rows_LHS)

    def fingerprint(self) -> str:
        """Sixteen hex digits over the weights' names, shapes and up to 64 values of each, evenly spaced."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, len(flat) // 64)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]
