"""``abc-rlhf bench``: what credit costs in time and memory, and whether recovered rows are eager attention's."""
