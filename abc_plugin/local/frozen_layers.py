"""``--local.train_layers N``: the last N layers of policy and critic are trained, the others are frozen and run once.

What the frozen layers make of a completion never changes within a rollout, so the hidden states that enter the first
trained layer are kept: policy, reference, and each epoch of training share one pass through the frozen layers.
Training the top of the network only is a common economy (Howard & Ruder 2018; the frozen trunk with two branches of
trlX's ``num_layers_unfrozen``); every reward shaping has the same.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from operator import attrgetter
from typing import Any

import torch
from openrlhf.models import Actor
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from abc_plugin.attention.layers import pretrained, skeleton, target_layer
from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import UserError


def check_settings(args: Namespace, shaping: ShapingConfig) -> None:
    """Raises UserError where ``--local.train_layers`` does not fit the other settings or the models."""
    count = shaping.train_layers
    if not count:
        return
    for name, why in (
        ("ds.lora.rank", "an adapter freezes every layer itself"),
        ("actor.gradient_checkpointing_enable", "checkpointed layers run again, which the kept states are to save"),
    ):
        if attrgetter(name)(args):
            raise UserError(f"--local.train_layers {count} does not go with --{name}: {why}; leave one out")
    if args.ds.zero_stage == 3:
        raise UserError(f"--local.train_layers {count} does not go with --ds.zero_stage 3, which splits; use 2")
    for name in ("actor", "critic"):
        path = getattr(args, name).model_name_or_path
        if path is None:
            continue
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        layers = config.get_text_config().num_hidden_layers
        if count >= layers:
            raise UserError(
                f"--local.train_layers {count}: --{name}.model_name_or_path {path} has {layers} layers; give fewer, "
                "or leave it out to train all"
            )
        if name == "actor" and policy_need(shaping):
            _check_attention(config, shaping, layers)


def _check_attention(config: PretrainedConfig, shaping: ShapingConfig, layers: int) -> None:
    index = target_layer(skeleton(config, auto=AutoModelForCausalLM), shaping.layer)[1]
    if index < layers - shaping.train_layers:
        raise UserError(
            f"--reward_shaping {shaping.method} reads the policy's layer {index}, which --local.train_layers "
            f"{shaping.train_layers} freezes and runs once only; train {layers - index}, or read --shaping.layer -1"
        )


class FrozenStrategy:
    """Mixed into the local driver's strategy, through which every model passes to be wrapped."""

    trunks: tuple[Trunk, ...] = ()

    def prepare(self, *models: Any) -> Any:
        """Host signature. Freezes the lower layers of what is trained; the reference uses the policy's states."""
        count = self.args.shaping.train_layers
        for entry in models if count else ():
            trained = isinstance(entry, tuple)
            model = pretrained(entry[0] if trained else entry)
            if trained:
                self.print(f"abc_plugin: {freeze(model, count)}")
            if trained or isinstance(entry, Actor):  # the reward model is read as it is
                self.trunks = (*self.trunks, Trunk(model, count))
                self.trunks[-1].share(self.trunks[:-1])
        return super().prepare(*models)

    def drop_states(self) -> None:
        """Drop the kept states: the rollout they belong to is trained."""
        for trunk in self.trunks:
            trunk.states.clear()


