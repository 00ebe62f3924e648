"""``abc-rlhf study``: a grid of training runs, and what they say about the methods. Imports no host."""
