"""Sampling from a policy on held-out prompts: completions, their scores, and the credit of their tokens."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from datasets import Dataset
from openrlhf.datasets import PromptDataset
from openrlhf.models import Actor
from openrlhf.utils import get_tokenizer, logging_utils
from openrlhf.utils.utils import convert_to_torch_dtype
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from abc_plugin.attention import attach
from abc_plugin.attention.query_positions import generating_rows
from abc_plugin.attention.scalar_head import load_reward_model
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.host.arguments import reward_models
from abc_plugin.host.experience_maker import shape_batch
from abc_plugin.host.model_workers import EvidenceBatch, Member, keep_gradients_exact, mean_batch
from abc_plugin.host.prompt_dataset import quiet_strategy
from abc_plugin.local.lora import NF4
from abc_plugin.local.rollout import generate
from abc_plugin.text.character_spans import token_texts


@torch.no_grad()
def evaluate(args: Namespace, data: Dataset) -> list[dict]:
    """One completion per prompt, in the order of ``data``: prompt, tokens, credit and reward."""
    disable_progress_bar()
    logging_utils._default_handler.setLevel("WARNING")
    path, ds, size = args.actor.model_name_or_path, args.ds, args.rollout.micro_batch_size
    policy = Actor(
        path, attn_implementation=ds.attn_implementation, param_dtype=ds.param_dtype, load_in_4bit=ds.load_in_4bit
    ).model
    tokenizer = get_tokenizer(path, policy, "left", use_fast=not args.data.disable_fast_tokenizer)
    prompts = PromptDataset(data, tokenizer, quiet_strategy(args), input_template=args.data.input_template).prompts
    policy = _ready(policy)
    members = [_reward_model(args, reward_path) for reward_path in reward_models(args)]
    need, reader = policy_need(args.shaping), None
    if need:
        reader = attach(policy, layer=args.shaping.layer, recovery=args.shaping.recovery)
    lines = []
    for start in tqdm(range(0, len(prompts), size), desc="evaluate", unit="batch"):
        batch = prompts[start : start + size]
        responses = generate(
            policy,
            tokenizer,
            batch,
            seed=(args.train.seed, start),
            batch_size=size,
            max_len=args.data.max_len,
            max_new_tokens=args.rollout.max_new_tokens,
            temperature=args.rollout.temperature,
            top_p=args.rollout.top_p,
        )
        completions = _Completions(tokenizer, batch, responses)
        scored = mean_batch([completions.score(member) for member in members])
        if need:
            row_BS = completions.generating_row(policy, reader, need)
            scored = scored._replace(evidence=[evidence | {need: row_BS} for evidence in scored.evidence])
        lines += completions.lines(args, scored)
    return lines


def _reward_model(args: Namespace, path: str) -> Member:
    model = load_reward_model(
        path,
        head=args.ds.value_head_prefix,
        dtype=convert_to_torch_dtype(args.ds.param_dtype),
        normalise=args.reward.normalize_enable,
        attention=args.ds.attn_implementation,
        quantization_config=NF4 if args.ds.load_in_4bit else None,
    )
    return Member.of_model(_ready(model), args, path)


def _ready(model: nn.Module) -> nn.Module:
    keep_gradients_exact(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


class _Completions:
    """Some prompts and their responses, padded on the right."""

    def __init__(self, tokenizer: Any, prompts: list[str], responses: list[dict]) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.ids = [response["observation_tokens"] for response in responses]
        self.starts = [response["action_ranges"][0][0] for response in responses]
        padded = tokenizer.pad({"input_ids": self.ids}, padding_side="right", return_tensors="pt")
        self.sequences_BS, self.attention_mask_BS = padded["input_ids"], padded["attention_mask"]
        position_S = torch.arange(self.sequences_BS.shape[1])
        action_BS = (position_S >= torch.tensor(self.starts)[:, None]) & self.attention_mask_BS.bool()
        self.action_mask_BA = action_BS[:, 1:]

    def score(self, member: Member) -> EvidenceBatch:
        """Scores (B,) of one reward model and what the method needs of it (B, S), on the CPU."""
        model = member.model
        return member.score(
            lambda ids, mask: model(ids.to(model.device), mask.to(model.device)).float().cpu(),
            self.sequences_BS,
            self.attention_mask_BS,
            self.action_mask_BA,
            self.prompts,
        )

    def generating_row(self, policy: nn.Module, reader: Any, need: str) -> Tensor:
        """The attention that the policy paid while generating, (B, S), from a forward over what it generated."""
        mask_BS = self.attention_mask_BS.to(policy.device)
        with reader.record(mask_BS, queries_BS=generating_rows(need, self.action_mask_BA)) as recording:
            policy(self.sequences_BS.to(policy.device), attention_mask=mask_BS, use_cache=False)
        return recording.row_BS.cpu()

    def lines(self, args: Namespace, scored: EvidenceBatch) -> list[dict]:
        """One line of the output per response: its tokens, their credit, its reward.

        credit: the method's weights, or credit / sum |credit| where it is signed.
        """
        method = methods.load(args.shaping.method)
        members = [
            methods.Evidence(
                self.sequences_BS,
                self.action_mask_BA,
                **{f"{name}_BA": row_BS[:, 1:].float() for name, row_BS in evidence.items()},
            )
            for evidence in scored.evidence
        ]
        shaped = shape_batch(args.shaping, method, members, scored.output, self.tokenizer, beta=1.0)
        credit_BA = shaped.share_BA * shaped.credit_BA.sign() if method.weights is None else shaped.share_BA
        columns = (self.prompts, self.ids, self.starts, credit_BA, self.action_mask_BA, scored.output.tolist())
        return [
            {
                "prompt": prompt,
                "tokens": token_texts(self.tokenizer, ids)[start:],
                "credit": credit_A[mask_A].tolist(),
                "reward": reward,
            }
            for prompt, ids, start, credit_A, mask_A, reward in zip(*columns, strict=True)
        ]
