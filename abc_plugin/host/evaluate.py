"""``abc-rlhf evaluate``: sample from a policy on held-out prompts, score the completions and attribute the scores.

Takes the flags of ``abc-rlhf local`` (model, data, sampling, shaping; what concerns training is ignored) and
``--out FILE`` for the samples, one JSON object a line: prompt, tokens, credit (the method's weights), reward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from abc_plugin.config import add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.host.adapt import import_host


def main(argv: list[str]) -> int:
    """Write the samples and print the mean reward with its standard error. Raises UserError on bad input."""
    parser = argparse.ArgumentParser(prog="abc-rlhf evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the samples")
    if {"-h", "--help"} & set(argv):
        add_flags(parser)
    own, rest = parser.parse_known_args(argv)
    shaping, host_argv = split_flags(rest)
    method = methods.load(shaping.method)
    import_host()
    from abc_plugin.host import checks
    from abc_plugin.host.arguments import parse_for_one_process

    args, _ = parse_for_one_process(host_argv, shaping)
    checks.check_supported(args)
    checks.check_models(args, shaping)
    samples = sample(args, checks.read_data(args), method)
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
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils import get_tokenizer, logging_utils
    from openrlhf.utils.utils import convert_to_torch_dtype

    from abc_plugin.host import normalisation
    from abc_plugin.host.checks import quiet_strategy
    from abc_plugin.host.generation import generate
    from abc_plugin.host.reward_model import own_tokens
    from abc_plugin.recovery import attach

    disable_progress_bar()
    logging_utils._default_handler.setLevel("WARNING")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, options = args.actor.model_name_or_path, {"attn_implementation": args.ds.attn_implementation}
    dtype = convert_to_torch_dtype(args.ds.param_dtype)
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True, **options)
    tokenizer = get_tokenizer(path, policy, "left", use_fast=not args.data.disable_fast_tokenizer)
    prompts = PromptDataset(data, tokenizer, quiet_strategy(args), input_template=args.data.input_template).prompts
    reward_model = get_llm_for_sequence_regression(
        args.reward.model_name_or_path,
        "reward",
        param_dtype=args.ds.param_dtype,
        value_head_prefix=args.ds.value_head_prefix,
        normalize_reward=args.reward.normalize_enable,
        **options,
    )
    if normalisation.normalises(args):
        normalisation.restore(reward_model)
    policy, reward_model = policy.to(device).eval(), reward_model.to(device).eval()
    shaping = args.shaping
    tap = attach(reward_model, shaping.layer, shaping.recovery) if method.needs_attention else None
    set_seed(args.train.seed)
    mapping = own_tokens(args, args.reward.model_name_or_path)
    lines = []
    size = args.rollout.micro_batch_size
    for start in tqdm(range(0, len(prompts), size), desc="evaluate", unit="batch"):
        chosen = prompts[start : start + size]
        responses = generate(
            policy,
            tokenizer,
            chosen,
            batch_size=size,
            max_len=args.data.max_len,
            max_new_tokens=args.rollout.max_new_tokens,
            temperature=args.rollout.temperature,
            top_p=args.rollout.top_p,
        )
        batch = _Batch(tokenizer, chosen, responses)
        if mapping is None:
            reward_B, row_BS = _score(reward_model, tap, batch.sequences_BS, batch.attention_mask_BS)
        else:
            mapped = mapping(batch.sequences_BS, batch.attention_mask_BS, batch.action_mask_BA, chosen)
            reward_B, row_BL = _score(reward_model, tap, mapped.input_ids_BL, mapped.attention_mask_BL)
            row_BS = None if row_BL is None else mapped.to_policy(row_BL)[0]
        lines += batch.lines(reward_B, method, row_BS)
    return lines


def _score(model: torch.nn.Module, tap: Any, ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores (B,) and, with a tap, the attention row (B, S), on the CPU."""
    ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device)
    with tap.record(mask_BS) if tap else contextlib.nullcontext() as recording:
        reward_B = model(ids_BS, mask_BS)
    return reward_B.float().cpu(), recording.row_BS.cpu() if tap else None


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

    def lines(self, reward_B: Tensor, method: methods.Method, row_BS: Tensor | None) -> list[dict]:
        """One line of the output per response: its tokens, their credit, its reward."""
        word = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        row_BA = None if row_BS is None else row_BS[:, 1:].float()
        weight_BA = method.weights(methods.Evidence(self.sequences_BS, self.action_mask_BA, row_BA))
        rows = zip(self.prompts, self.ids, self.starts, weight_BA, self.action_mask_BA, reward_B.tolist(), strict=True)
        return [
            {
                "prompt": prompt,
                "tokens": [word([token]) for token in ids[start:]],
                "credit": weight_A[mask_A].tolist(),
                "reward": reward,
            }
            for prompt, ids, start, weight_A, mask_A, reward in rows
        ]
