"""Kill -9 and resume: the curve and the policy are those of a run that was never stopped."""

import shutil

import pytest
from conftest import local_flags
from local_runs import RESUMABLE, STEPS, differences, killed_at_random

AGAIN = RESUMABLE | {"ckpt.load_enable": True}


@pytest.fixture(scope="module")
def whole(local_runs, tiny, tmp_path_factory):
    """A run of six steps that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    local_runs.done(local_flags(tiny, out, **RESUMABLE))
    return out


CHAIN = (  # where each process of a run is killed, at which step; from which step the next goes on
    ("killed_within_a_file", 1, 0),
    ("killed_between_the_models", 2, 1),
    ("killed_before_the_manifest", 3, 2),
    ("killed_while_removing", 4, 4),
    ("killed_after_logging", 5, 4),
)


@pytest.mark.slow
def test_a_run_killed_five_times_while_saving_ends_as_one_that_was_not(local_runs, whole, tiny, tmp_path):
    flags = local_flags(tiny, tmp_path, **AGAIN)
    from_step = 0
    for point, step, next_from in (*CHAIN, (None, 0, None)):
        status, said = local_runs.run(flags, variant=point and (point, step))
        if from_step:
            assert f"goes on from step {from_step}," in said
        else:
            assert "no complete checkpoint" in said and "starts from its first step" in said
        if point:
            assert status == -9, said[-3000:]
            assert len(list((tmp_path / "checkpoints/complete").glob("*/manifest.json"))) == bool(next_from)
        from_step = next_from
    assert status == 0, said[-3000:]
    assert f"done: {STEPS} steps (4 of them before the checkpoint)" in said
    assert differences(whole, tmp_path) == []
    [left] = (tmp_path / "checkpoints/_actor").glob("global_step*")  # --ckpt.max_num 1
    assert left.name == f"global_step{STEPS}"


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_ends_as_one_that_was_not(local_runs, whole, tiny, tmp_path):
    kills, wrong = killed_at_random(local_runs, tiny, whole, tmp_path, 1)
    assert wrong == [], kills


# What the run above has not: adapters on a base that is not saved, dropout's random numbers, rollouts that wait until
# the policy is trained, and all of it in parts.
ADAPTERS = {
    "ds.lora.rank": 4,
    "ds.lora.dropout": 0.1,
    "ds.load_in_4bit": True,
    "ds.zero_stage": 3,
    "critic.freezing_steps": 1,
    "train.num_episodes": 2,
    "rollout.micro_batch_size": 2,
}


@pytest.mark.slow
def test_two_ranks_with_4_bit_adapters_and_zero_3_go_on_too(local_runs, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    local_runs.done(local_flags(tiny, whole, **RESUMABLE | ADAPTERS), ranks=2)
    flags = local_flags(tiny, cut, **AGAIN | ADAPTERS)
    status, said = local_runs.run(flags, ranks=2, variant=("killed_after_logging", 3))
    assert status == -9, said[-3000:]
    status, said = local_runs.run(flags)
    assert status == 2
    assert "--critic.num_gpus_per_node 2 (now 1)" in said
    local_runs.done(flags, ranks=2)
    assert differences(whole, cut, 4) == []


def test_a_run_that_is_done_says_so_and_stays_as_it_is(local_runs, whole, tiny, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    assert "nothing was left to train" in local_runs.done(local_flags(tiny, again, **AGAIN))
    assert differences(whole, again) == []


def test_other_settings_and_altered_bytes_end_in_one_line_and_overwrite_nothing(local_runs, whole, tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    [state] = (out / f"checkpoints/_actor/global_step{STEPS}").glob("*optim_states.pt")

    def refused(**changes):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        status, said = local_runs.run(local_flags(tiny, out, **changes))
        assert status == 2, said[-3000:]
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        [error] = [line for line in said.splitlines() if line.startswith("abc-rlhf: error:")]
        return error

    assert "made with other settings: --actor.adam.lr 0.001 (now 0.002);" in refused(**AGAIN | {"actor.adam.lr": 2e-3})
    assert "add --ckpt.load_enable to go on from it" in refused(**RESUMABLE)
    altered = bytearray(state.read_bytes())
    altered[len(altered) // 2] ^= 0xFF  # as many bytes as before
    state.write_bytes(altered)
    assert f"is whole: {state} is altered" in refused(**AGAIN)
