"""The method: pure tensor maths, imports torch only.

Dimensions: B responses in a batch, S tokens of a padded sequence (prompt and response), A = S - 1 actions: entry t of
an action axis stands for choosing token t + 1, as in OpenRLHF's ``action_mask``.
"""
