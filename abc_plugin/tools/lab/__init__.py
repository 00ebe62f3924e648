"""``abc-rlhf lab``: what each credit method does to the policy gradient, exactly, where completions can be listed.

``mdp`` lists completions, ``random_processes`` draws rewards and evidence and shapes them with the shipped credit,
``policy_gradient`` is what an actor-critic follows, ``gradient_bias`` compares it with the true gradient,
``findings_text`` makes tables and sentences. README.md has the equations.

Dimensions: M reward models (each with a policy of its own), N = V^L completions, L positions, V tokens, P prefixes
that a token may follow, p prefixes of one length. Entry t of a position axis is the choice of token t.
"""
