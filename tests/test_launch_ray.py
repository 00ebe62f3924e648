"""The scripts for clusters: OpenRLHF's own parser accepts every flag in them, and they say what they are for."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from abc_plugin.config import split_flags
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.host.arguments import parse  # noqa: E402

LAUNCH = Path(__file__).parents[1] / "launch" / "ray"
URL = "http://a/get_reward"
ENVIRONMENT = {"POLICY": "my/policy", "REWARD_MODEL": "my/reward", "PROMPTS": "prompts.jsonl", "URL": URL}


def words(script: str, *arguments: str, **environment: str) -> list[str]:
    """The words that the script gives to abc-rlhf."""
    variables = os.environ | ENVIRONMENT | {"ABC_RLHF": r"printf %s\n"} | environment
    done = subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=variables, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("gae.sh", [], {"estimator": "gae", "lambd": 0.95, "critic": "my/reward", "remote": None}),
        ("reinforce.sh", [], {"estimator": "reinforce_baseline", "lambd": 1, "critic": None, "remote": None}),
        ("remote_reward.sh", ["train"], {"estimator": "rloo", "lambd": 1, "critic": None, "remote": [URL]}),
    ],
)
def test_the_hosts_parser_takes_every_flag(script, arguments, expected):
    command, *flags = words(script, *arguments, "--train.seed", "7")
    shaping, rest = split_flags(flags)
    args = parse(rest, command)
    assert command == "ray" and shaping.method == "abc" and shaping.beta == 0.8
    assert args.actor.model_name_or_path == "my/policy" and args.train.seed == 7
    advantage = args.algo.advantage
    assert expected == {
        "estimator": advantage.estimator,
        "lambd": advantage.lambd,
        "critic": args.critic.model_name_or_path,
        "remote": args.reward.remote_url,
    }
    samples = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    assert samples >= args.train.batch_size and samples % args.train.batch_size == 0


def test_the_server_gets_its_flags():
    assert words("remote_reward.sh", "serve", "--port", "6000")[:3] == [
        "serve-rm",
        "--reward.model_name_or_path",
        "my/reward",
    ]


def test_a_job_carries_the_script_and_its_settings():
    said = words(
        "job.sh", str(LAUNCH / "gae.sh"), "--train.seed", "7", RAY=r"printf %s\n", RAY_ADDRESS="http://head:8265"
    )
    assert said[:4] == ["job", "submit", "--address", "http://head:8265"]
    environment = json.loads(said[said.index("--runtime-env-json") + 1])
    assert environment["working_dir"] == str(LAUNCH)
    assert environment["env_vars"]["POLICY"] == "my/policy"
    assert said[-5:] == ["--", "bash", "gae.sh", "--train.seed", "7"]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_every_script_begins_with_what_it_does_and_how_to_call_it(script):
    head = (LAUNCH / script).read_text().split("set -euo pipefail")[0]
    assert f"launch/ray/{script}" in head
    assert len(head.splitlines()) >= 4
