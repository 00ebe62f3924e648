"""The embedded default: policy, reward model and prompts for the paper's first task, made from PyPI packages.

``prepare`` is the command and its cache, ``recipes`` the settings, ``reviews`` and ``smollm2_package`` what comes out
of the packages, ``reward_training`` training and testing. From these, ``quickstart_models`` makes the default,
``small_models`` a policy and reward model from scratch, ``gpt2_reward_model`` one with another tokenizer,
``lexicon_reward_model`` one whose attention is its reasoning, ``tiny_models`` random weights for tests.
"""
