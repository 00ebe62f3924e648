"""``abc-rlhf evaluate``: sample from a policy on held-out prompts, score the completions and attribute the scores.

Takes the flags of ``abc-rlhf local`` (model, data, sampling, shaping; what concerns training is ignored) and
``--out FILE`` for the samples, one JSON object a line: prompt, tokens, credit (the method's weights), reward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from abc_plugin.config import ShapingConfig, add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.host.imports import import_host
from abc_plugin.local import ranks
from abc_plugin.text.spans import token_texts


def main(argv: list[str]) -> int:
    """Write the samples and print the mean reward with its standard error. Raises UserError on bad input."""
    parser = argparse.ArgumentParser(prog="abc-rlhf evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the samples")
    if {"-h", "--help"} & set(argv):
        add_flags(parser)
    own, rest = parser.parse_known_args(argv)
    shaping, host_argv = split_flags(rest)
    shaping = dataclasses.replace(shaping, beta=1.0)  # the method's own credit is shown, and checked for
    method = methods.load(shaping.method)
    import_host()
    from abc_plugin.host import checks
    from abc_plugin.host.model_files import read_data
    from abc_plugin.local import one_process

    args, _ = one_process.parse_for_one_process(host_argv, shaping)
    one_process.check_supported(args)
    ranks.refuse("evaluate")
    checks.check_models(args, shaping)
    one_process.check_positions(args)
    samples = sample(args, read_data(args), method)
    own.out.parent.mkdir(parents=True, exist_ok=True)
    own.out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples), encoding="utf-8")
    rewards = [line["reward"] for line in samples]
    error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else float("nan")
    print(
        f"mean reward {statistics.fmean(rewards):.4f} +- {error:.4f} (standard error) over {len(rewards)} completions "
        f"of {args.actor.model_name_or_path}; samples in {own.out}"
    )
    return 0


@torch.no_grad()
def sample(args: Namespace, data: Dataset, method: methods.Method) -> list[dict]:
    """One completion per prompt with its reward and credit, in the order of ``data``."""
    from openrlhf.datasets import PromptDataset
    from openrlhf.models import Actor
    from openrlhf.utils import get_tokenizer, logging_utils
    from openrlhf.utils.utils import convert_to_torch_dtype

    from abc_plugin.attention import attach
    from abc_plugin.attention.scalar_head import load_reward_model
    from abc_plugin.host.model_files import quiet_strategy, reward_models
    from abc_plugin.host.worker import Member, keep_gradients_exact
    from abc_plugin.local.quantised import NF4
    from abc_plugin.local.rollout import generate

    disable_progress_bar()
    logging_utils._default_handler.setLevel("WARNING")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, ds, shaping = args.actor.model_name_or_path, args.ds, args.shaping
    policy = Actor(
        path, attn_implementation=ds.attn_implementation, param_dtype=ds.param_dtype, load_in_4bit=ds.load_in_4bit
    ).model
    tokenizer = get_tokenizer(path, policy, "left", use_fast=not args.data.disable_fast_tokenizer)
    prompts = PromptDataset(data, tokenizer, quiet_strategy(args), input_template=args.data.input_template).prompts
    policy = policy.to(device).eval()
    keep_gradients_exact(policy)
    members = []
    for reward_path in reward_models(args):
        model = load_reward_model(
            reward_path,
            head=ds.value_head_prefix,
            dtype=convert_to_torch_dtype(ds.param_dtype),
            normalise=args.reward.normalize_enable,
            attention=ds.attn_implementation,
            quantization_config=NF4 if ds.load_in_4bit else None,
        )
        members.append(Member.of_model(model.to(device).eval(), args, reward_path))
    need = policy_need(shaping)
    of_policy = attach(policy, layer=shaping.layer, recovery=shaping.recovery) if need else None
    lines = []
    size = args.rollout.micro_batch_size
    for start in tqdm(range(0, len(prompts), size), desc="evaluate", unit="batch"):
        chosen = prompts[start : start + size]
        responses = generate(
            policy,
            tokenizer,
            chosen,
            seed=(args.train.seed, start),
            batch_size=size,
            max_len=args.data.max_len,
            max_new_tokens=args.rollout.max_new_tokens,
            temperature=args.rollout.temperature,
            top_p=args.rollout.top_p,
        )
        batch = _Batch(tokenizer, chosen, responses)
        scored = [batch.scored(member) for member in members]
        if need:
            of_generation = {need: _policy_row(policy, of_policy, need, batch)}
            scored = [(reward_B, evidence | of_generation) for reward_B, evidence in scored]
        lines += batch.lines(shaping, method, scored)
    return lines


def _policy_row(policy: torch.nn.Module, reader: Any, need: str, batch: _Batch) -> Tensor:
    """The attention that the policy paid while generating, (B, S), from a forward over what it generated."""
    from abc_plugin.attention.positions import generating_rows

    mask_BS = batch.attention_mask_BS.to(policy.device)
    with reader.record(mask_BS, queries_BS=generating_rows(need, batch.action_mask_BA)) as recording:
        policy(batch.sequences_BS.to(policy.device), attention_mask=mask_BS, use_cache=False)
    return recording.row_BS.cpu()


class _Batch:
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

    def scored(self, member: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (B,) of one reward model and what the method needs of it (B, S), on the CPU."""
        model = member.model
        scored = member.score(
            lambda ids, mask: model(ids.to(model.device), mask.to(model.device)).float().cpu(),
            self.sequences_BS,
            self.attention_mask_BS,
            self.action_mask_BA,
            self.prompts,
        )
        return scored.output, scored.evidence[0]

    def lines(
        self, shaping: ShapingConfig, method: methods.Method, scored: list[tuple[Tensor, dict[str, Tensor]]]
    ) -> list[dict]:
        """One line of the output per response: its tokens, their credit, its reward.

        scored: by reward model. credit: the method's weights, or credit / sum |credit| where it is signed.
        """
        from abc_plugin.host.maker import shape_batch

        members = [
            methods.Evidence(
                self.sequences_BS,
                self.action_mask_BA,
                **{f"{name}_BA": row_BS[:, 1:].float() for name, row_BS in evidence.items()},
            )
            for _, evidence in scored
        ]
        mean_B = torch.stack([reward_B for reward_B, _ in scored]).mean(0)
        shaped = shape_batch(shaping, method, members, mean_B, self.tokenizer, beta=1.0)
        credit_BA = shaped.share_BA * shaped.credit_BA.sign() if method.weights is None else shaped.share_BA
        rows = zip(self.prompts, self.ids, self.starts, credit_BA, self.action_mask_BA, mean_B.tolist(), strict=True)
        return [
            {
                "prompt": prompt,
                "tokens": token_texts(self.tokenizer, ids)[start:],
                "credit": credit_A[mask_A].tolist(),
                "reward": reward,
            }
            for prompt, ids, start, credit_A, mask_A, reward in rows
        ]
