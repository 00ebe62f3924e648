"""Attention Based Credit (ABC) for OpenRLHF: dense per-token rewards from the reward model's own attention.

Importing this package imports neither torch nor OpenRLHF; see the README for the map of sub-packages.
"""

__version__ = "0.1.0"