def freeze(model: PreTrainedModel, count: int) -> str:
    """Let only the last ``count`` layers and what follows them be trained; returns what that is, in words.

    A head that is tied to the embedding is frozen with it.
    """
    layers = layers_of(model)
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    children = list(model.base_model.children())
    for part in (*layers[-count:], *children[children.index(layers) + 1 :]):
        part.requires_grad_(True)
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight.requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"{type(model).__name__}: the last {count} of {len(layers)} layers are trained, {trained:,} of "
        f"{model.num_parameters():,} parameters"
    )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises UserError for a model that keeps them otherwise."""
    wanted = model.config.get_text_config().num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == wanted:
            return child
    raise UserError(
        f"--local.train_layers: {type(model).__name__} has no list of its {wanted} layers; leave it out, or use LoRA"
    )


class Trunk:
    """The frozen layers of a model, which run once for each sequence.

    ``states`` maps a row's token ids and positions to the hidden states (tokens, hidden size) that leave the last
    frozen layer. A batch whose rows are all known skips the layers; any other is computed and kept. Attention is
    causal and padding is masked, so a row's states depend on nothing else, but for rounding: a kernel may sum in
    another order for another shape of batch. Generation, which keeps keys and values, passes through untouched, and
    its states can be kept as well (``keep_generated``).
    """

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.frozen = list(layers_of(model)[:-count])
        self.embedding = model.get_input_embeddings()
        self.states: dict[bytes, Tensor] = {}
        self.rows: list[bytes] | None = None  # of the batch that is in the model; None: it generates, or has no mask
        self.mask: Tensor | None = None
        self.all_known = False  # whether all its rows' states are kept
        self.generated: list[Tensor] = []  # the states of each pass of the generation that runs
        self.in_tuples = False  # whether a layer returns its states in a tuple, as GPT-J's do
        model.base_model.trunk = self
        model.base_model.forward = self._identify_rows(model.base_model.forward)  # generation takes hooks off
        for layer in self.frozen:
            layer.forward = self._skip_known(layer.forward, last=layer is self.frozen[-1])

    def share(self, others: tuple[Trunk, ...]) -> None:
        """Use the states of the first of ``others`` whose weights are the same."""
        self.states = next((other.states for other in others if self._equals(other)), self.states)

    def _equals(self, other: Trunk) -> bool:
        mine, theirs = (
            [*trunk.embedding.parameters(), *nn.ModuleList(trunk.frozen).parameters()] for trunk in (self, other)
        )
        return len(mine) == len(theirs) and all(
            a.shape == b.shape and a.equal(b.to(a.device)) for a, b in zip(mine, theirs, strict=True)
        )

    def _identify_rows(self, forward: Any) -> Any:
        """The model's forward, which first learns which rows come: ids and positions under the mask."""

        @functools.wraps(forward)
        def run(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows, self.mask, self.all_known = None, kwargs.get("attention_mask"), False
            if self.mask is not None and kwargs.get("past_key_values") is None and not kwargs.get("use_cache"):
                self.mask = self.mask.bool()
                positions_BS = kwargs["position_ids"].expand_as(input_ids)
                both_BS2 = torch.stack([input_ids, positions_BS], -1).cpu()
                self.rows = [row[kept].numpy().tobytes() for row, kept in zip(both_BS2, self.mask.cpu(), strict=True)]
                self.all_known = all(row in self.states for row in self.rows)
            return forward(input_ids, *args, **kwargs)

        return run

    def _skip_known(self, forward: Any, last: bool) -> Any:
        def run(hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rows is None:
                out = forward(hidden_BSD, *args, **kwargs)
                self.in_tuples = isinstance(out, tuple)
                if last:
                    self.generated.append(_states(out))
                return out
            if self.all_known:
                out_BSD = self._kept_states(hidden_BSD) if last else hidden_BSD
                return (out_BSD, None) if self.in_tuples else out_BSD
            with torch.no_grad():
                out = forward(hidden_BSD, *args, **kwargs)
            self.in_tuples = isinstance(out, tuple)
            if last:
                for row, state_SD, kept in zip(self.rows, _states(out), self.mask, strict=True):
                    self.states.setdefault(row, state_SD[kept].clone())
            return out

        return run

    def keep_generated(self, sequences: list[list[int]], starts: list[int]) -> None:
        """Keep the states of what was generated since the last call.

        sequences: each row's tokens, prompt and response.  starts: how many padding tokens stood before each.
        The last token was drawn and never read, so its states are zeros: no token attends to it, and what would
        follow it is not asked for.
        """
        states_BSD = torch.cat(self.generated, 1)
        self.generated.clear()
        for ids, start, state_SD in zip(sequences, starts, states_BSD, strict=True):
            own_SD = state_SD[start : start + len(ids)]
            key = torch.stack([torch.tensor(ids), torch.arange(len(ids))], -1).numpy().tobytes()
            self.states[key] = nn.functional.pad(own_SD, (0, 0, 0, len(ids) - len(own_SD)))

    def _kept_states(self, hidden_BSD: Tensor) -> Tensor:
        """The kept states in this batch's layout; zero where it is padding."""
        out_BSD = torch.zeros_like(hidden_BSD)
        out_BSD[self.mask] = torch.cat([self.states[row] for row in self.rows]).to(out_BSD.dtype)
        return out_BSD


def _states(layer_output: Any) -> Tensor:
    return layer_output[0] if isinstance(layer_output, tuple) else layer_output


def keep_generated(model: PreTrainedModel, sequences: list[list[int]], starts: list[int]) -> None:
    """``Trunk.keep_generated`` of a model whose lower layers are frozen; nothing for another."""
    if trunk := getattr(model.base_model, "trunk", None):
        trunk.keep_generated(sequences, starts)
