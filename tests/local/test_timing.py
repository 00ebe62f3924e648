"""Where the time of a step goes: per model, and in the summary's words."""

from types import SimpleNamespace

from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.local import trainer  # noqa: E402


def test_a_step_leaves_its_times_and_starts_anew():
    groups = {"actor": {"forward": 1.5, "fit": 2.0}, "reward": {"forward": 0.5}, "critic": {}}
    host = SimpleNamespace(reference_model_group=None)
    for name, seconds in groups.items():
        setattr(host, f"{name}_model_group", SimpleNamespace(seconds=seconds))
    assert trainer.pop_timings(host) == {
        "timing/score": 0.5,
        "timing/policy_forward": 1.5,
        "timing/critic_forward": 0.0,
        "timing/policy_update": 2.0,
        "timing/critic_update": 0.0,
    }
    assert set(trainer.pop_timings(host).values()) == {0.0}


def test_the_parts_of_a_step_are_medians_and_their_shares_add_up():
    history = [
        {
            "timing/generation": seconds,
            "timing/make_experience": 3.0,
            "timing/score": 1.0,
            "timing/ppo_train": 4.0,
            "timing/step_total": seconds + 7.0,
            "rollout/num_samples": 20.0,
        }
        for seconds in (3.0, 90.0, 3.0)
    ]
    figures = trainer.timing_summary(history)
    assert figures == {
        "step": 10.0,
        "samples_per_second": 2.0,
        "generate": 3.0,
        "score": 1.0,
        "experience": 2.0,
        "update": 4.0,
    }
    said = "10.00 s per step (2.0 samples/s): generate 30%, score 10%, experience 20%, update 40%"
    assert trainer.timing_sentence(figures) == said
