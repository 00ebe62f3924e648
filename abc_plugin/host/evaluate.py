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
from pathlib import Path

import torch
from datasets import Dataset
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

    from abc_plugin.host.checks import quiet_strategy
    from abc_plugin.host.generation import generate
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
        **options,
    )
    policy, reward_model = policy.to(device).eval(), reward_model.to(device).eval()
    shaping = args.shaping
    tap = attach(reward_model, shaping.layer, shaping.recovery) if method.needs_attention else None
    set_seed(args.train.seed)
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
        lines += _score(reward_model, tap, tokenizer, method, chosen, responses)
    return lines


def _score(
    reward_model: torch.nn.Module,
    tap: object,
    tokenizer: object,
    method: methods.Method,
    prompts: list[str],
    responses: list[dict],
) -> list[dict]:
    """Reward and credit of one batch of responses."""
    ids = [response["observation_tokens"] for response in responses]
    starts = [response["action_ranges"][0][0] for response in responses]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(reward_model.device)
    sequences_BS, attention_mask_BS = batch["input_ids"], batch["attention_mask"]
    with tap.record(attention_mask_BS) if tap else contextlib.nullcontext() as recording:
        reward_B = reward_model(sequences_BS, attention_mask_BS)
    position_S = torch.arange(sequences_BS.shape[1], device=sequences_BS.device)
    action_BS = (position_S >= torch.tensor(starts, device=position_S.device)[:, None]) & attention_mask_BS.bool()
    row_BA = recording.row_BS[:, 1:] if tap else None
    weight_BA = method.weights(methods.Evidence(sequences_BS, action_BS[:, 1:], row_BA))
    return [
        {
            "prompt": prompt,
            "tokens": [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens[start:]],
            "credit": weight_A[mask_A].tolist(),
            "reward": reward,
        }
        for prompt, tokens, start, weight_A, mask_A, reward in zip(
            prompts, ids, starts, weight_BA, action_BS[:, 1:], reward_B.float().tolist(), strict=True
        )
    ]
