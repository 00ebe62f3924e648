"""Attention Based Credit (ABC) for OpenRLHF: dense per-token rewards from the reward model's own attention.

The Python interface; everything else in the package is private.

    attach              read a token's attention from a forward that runs anyway (transformers, any training code)
    response_weights    that row, restricted to the response and renormalised
    redistribute        a scalar reward spread over the tokens by such weights
    shape               the same for any method, with its options and several reward models
    install, uninstall  let OpenRLHF's own driver take credit, in the process that calls its train()
    ShapingConfig       the settings
    Method, share, Evidence     to register a method under the entry-point group ``abc_plugin.reward_shaping``

Importing this package imports neither torch nor OpenRLHF: a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "attach": "attention",
    "response_weights": "credit.redistribute",
    "redistribute": "credit.redistribute",
    "shape": "credit.shaping",
    "install": "host.install",
    "uninstall": "host.install",
    "ShapingConfig": "config",
    "Method": "credit.methods",
    "share": "credit.methods",
    "Evidence": "credit.methods",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
