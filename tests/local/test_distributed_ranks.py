"""Several ranks: shares, results and errors; and that two ranks train what one rank trains."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import as_words, local_flags, run_python, run_settings
from local_runs import scalars
from transformers import AutoModelForCausalLM

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.local import distributed_ranks

import_host()

import rank_checks  # noqa: E402

from abc_plugin.local import flag_checks  # noqa: E402
from abc_plugin.local.ray_in_process import InProcessGroup  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"
LAUNCHED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


def launched(monkeypatch, **variables):
    for name in distributed_ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_rank_is_the_launchers_or_that_of_one_process(monkeypatch):
    launched(monkeypatch)
    assert distributed_ranks.current_rank() == (0, 0, 1)
    launched(monkeypatch, WORLD_SIZE="1", RANK="7")  # left over from something else
    assert distributed_ranks.current_rank() == (0, 0, 1)
    launched(monkeypatch, **LAUNCHED)
    assert distributed_ranks.current_rank() == (5, 1, 8)
    launched(monkeypatch, WORLD_SIZE="2", RANK="1")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: .*torchrun"):
        distributed_ranks.current_rank()


def test_one_process_gets_variables_of_its_own_and_leaves_none_behind(monkeypatch):
    launched(monkeypatch)
    with distributed_ranks.process_group():
        assert distributed_ranks.current_rank() == (0, 0, 1)
        assert set(distributed_ranks.VARIABLES) <= set(os.environ)
    assert not set(distributed_ranks.VARIABLES) & set(os.environ)


def test_each_rank_takes_its_own_gpu_and_more_ranks_than_gpus_are_refused(monkeypatch):
    launched(monkeypatch, **LAUNCHED, LOCAL_WORLD_SIZE="4")
    taken, count = [], 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    distributed_ranks.take_device()
    assert taken == [1]
    count = 2
    with pytest.raises(UserError, match="4 ranks on this machine, but 2 GPUs: start 2"):
        distributed_ranks.take_device()


def test_a_port_in_use_is_refused_by_the_rank_that_would_listen(monkeypatch):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        launched(monkeypatch, **LAUNCHED | {"MASTER_PORT": str(port)})
        distributed_ranks.take_device()
        launched(monkeypatch, **LAUNCHED | {"MASTER_PORT": str(port), "RANK": "0"})
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use"):
            distributed_ranks.take_device()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun itself is listening
        distributed_ranks.take_device()


def settings(rollout=8, micro=4, copies=1, train=8, train_micro=2):
    return Namespace(
        rollout=Namespace(batch_size=rollout, micro_batch_size=micro, n_samples_per_prompt=copies),
        train=Namespace(batch_size=train, micro_batch_size=train_micro),
    )


UNEVEN = "which {} ranks cannot share out in batches of --rollout.micro_batch_size 4: "


@pytest.mark.parametrize(
    ("size", "prompts", "changes", "message"),
    [
        (1, 11, {"micro": 3}, None),  # one rank takes what comes
        (2, 24, {}, None),
        (2, 20, {"micro": 2}, None),  # the last rollout has 4
        (4, 8, {"copies": 2}, None),
        (1, 8, {"train_micro": 3}, "size 8 is no multiple of --train.micro_batch_size 3: make it one of 3"),
        (3, 24, {"train_micro": 4}, "--train.micro_batch_size 4 on 3 ranks: make it one of 12"),
        (4, 8, {}, UNEVEN.format(4) + "--rollout.micro_batch_size 2"),
        (2, 6, {}, "a rollout has 6 completions (6 prompts, --rollout.n_samples_per_prompt 1), which 2 ranks"),
        (
            2,
            19,
            {},
            "the last rollout of an episode has 3 completions (3 prompts, --rollout.n_samples_per_prompt 1), "
            + UNEVEN.format(2)
            + "--data.max_samples 16 leaves that rollout out",
        ),
        (8, 4, {"rollout": 4, "train": 16}, UNEVEN.format(8) + "start 4, or change the batch"),
    ],
)
def test_ranks_share_every_batch_evenly_or_are_refused(monkeypatch, size, prompts, changes, message):
    launched(monkeypatch, **LAUNCHED | {"WORLD_SIZE": str(size), "RANK": "0"})
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=re.escape(message)):
        flag_checks.check_batches(settings(**changes), prompts)


def test_evaluation_by_several_processes_is_refused(tiny, tmp_path, capsys, monkeypatch):
    launched(monkeypatch, **LAUNCHED)
    words = as_words(run_settings(tiny, tmp_path) | {"out": tmp_path / "samples.jsonl"})
    assert cli.main(["evaluate", *words]) == 2
    assert "abc-rlhf evaluate runs in one process, but WORLD_SIZE=8" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_ranks(local_runs, tmp_path_factory):
    """What each of two ranks saw."""
    out = tmp_path_factory.mktemp("two")
    local_runs.done([], ranks=2, variant=("two_ranks", str(out)))
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def test_zero3_weights_are_whole_however_late_each_transfer_ends(two_ranks):
    for ours, theirs in (saw["whole"] for saw in two_ranks):
        assert ours == 2 * len(rank_checks.SIZES)
        assert theirs < ours, "DeepSpeed waits for all of a list's transfers now: they need not be gathered one by one"


def test_a_group_shares_out_a_batch_and_every_rank_sees_all_results(two_ranks):
    for rank, saw in enumerate(two_ranks):
        assert saw["results"] == [[[0, 0], [1, 0]], [[2, 1], [3, 1]]]
        assert saw["seen"] == [[[0, 0], [1, 0]], [[2, 1], [3, 1]]][rank]
        assert saw["items"] == [[0], [1], [2], [3]]  # workers got copies, as from Ray
        assert saw["own"] == [10, 11]
        assert saw["uneven"] == "3 batches of change for 2 ranks"
        assert saw["local_rank"] == str(rank)
        assert saw["timed"] == ["change", "own"]


class Hungry(rank_checks.Worker):
    def forward(self, item):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def fit(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def save(self):
        raise RuntimeError("something else")


def test_out_of_memory_names_the_flag_that_lowers_it(monkeypatch):
    launched(monkeypatch, **LAUNCHED | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    group = InProcessGroup(1, 1, Hungry)
    with pytest.raises(
        UserError, match="out of memory while scoring the rollout: try a smaller --rollout.micro_batch"
    ):
        group.async_run_method_batch("forward", item=[0])
    with pytest.raises(
        UserError, match=r"while training: try a smaller --train.micro_batch_size, .*--ds.load_in_4bit"
    ):
        group.async_run_method("fit")
    with pytest.raises(RuntimeError, match="something else"):
        group.async_run_method("save")


FAILS = """
import sys
from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.local import distributed_ranks
import torch.distributed as dist

