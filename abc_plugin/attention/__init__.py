"""Recovery of one attention row from a reward model whose kernels keep no attention weights.

Imports torch and transformers only. Read in this order: ``choose`` (the way in), ``rerun`` (the definition, slow),
``rows`` (which row), ``row`` (the maths), ``averaged`` (the mean of several), ``layers`` (which layer), ``tap`` and
``recording`` (where it attaches, what it sees), ``packed`` and ``parallel`` (split and joined sequences), ``matrix``
and ``fallback`` (modules outside the attention interface), ``bench``, ``cost`` and ``plot`` (what it costs),
``parity``, ``families`` and ``cpu_flash`` (is it exact).

Dimensions: B responses in a batch, S tokens of a padded sequence, H query heads, K key heads (H / K query heads share
one), D width of a head.
"""

from abc_plugin.attention.attach import attach

__all__ = ["attach"]
