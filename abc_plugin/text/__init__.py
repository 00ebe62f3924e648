"""Whether two tokenizers read text alike, and where they do not, which token of one is which of the other.

``compare`` and ``check`` answer the first, ``align`` and ``mapping`` the second.
"""

from __future__ import annotations

from abc_plugin.text.compare import first_difference

__all__ = ["first_difference"]
