"""What each token adds to the score through the last layer's attention: signed, in the score's units.

    contribution[b,s] = Σ_h α[b,h,p,s] · v[b,h,s]·G[b,h],      G[b,h] = d score[b] / d o[b,h,p]

α, v: attention and values of the last layer, p the token that the score head reads; o[b,h,p] = Σ_s α[b,h,p,s]·v[b,h,s]
is what the attention function returns there. Sums over s to the part of the score that is linear in o. No backward
goes through a whole layer: o is put into a second forward of the model itself, on token p alone of each sequence. All
layers but the last are skipped; the last is handed what it was handed at p, and its attention function returns o. So
output projections, gates, norms, experts and heads are the model's own, with their hooks. That the score comes out the
same is checked: a layer that also mixes tokens elsewhere (Mamba beside attention) is refused by name.

Dimensions beside the package's: R sequences that have tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from abc_plugin.attention.attention_row import fp32_product
from abc_plugin.attention.full_matrix import named_arguments
from abc_plugin.attention.layers import attention_layers, model_name, score_head, target_layer, unwrap
from abc_plugin.attention.packed_sequences import unpacked
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.attention.row_reader import RETURNS, Recording
from abc_plugin.errors import UserError

# How far the score of the single tokens may be from that of the sequences, relative to what is at stake in either,
# |score| + Σ_s |contribution|. Half precision rounds, and may send a token to another expert.
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.25


class ContributionReader(AttentionTap):
    """Reads each token's contribution to the score; used as ``AttentionTap`` is, recording.row_BS is signed.

    Raises UserError, by name, for a model without a scalar head, whose read layer is not its last, or that bypasses
    transformers' attention interface; CreditError where the score is not that of one token through that layer.
    """

    def __init__(self, model: Any, layer: str = "last_full") -> None:
        check_last_layer(model, layer)
        super().__init__(model, layer, per_head=True)
        self.owner, _ = score_head(model)
        self.block, self.skipped = _decoder_blocks(model, self.module)

    def describe(self) -> str:
        """One line for the log."""
        return f"contribution to the score by {super().describe().removeprefix('attention row of ')}"

    def _new_recording(self, *args: Any, **options: Any) -> ContributionRecording:
        if any(value is not None for value in options.values()):
            raise UserError(f"contributions in {self.model_name} cannot be had of several rows, a ring or split heads")
        return ContributionRecording(*args)

    @contextmanager
    def _watching(self, recording: ContributionRecording) -> Iterator[None]:
        with super()._watching(recording), ExitStack() as hooks:
            for handle in (
                self.owner.register_forward_pre_hook(recording.enter_model, with_kwargs=True),
                self.owner.register_forward_hook(recording.leave_model),
                self.block.register_forward_pre_hook(recording.enter_block, with_kwargs=True),
                *(block.register_forward_hook(recording.leave_earlier_block) for block in self.skipped[:1]),
            ):
                hooks.callback(handle.remove)
            yield


def check_last_layer(model: Any, layer: str) -> None:
    """UserError unless ``layer`` is the model's last: later layers would mix its tokens again."""
    _, index, total = target_layer(model, layer)
    if index == total - 1:
        return
    if total - 1 in attention_layers(model):
        remedy = "give --shaping.layer last"
    else:
        remedy = "its last layer has no attention, so use another --reward_shaping, such as abc"
    raise UserError(
        f"{model_name(model)}: layer {index} of {total} is to be read, but contributions are of the last; {remedy}"
    )


