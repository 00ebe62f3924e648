"""``abc-rlhf lab``: what each credit method does to the policy gradient, exactly, where completions can be listed.

Dimensions: M reward models (each with a policy of its own), N = V^L completions, L positions, V tokens, P prefixes
that a token may follow. Entry t of a position axis is the choice of token t. README.md has the equations.
"""
