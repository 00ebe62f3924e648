"""``abc-rlhf audit``: whether credit says which tokens moved the reward model's score, before a GPU is spent on it.

Imports torch, transformers, scipy and matplotlib; never openrlhf. Read in this order: ``audited_texts``,
``reward_model`` (scores, evidence, rows), ``completion_measures`` (one completion), ``results_file`` (the file that a
killed audit goes on with), ``correlations`` and their intervals, ``summary_table`` (over completions), ``head_map``
(layers and heads), ``advice`` (sentences, the command to run), ``pictures``, ``audit_outputs``, ``command`` (the way
in). README.md says how to read the outcome.

Dimensions: B sequences of a batch, S tokens of a sequence, A = S - 1 actions, T tokens of a completion, L layers with
softmax attention, H heads, N completions.
"""
