"""Rollouts by transformers' generate, where the host uses vLLM engines."""

from __future__ import annotations

from unittest import mock

import torch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator, _collect_prompt_batch
from transformers import GenerationConfig

from abc_plugin.errors import UserError


def generate(
    model: torch.nn.Module,
    tokenizer: object,
    prompts: list[str],
    *,
    batch_size: int,
    max_len: int,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
) -> list[dict]:
    """One sampled completion per prompt, in the form the host's vLLM engines return it.

    As there (host: utils/agent.py): prompts get no special tokens and lose tokens at the front when they leave no room
    for ``max_new_tokens``; at least one token is sampled; the end-of-sequence token belongs to the response.
    Returns dicts with observation_tokens (prompt and response ids), action_ranges [(start, end)) and truncated.
    """
    room = max_len - (max_new_tokens or 1)
    ids = [tokenizer(text=prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    ids = [tokens[max(0, len(tokens) - room) :] for tokens in ids]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise UserError(f"the prompt {prompt!r} has no tokens; remove it from --data.prompt_dataset")
    ends = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # equal lengths together: less padding
    results: list[dict] = [{} for _ in ids]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        # Nothing is taken from the model's own generation_config but its end tokens: the host's engines take no more.
        with mock.patch.object(model, "generation_config", GenerationConfig()):
            output = model.generate(
                **batch.to(model.device),
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=top_p,
                top_k=0,
                min_new_tokens=1,
                max_new_tokens=max_new_tokens or max_len - len(ids[chosen[0]]),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(ends),
                use_cache=True,
            )
        for i, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
            tokens = tokens[: max_len - len(ids[i])]
            end = next((at for at, token in enumerate(tokens) if token in ends), None)
            response = tokens if end is None else tokens[: end + 1]
            results[i] = {
                "observation_tokens": ids[i] + response,
                "action_ranges": [(len(ids[i]), len(ids[i]) + len(response))],
                "truncated": end is None,
            }
    return results


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


class TransformersSamplesGenerator(SamplesGenerator):
    """The host's samples generator; only the engine call is another."""

    def __init__(self, host_generator: SamplesGenerator, policy_worker: object) -> None:
        vars(self).update(vars(host_generator))
        self.policy_worker = policy_worker

    def _generate_vllm(
        self, dataloader_iter: object, num_prompts: int, dynamic_filtering: bool, **generate_kwargs: object
    ) -> tuple[list, int, bool]:
        prompts, labels, images, exhausted = _collect_prompt_batch(dataloader_iter, num_prompts)
        if not prompts:
            return [], 0, True
        copies = generate_kwargs.get("n_samples_per_prompt", self.args.rollout.n_samples_per_prompt)
        repeat = [i for i in range(len(prompts)) for _ in range(copies)]
        model = self.policy_worker.actor.model.module
        model.eval()
        responses = generate(
            model,
            self.tokenizer,
            [prompts[i] for i in repeat],
            batch_size=max(self.args.rollout.micro_batch_size, 1),
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
