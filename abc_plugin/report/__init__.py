"""Curves and a page from a run's TensorBoard events and its samples files; imports neither torch nor OpenRLHF."""
