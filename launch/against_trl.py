"""One side of launch/against_trl.sh: a few PPO steps, and the seconds of each as JSON.

    python launch/against_trl.py abc|trl|trl_bf16 POLICY REWARD_MODEL PROMPTS OUT.json --steps 4 --batch 32

The same models on both sides, prompts, batch, completion length, epochs and batches within: policy, reference, reward
model, and a critic that starts from it. Wall and CPU seconds are read at the end of a step.

OpenRLHF computes in bf16 and updates fp32 weights. TRL's PPOConfig does the same by autocast (trl, its default); with
models loaded in bf16 (trl_bf16) it keeps no others, and loses every update that is smaller than a weight's rounding.
"""

import argparse
import json
import time
from pathlib import Path

SIDES = ("abc", "trl", "trl_bf16")


def abc(args: argparse.Namespace, clock: list) -> None:
    """`abc-rlhf local`, with credit."""
    from abc_plugin.host.import_openrlhf import import_host
    from abc_plugin.local import command

    import_host()
    from abc_plugin.local.trainer import LocalPPOTrainer

    stock, lengths = LocalPPOTrainer.train_step, []

    def timed(self: LocalPPOTrainer, *rollouts: object) -> object:
        result = stock(self, *rollouts)
        clock.append((time.perf_counter(), time.process_time()))
        lengths.append(result[0]["rollout/response_length_mean"])
        return result

    LocalPPOTrainer.train_step = timed
    flags = {
        "actor.model_name_or_path": args.policy,
        "reward.model_name_or_path": args.reward_model,
        "data.prompt_dataset": args.prompts,
        "data.max_samples": args.steps * args.batch,
        "data.max_len": 32 + args.new_tokens,
        "rollout.max_new_tokens": args.new_tokens,
        "rollout.batch_size": args.batch,
        "rollout.micro_batch_size": args.batch,
        "train.batch_size": args.batch // 2,
        "train.micro_batch_size": args.batch // 2,
        "algo.advantage.lambd": 0.95,
        "actor.adam.lr": 1e-5,
        "critic.adam.lr": 1e-5,
        "ckpt.output_dir": args.out + ".run",
        "reward_shaping": "abc",
    }
    status = command.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    if status:
        raise SystemExit(status)
    print(f"tokens per completion: {sum(lengths) / len(lengths):.1f} of {args.new_tokens}, which TRL always makes")


def trl(args: argparse.Namespace, clock: list) -> None:
    """TRL's PPOTrainer, as its name says: by autocast, or with weights in bf16."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.append((time.perf_counter(), time.process_time()))

    tokenizer = AutoTokenizer.from_pretrained(args.policy, padding_side="left")
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()[: args.steps * args.batch]
    prompts = [tokenizer(json.loads(line)["input"], add_special_tokens=False)["input_ids"] for line in lines]
    autocast = args.side == "trl"
    dtype = torch.float32 if autocast else torch.bfloat16
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.policy, dtype=dtype) for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(args.reward_model, dtype=dtype, num_labels=1)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=args.out + ".run",
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        per_device_train_batch_size=args.batch,  # what a mini-batch may hold at once: two updates per step
        gradient_accumulation_steps=1,
        num_mini_batches=2,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=args.batch,
        total_episodes=args.steps * args.batch,
        response_length=args.new_tokens,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
    )
    trainer = PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward_model,
        Dataset.from_dict({"input_ids": prompts}),
        critic,
        callbacks=[Clock()],
    )
    trainer.train()


def main() -> None:
    """Run one side and write {wall: [...], cpu: [...]}, seconds from one step's end to the next one's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    for name in ("policy", "reward_model", "prompts", "out"):
        parser.add_argument(name)
    for name, default in (("--steps", 4), ("--batch", 32), ("--new_tokens", 16)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    clock: list[tuple[float, float]] = []
    (abc if args.side == "abc" else trl)(args, clock)
    wall, cpu = ([b - a for a, b in zip(ends, ends[1:], strict=False)] for ends in zip(*clock, strict=True))
    Path(args.out).write_text(json.dumps({"wall": wall, "cpu": cpu, "batch": args.batch}) + "\n")


if __name__ == "__main__":
    main()
