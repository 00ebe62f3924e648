"""Rollouts by transformers' generate, where the host uses vLLM engines."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator, _collect_prompt_batch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from abc_plugin.attention.layers import pretrained
from abc_plugin.errors import NotFinite, UserError
from abc_plugin.local import distributed_ranks, frozen_layers
from abc_plugin.local.distributed_ranks import gather_zero3
from abc_plugin.local.ray_in_process import memory_remedy
from abc_plugin.text.tokenizer_differences import end_ids


class Draw(LogitsProcessor):
    """Draws each row's next token by the row's own random numbers; leaves it as the only possible one.

    token[b] = first v with sum_{u <= v} p[b,u] > uniform[b,t]      (inversion of the distribution, in float64)

    A completion thus depends neither on the rows beside it nor on what was drawn before, and on a CPU it costs an
    eighth of torch.multinomial.  uniform_BT: float64 in [0, 1), a column per token.  greedy: the likeliest instead.
    ``usable``: whether all logits so far were numbers; read once, since each look waits for the device.
    """

    def __init__(self, uniform_BT: Tensor, *, greedy: bool = False) -> None:
        self.uniforms, self.greedy = iter(uniform_BT.unbind(1)), greedy
        self.usable = torch.tensor(True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated_BV = torch.softmax(scores, -1).cumsum(-1, dtype=torch.float64)
        self.usable = self.usable.to(scores.device) & cumulated_BV[:, -1].isfinite().all()
        drawn_B1 = next(self.uniforms).to(scores.device)[:, None] * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, drawn_B1, right=True).clamp_max(scores.shape[1] - 1)
        token_B1 = scores.argmax(-1, keepdim=True) if self.greedy else token_B1
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: list[str],
    *,
    seed: tuple[int, ...],
    batch_size: int,
    max_len: int,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
) -> list[dict]:
    """One sampled completion per prompt, in the form the host's vLLM engines return it.

    As there (host: utils/agent.py): prompts get no special tokens and lose tokens at the front when they leave no room
    for ``max_new_tokens``; at least one token is sampled; the end-of-sequence token belongs to the response.
    Ids that are no token are never drawn. Prompts of like length are generated together, at most ``batch_size`` at a
    time, and shared out among the ranks.
    What is drawn follows from ``seed`` and the prompt's index in ``prompts`` alone; no global random number is used.
    Returns dicts with observation_tokens (prompt and response ids), action_ranges [(start, end)) and truncated.
    Raises UserError for a prompt without tokens, NotFinite where the policy's logits are NaN.
    """
    room = max_len - (max_new_tokens or 1)
    ids = [tokenizer(text=prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    ids = [tokens[max(0, len(tokens) - room) :] for tokens in ids]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError(f"the prompt {prompt!r} has no tokens; remove it from --data.prompt_dataset")
    ends = end_ids(tokenizer.eos_token_id, model.generation_config.eos_token_id)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    uniform_NT = torch.rand(len(ids), max_new_tokens or max_len, generator=generator, dtype=torch.float64)
    unknown = unknown_ids(tokenizer, model.config.get_text_config().vocab_size)
    warpers = [SuppressTokensLogitsProcessor(unknown, device=model.device)] if unknown else []
    warpers += [TemperatureLogitsWarper(temperature)] if temperature not in (0, 1) else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    rank, mine = distributed_ranks.current_rank(), {}
    for batch in _batches(ids, batch_size, rank.count, max_new_tokens is None)[rank.index :: rank.count]:
        prompt_ids, draw = [ids[i] for i in batch], Draw(uniform_NT[batch], greedy=temperature == 0)
        limit = max_new_tokens or max_len - len(prompt_ids[0])
        responses = _generate_batch(model, tokenizer, prompt_ids, [*warpers, draw], ends, limit, max_len)
        if not draw.usable:
            raise NotFinite("the policy's logits are NaN: it has diverged; lower --actor.adam.lr")
        mine |= zip(batch, responses, strict=True)
    responses = {i: response for share in distributed_ranks.gather(mine) for i, response in share.items()}
    return [responses[i] for i in range(len(ids))]


@functools.cache
def unknown_ids(tokenizer: Any, rows: int) -> list[int]:
    """Ids below the number of embedding rows that are no token: other models may have no row for them."""
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def _generate_batch(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    processors: list[LogitsProcessor],
    ends: tuple[int, ...],
    max_new_tokens: int,
    max_len: int,
) -> list[dict]:
    """``generate`` for prompts that are generated together: token ids in, responses out."""
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    width = padded["input_ids"].shape[1]
    # Of the model's own generation_config, which generate would mix in, only the end tokens count: the host's engines
    # take no more.
    with mock.patch.object(model, "generation_config", GenerationConfig()):
        output = model.generate(
            **padded.to(model.device),
            do_sample=False,  # Draw samples
            min_new_tokens=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(ends),
            use_cache=True,
            synced_gpus=False,  # no rank needs another to generate, under ZeRO-3 neither (``ready_to_generate``)
            logits_processor=processors,
        )
    rows = zip(prompts, output[:, width:].tolist(), strict=True)
    responses = [_response(prompt, tokens[: max_len - len(prompt)], ends) for prompt, tokens in rows]
    sequences = [response["observation_tokens"] for response in responses]
    frozen_layers.keep_generated(model, sequences, [width - len(prompt) for prompt in prompts])
    return responses


def _batches(ids: list[list[int]], batch_size: int, ranks: int, by_length: bool = False) -> list[list[int]]:
    """Indices of prompts by length, cut into as few equal parts of at most ``batch_size`` as all ``ranks`` can share.

    by_length: no two lengths in a part. Where only the whole sequence's length is limited, a short prompt's response
    is longer than a long one's may be, and the long one would run past the model's positions.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: less padding
    if by_length:
        groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: len(ids[i]))]
        return [group[at : at + batch_size] for group in groups for at in range(0, len(group), batch_size)]
    parts = min(len(ids), ranks * -(-len(ids) // (ranks * batch_size)))
    return [part.tolist() for part in np.array_split(order, parts)]


def _response(prompt: list[int], tokens: list[int], ends: tuple[int, ...]) -> dict:
    end = next((at for at, token in enumerate(tokens) if token in ends), None)
    response = tokens if end is None else tokens[: end + 1]
    return {
        "observation_tokens": prompt + response,
        "action_ranges": [(len(prompt), len(prompt) + len(response))],
        "truncated": end is None,
    }


def rows_at_once(model: torch.nn.Module, micro_batch_size: int) -> int:
    """How many rows may generate together in the memory that the host's forward of ``micro_batch_size`` rows takes.

    That forward keeps the logits of every position, in the model's dtype and in fp32 (host: models/actor.py); to
    generate keeps keys and values, and for the last position a few copies of the logits. Eight times as many at most:
    a prompt's activations are not counted. It matters, because few rows at a time take nearly as long as many.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return micro_batch_size
    return micro_batch_size * min(8, max(1, config.vocab_size * (model.dtype.itemsize + 4) // kept))


@contextlib.contextmanager
def ready_to_generate(engine: Any) -> Iterator[torch.nn.Module]:
    """The transformers model that a DeepSpeed engine trains, as if DeepSpeed were not there, ready to generate.

    Adapters stay on. Under ZeRO-3 its weights are gathered once, for the length of the block, and the hooks are off
    which would part them again after each layer: ranks whose responses end at different lengths do not wait for each
    other. It leaves the model in eval mode, in which no checkpointing of activations forbids the cache.
    """
    model = engine.module
    model.eval()
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in model.modules()]
    with contextlib.ExitStack() as stack:
        with memory_remedy("gather"):
            stack.enter_context(gather_zero3(model.parameters()))
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = type(before)(), type(after)()
        # PyTorch copies a frozen head's weight once per row for an input that is a slice, as the prompts' last states.
        if head := pretrained(model).get_output_embeddings():
            head.register_forward_pre_hook(lambda _, inputs: tuple(value.contiguous() for value in inputs))
        try:
            yield pretrained(model)
        finally:
            for part, before, after in hooks:
                part._forward_pre_hooks, part._forward_hooks = before, after


class TransformersSamplesGenerator(SamplesGenerator):
    """The host's samples generator; only the engine call is another.

    ``steps_done`` tells the number of the rollout, which with the seed decides what is drawn.
    """

    def __init__(self, host_generator: SamplesGenerator, policy_worker: Any, steps_done: Callable[[], int]) -> None:
        vars(self).update(vars(host_generator))
        self.policy_worker = policy_worker
        self.steps_done = steps_done

    def _generate_vllm(
        self, dataloader_iter: object, num_prompts: int, dynamic_filtering: bool, **generate_kwargs: Any
    ) -> tuple[list, int, bool]:
        prompts, labels, images, exhausted = _collect_prompt_batch(dataloader_iter, num_prompts)
        if not prompts:
            return [], 0, True
        copies = generate_kwargs.get("n_samples_per_prompt", self.args.rollout.n_samples_per_prompt)
        repeat = [i for i in range(len(prompts)) for _ in range(copies)]
        with memory_remedy("generate"), ready_to_generate(self.policy_worker.actor.model) as model:
            responses = generate(
                model,
                self.tokenizer,
                [prompts[i] for i in repeat],
                seed=(self.args.train.seed, self.steps_done()),
                batch_size=rows_at_once(model, max(self.args.rollout.micro_batch_size, 1)),
                **{name: generate_kwargs[name] for name in ("max_len", "max_new_tokens", "temperature", "top_p")},
            )
        echo = {"rollout_log_probs": None, "extra_logs": {}}
        experiences = [
            self._process_response_into_experience(
                response | echo | {"prompt": prompts[i], "label": labels[i], "images": images[i]}, **generate_kwargs
            )
            for i, response in zip(repeat, responses, strict=True)
        ]
        return experiences, len(prompts), exhausted