def main(argv):
    with distributed_ranks.only_first_rank_prints() as rank:
        print("started")
        if argv == ["late"]:
            dist.init_process_group("gloo")
            distributed_ranks.gather(rank.index)
            if rank.index == 0:
                distributed_ranks.gather("waits for ever")
        raise UserError(f"rank {rank.index} has refused")

cli.OWN_PARSER, cli.COMMANDS = {"fail": "main"}, {"fail": ("__main__", "")}
sys.modules["__main__"].main = main
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("when", "who"), [("early", 0), ("late", 1)])
def test_an_error_is_reported_once_and_ends_every_rank(tmp_path, when, who):
    """Early: by all, before they meet. Late: by one while the other waits for it."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    started = time.time()
    result = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, "fail", when)
    assert result.returncode != 0
    assert time.time() - started < distributed_ranks.GRACE
    assert result.stdout.count("started") == 1
    assert [line for line in result.stderr.splitlines() if "has refused" in line] == [
        f"abc-rlhf: error: rank {who} has refused"
    ]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "abc_plugin")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "abc_plugin")


def flags(tiny, out, **changes):
    """A run of two rollouts, each trained on twice: what differs then differs by more than rounding."""
    ours = {"data.max_samples": 16, "train.max_epochs": 2, "reward_shaping": "abc"}
    ours |= {"shaping.tokenizer_check": "off"}  # the ends may differ
    return local_flags(tiny, out, **ours | changes)


def launch(words, flags):
    """A run by a launcher; its standard output."""
    env = os.environ | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *map(str, words), "local", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory):
    """The tiny models with a policy whose responses end after every eighth token, on average."""
    directory = tmp_path_factory.mktemp("uneven")
    for name in ("reward_model", "prompts.jsonl"):
        (directory / name).symlink_to(tiny / name)
    shutil.copytree(tiny / "policy", directory / "policy")
    (directory / "policy" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(0, 49152, 8))})
    )
    return directory


# OpenRLHF logs these as means over ranks or micro-batches that weigh the tokens of a short response more.
BY_SHARE = {"train/policy_loss", "train/values"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stage", "models", "by_share"), [(DEEPSPEED, 2, "tiny", set()), (TORCHRUN, 3, "uneven", BY_SHARE)]
)
def test_two_ranks_train_what_one_rank_trains(request, local_runs, tmp_path, launcher, stage, models, by_share):
    """Losses, rewards, credit metrics, KL and weights, to the noise of float32; one rank writes.

    Two ranks have half the training batch each, and so as many updates. Where responses differ in length, a rank whose
    own have ended does not wait for the other's.
    """
    models = request.getfixturevalue(models)
    if launcher is DEEPSPEED:
        with socket.socket() as free:
            free.bind(("", 0))
            launcher = (*launcher[:2], "--master_port", free.getsockname()[1], *launcher[2:])
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    said = local_runs.done(flags(models, alone, **{"train.micro_batch_size": 8}))
    assert " s per step (" in said
    said = launch(launcher, flags(models, shared, **{"ds.zero_stage": stage}))
    assert said.count("loading models") == said.count("done: 2 steps") == 1
    assert "INFO ppo_trainer" not in said
    assert (shared / "run.rank1.log").exists()
    assert len(list((shared / "tensorboard").iterdir())) == 1
    one, two = (
        {tag: [value for _, value in events] for tag, events in scalars(out).items()} for out in (alone, shared)
    )
    assert one.keys() == two.keys()
    assert {"train/timing/score", "train/timing/policy_forward", "train/timing/critic_update"} <= set(two)
    for name in one:
        if "timing" not in name and name not in by_share:
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), name
    assert (max(one["train/truncated"]) < 1) == bool(by_share)
    assert max(map(abs, one["train/policy_loss"])) > 0.01
    assert abs(one["train/kl"][-1]) > 1e-3
    start, one, two = (weights(path) for path in (models / "policy", alone, shared))
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
