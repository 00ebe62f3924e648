"""What makes OpenRLHF on Ray take credit. Its classes are subclassed, and the subclasses put where it looks them up.

A reward's way from the reward model to the advantage:

1. ``model_workers.CreditRewardModel.forward``: the host's forward, once per reward model
2. ``model_workers.Member.score``: readers record, beside the score, what the method needs; both go into one
   EvidenceBatch (the policy's ``CreditPolicyModel.forward`` likewise), which Ray brings back
3. ``experience_maker.CreditExperienceMaker._flatten_results``: the host gets its own tensor, the evidence waits
4. ``experience_maker.CreditExperienceMaker.make_experience``: each experience gets its evidence
5. OpenRLHF's ``compute_advantages_and_returns``: length penalties, baseline, clipping, KL penalty
6. ``experience_maker.CreditExperienceMaker.get_advantages_and_returns`` or ``get_cumulative_returns``: called once per
   experience with that reward
7. ``experience_maker._split``: the final reward without the KL penalty
8. ``experience_maker.shape_batch``, ``credit.shaping.shape``: the final reward spread over the tokens
9. OpenRLHF's ``get_advantages_and_returns`` or ``get_cumulative_returns``: advantages of spread reward and penalty

install.py              puts the subclasses where the host looks up its own; the plugin of a patched host
import_openrlhf.py      imports the host where vLLM, flash-attn or CUDA are absent
supported_releases.py   what the host must offer
arguments.py            the host's own command-line parser, and what is said of a run's settings
model_checks.py         what is refused before a model is loaded; prompt_dataset.py: the prompts
model_workers.py        the workers of reward model, policy and critic
experience_maker.py     where credit becomes reward; completion_recorder.py writes down some completions
ray_driver.py           ``abc-rlhf ray``; ray_trainers.py; cluster_on_cpu.py: its whole stack on a machine without GPUs
serve_rm.py             ``abc-rlhf serve-rm``: the host's reward server, with credit in its replies
"""
