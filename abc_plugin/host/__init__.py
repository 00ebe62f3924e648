"""The integration: the only package that imports openrlhf.

contract.py          what the plugin relies on in OpenRLHF (contract_table.py), checked on the installed source
adapt.py             lets OpenRLHF be imported and run where vLLM, flash-attn or CUDA are absent
arguments.py         OpenRLHF's own command-line parser, reused; options.py: its settings by name, in any version
checks.py            everything that can be refused before a model is loaded; method_checks.py: of methods and options
actors.py            Ray's actor classes, opened for subclasses
reward_model.py      the reward model's worker: score and what the method needs in one forward; ensemble.py: several
policy_attention.py  the policy's worker for abc_d and abc_d2: its own attention beside its log-probabilities
remote_credit.py     credit of rewards that come with the rollout
experience_maker.py  the experience maker: per-token credit instead of the final reward
credited.py          from what was read to shaped rewards, with the options; segments.py: where segments end
records.py           completions of some steps, written with what each token got
trainers.py          the host's trainers on Ray with that experience maker
normalisation.py     the reward's mean and deviation, which the host loses
install.py           puts these classes where the host looks up its own
preflight.py         what can be refused on Ray before a GPU is taken
ray_driver.py        the Ray driver: OpenRLHF's train() on a cluster; cpu_cluster.py: one without GPUs
serve_rm.py          the host's reward server, with credit in its replies
ranks.py             torchrun's and deepspeed's processes: places, shares, one voice
inprocess.py         Ray's calls, answered in this process
generation.py        rollouts by transformers, where the host uses vLLM
timing.py            where the time of a step goes
adapters.py          LoRA in the local driver: the reference is the policy without its adapter
adapter_checks.py    what can be refused of it; adapter_files.py: saving and merging; shared_base.py: one base for all
frozen.py            --local.train_layers: the lower layers are frozen, and run once per completion
quantised.py         4-bit weights: the only importer of bitsandbytes
zero3.py             split weights, whole for a while
local_trainer.py     the host's trainer with these and a progress bar
resume.py            goes on from a checkpoint as if never stopped (randomness.py: all generators' states)
checkpoints.py       which checkpoints on disk are complete and kept; resume_checks.py: which one a run goes on from
local.py             the local driver: OpenRLHF's train() in one process
evaluate.py          sample, score and attribute held-out prompts
"""
