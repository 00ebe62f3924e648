"""``abc-rlhf local`` and ``evaluate``: OpenRLHF's own training in the processes of one machine, without Ray and vLLM.

In the order of a run: command.py reads the words, flag_checks.py refuses what cannot work, driver.py runs OpenRLHF's
train() with ray_in_process.py in Ray's place; trainer.py has the step, rollout.py the completions, lora.py and
frozen_layers.py what is trained, resume.py and checkpoints.py how a run survives its end. distributed_ranks.py:
several processes.
"""
