"""``abc-rlhf audit``: whether credit says which tokens moved the reward model's score, before a GPU is spent on it.

Imports torch, transformers, captum, scipy and matplotlib; never openrlhf. Read in this order: ``completions`` (what is
audited), ``reward_model`` (scores, rows, gradients), ``measure`` (one completion), ``shares`` (where credit and
attention lie), ``results`` (the file that a killed audit goes on with), ``stats`` and ``summary`` (intervals over
completions), ``heads`` (layers and heads), ``advice`` (the sentences), ``plots`` and ``page`` (pictures), ``command``
(the way in). README.md says how to read the outcome.

Dimensions: B sequences of a batch, S tokens of a sequence, A = S - 1 actions, T tokens of a completion, L layers with
softmax attention, H heads, N completions.
"""
