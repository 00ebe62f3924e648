"""Recovery of one attention row from a reward model whose kernels keep no attention weights.

Imports torch and transformers only. Read in this order: ``rerun`` (the definition, slow), ``rows`` (which row),
``row`` (the maths), ``layers`` (which layer), ``tap`` (where it attaches), ``bench`` (what it costs).

Dimensions: B responses in a batch, S tokens of a padded sequence, H query heads, K key heads (H / K query heads share
one), D width of a head.
"""
