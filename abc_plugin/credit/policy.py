"""Credit from the attention of the generating policy itself (paper, appendix B): ABC-D and ABC-D2.

    credit[b,t] = reward[b]·attention[b,t] / Σ_u attention[b,u]

attention[b,t]: what the policy paid, while it generated, to the token of action t; for ABC-D the mean over the steps
that could see the token (``recovery.averaged``), for ABC-D2 that of the step which predicted the last token. No step
sees the last token, so its credit is 0.

Both follow the authors' code (XanderJC/attention-based-credit, get_generator_attention_distribution), except that
there the whole distribution is one token late: the attention on a token credits the one after it.
"""

from __future__ import annotations

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import load, share
from abc_plugin.credit.redistribute import response_weights
from abc_plugin.errors import UserError

POLICY = frozenset({"policy", "policy_last"})  # of methods.NEEDS: what the policy's worker answers

ABC_D = share(lambda evidence: response_weights(evidence.policy_BA, evidence.action_mask_BA), "policy")
ABC_D2 = share(lambda evidence: response_weights(evidence.policy_last_BA, evidence.action_mask_BA), "policy_last")


def policy_need(shaping: ShapingConfig) -> str | None:
    """Which of POLICY the method needs; None where it needs neither or no reward moves.

    Raises UserError for a method that needs both: one forward of the policy gives one.
    """
    needs = sorted(load(shaping.method).needs & POLICY) if shaping.dense else []
    if len(needs) > 1:
        raise UserError(f"--reward_shaping {shaping.method} needs {' and '.join(needs)} at once; let it need one")
    return needs[0] if needs else None