def _decoder_blocks(model: Any, attention: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """(the block that the attention module is in, the other blocks of the same list)."""
    root = unwrap(model)
    path = next(name for name, part in root.named_modules() if part is attention).split(".")
    for depth in range(len(path) - 1, 0, -1):
        blocks = root.get_submodule(".".join(path[:depth]))
        if isinstance(blocks, nn.ModuleList):
            block = blocks[int(path[depth])]
            return block, [other for other in blocks if other is not block]
    raise UserError(f"{model_name(model)} keeps its layers in no list: contributions cannot be read")


class ContributionRecording(Recording):
    """What one ``ContributionReader.record`` block saw."""

    made_of = "value or the score's gradient"

    def __init__(self, mask_BS: Tensor, position_B: Tensor, reader: ContributionReader) -> None:
        super().__init__(mask_BS, position_B, reader)
        self._module, self._owner, self._skipped = reader.module, reader.owner, reader.skipped
        self._call: tuple[tuple, dict[str, Any]] | None = None  # of the model
        self._block_call: dict[str, Tensor] = {}  # of the last block
        self._earlier_output: Any = None
        self._again = False  # while the single tokens run
        self._score_B: Tensor | None = None  # of the single tokens

    def enter_model(self, _owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module that owns the score head."""
        self._call = args, kwargs

    def leave_earlier_block(self, _block: nn.Module, _args: tuple, output: Any) -> None:
        """Forward hook of the first block: in which form blocks return their hidden states."""
        if not self._again:
            self._earlier_output = len(output) if isinstance(output, tuple) else None

    def enter_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Forward pre-hook of the last block: remember its input, later hand the same in at p."""
        arguments = named_arguments(block, args, kwargs)
        if self._again:
            return (), arguments | {name: self._at_score(value) for name, value in self._block_call.items()}
        self._block_call = {
            name: value.detach()
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
        }
        return None

    def look_after(self, value_BKSD: Tensor, output_BSHD: Tensor) -> None:
        """Run the single tokens and go back from the score to the attention's output."""
        if self._call is None:
            raise self._error(f"run {type(self._owner).__name__}, which owns the score head, inside record()")
        if self._owner.training:
            raise self._error("in train mode dropout would change its score; call model.eval()")
        output = self._at_score(output_BSHD).detach().requires_grad_()
        self._tolerance = HALF_TOLERANCE if output.dtype.itemsize < 4 else TOLERANCE
        with torch.enable_grad():
            score_B = self._run_again(output)
            [gradient] = torch.autograd.grad(score_B.sum(), output)
        self._score_B = score_B.detach()
        self._row_BS = self._contribution(value_BKSD.detach(), gradient)
        self._call, self._block_call = None, {}

    def leave_model(self, _owner: nn.Module, _args: tuple, output: Any) -> None:
        """Forward hook of the module that owns the score head: is its score that of the single tokens?"""
        if self._score_B is None:
            return
        score_B = _score(output)
        if score_B.shape != self._score_B.shape:
            raise self._error(f"the score is {tuple(score_B.shape)}, expected one for each of {len(self._mask_BS)}")
        score_B = score_B.detach().float()
        limit_B = self._tolerance * (score_B.abs() + self._row_BS.abs().sum(1))
        off_B = (score_B - self._score_B.float()).abs() > limit_B  # false where a NaN is: that is named by the row
        self._faults.append(((off_B & self._mask_BS.to(off_B.device).any(1)).any(), OTHER_SCORE))

    def _run_again(self, output: Tensor) -> Tensor:
        """The score of token p alone of each sequence, whose attention output is ``output``, with its graph, (B,)."""
        args, kwargs = tree_map_only(Tensor, self._at_score, self._call)
        if "past_key_values" in kwargs:
            kwargs["past_key_values"] = None  # or the single tokens would enter the caller's cache
        self._again = True
        RETURNS[self._module] = output
        try:
            with torch.compiler.set_stance("force_eager"), self._skipping():
                # not by a call: ZeRO-3 would take it for a step of its own, and the hooks above for another forward
                return _score(self._owner.forward(*args, **kwargs))
        finally:
            del RETURNS[self._module]
            self._again = False

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Within the block, the other blocks return the hidden states that they are handed."""

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if self._earlier_output is None else (hidden, *[None] * (self._earlier_output - 1))

        own = [block.__dict__.get("forward") for block in self._skipped]
        for block in self._skipped:
            block.forward = skip
        try:
            yield
        finally:
            for block, forward in zip(self._skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _at_score(self, x: Tensor) -> Tensor:
        """Values of the batch's tokens at p alone, (…, B, 1, …), or (…, 1, R, …) of a stream; others as they are."""
        mask_BS = self._mask_BS.to(x.device)
        padded, streamed = tuple(mask_BS.shape), None
        if self._packing is not None:
            streamed = (1, len(self._packing.sequence_L))
        for dim in range(x.ndim - 1):
            tokens_first = x.movedim((dim, dim + 1), (0, 1))
            if x.shape[dim : dim + 2] == streamed:
                query_R = self._packing.query_B[mask_BS.any(1)]
                return tokens_first[:, query_R].movedim((0, 1), (dim, dim + 1))
            if x.shape[dim : dim + 2] == padded:
                index_B = torch.arange(len(mask_BS), device=x.device)
                return tokens_first[index_B, self.position_B.to(x.device)][:, None].movedim((0, 1), (dim, dim + 1))
        return x

    @torch.no_grad()
    def _contribution(self, value_BKSD: Tensor, gradient: Tensor) -> Tensor:
        mask_BS = self._mask_BS.to(gradient.device)
        if self._packing is not None:
            value_BKSD = unpacked(self._packing, value_BKSD)
            gradient_BHD = gradient.new_zeros(len(mask_BS), *gradient.shape[2:])
            gradient_BHD[mask_BS.any(1)] = gradient[0]
        else:
            gradient_BHD = gradient[:, 0]
        batch, key_heads, _, width = value_BKSD.shape
        grouped_BKGD = gradient_BHD.reshape(batch, key_heads, -1, width)
        part_BHS = fp32_product(grouped_BKGD, value_BKSD.transpose(2, 3)).view(self._row_BHS.shape)
        return torch.where(self._row_BHS != 0, self._row_BHS * part_BHS, 0.0).sum(1)  # padding may hold anything


OTHER_SCORE = (
    "the score is not that of each sequence's last token through the last layer's attention: the head reads another "
    "token, or the layer mixes tokens elsewhere too; use another --reward_shaping, such as abc"
)


def _score(output: Any) -> Tensor:
    """One number per sequence, of what a model with a score head returns, (B,)."""
    score = output if isinstance(output, Tensor) else output[0]
    return score.squeeze(-1) if score.ndim > 1 else score
