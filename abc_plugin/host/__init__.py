"""The integration: the only package that imports openrlhf.

adapt.py             lets OpenRLHF be imported and run where vLLM, flash-attn or CUDA are absent
arguments.py         OpenRLHF's own command-line parser, reused
checks.py            everything that can be refused before a model is loaded
reward_model.py      the reward model's worker: score and attention row in one forward
experience_maker.py  the experience maker: per-token credit instead of the final reward
inprocess.py         Ray's calls, answered in this process
generation.py        rollouts by transformers, where the host uses vLLM
local_trainer.py     the host's trainer with the two above and a progress bar
local.py             the local driver: OpenRLHF's train() in one process
evaluate.py          sample, score and attribute held-out prompts
"""
