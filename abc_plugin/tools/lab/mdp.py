"""Every completion of V tokens and L positions, and expectations over them; float64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad


class Completions:
    """All V^L token strings, in the order of counting: completion n has the digits of n in base V.

    Those that begin alike lie side by side, so that a sum over "all completions with this prefix" is a reshape:
    (M, N) -> (M, prefixes of t tokens, completions of each). With ``ends``, token 0 ends a completion: what follows
    has no action, its only choice is 0 with probability 1, and strings with anything else there have probability 0.

    tokens_NL: the strings.  mask_NL: True where the policy chooses.  sequences_NS: a prompt of two tokens, then the
    string (S = L + 2), as the host lays them out: its action axis of S - 1 begins with the prompt's last token.
    canonical_N: the string with zeros behind its end.  before_last_N: canonical, with 0 as its last token too.
    """

    def __init__(self, vocabulary: int, length: int, *, ends: bool = False) -> None:
        self.V, self.L, self.N = vocabulary, length, vocabulary**length
        self.prefixes = sum(vocabulary**t for t in range(length))  # P
        powers_L = vocabulary ** torch.arange(length - 1, -1, -1)
        self.tokens_NL = torch.arange(self.N)[:, None] // powers_L % vocabulary
        end_NL = (self.tokens_NL == 0) & ends
        self.mask_NL = end_NL.cumsum(1) - end_NL.long() == 0
        self.canonical_N = (self.tokens_NL * self.mask_NL * powers_L).sum(1)
        self.possible_N = self.canonical_N == torch.arange(self.N)
        last_NL = self.mask_NL & (self.mask_NL.flip(1).cumsum(1).flip(1) == 1)
        self.before_last_N = self.canonical_N - (self.tokens_NL * last_NL * powers_L).sum(1)
        self.sequences_NS = pad(self.tokens_NL, (2, 0), value=vocabulary)

    def by_prefix(self, x_MN: Tensor, t: int) -> Tensor:
        """Sums over the completions of each prefix of t tokens: (M, V^t)."""
        return x_MN.unflatten(1, (self.V**t, -1)).sum(2)

    def spread(self, x_Mp: Tensor) -> Tensor:
        """A value per prefix, given to each of its completions: (M, N)."""
        return x_Mp.repeat_interleave(self.N // x_Mp.shape[1], dim=1)

    def levels(self, x_MPV: Tensor) -> list[Tensor]:
        """The part of each position t of a table over prefixes: (M, V^t, V)."""
        return list(x_MPV.split([self.V**t for t in range(self.L)], dim=1))

    def policy(self, theta_MPV: Tensor) -> Tensor:
        """pi(token | prefix) = softmax of the logits theta, (M, P, V)."""
        live_P = torch.cat([self.mask_NL[:: self.V ** (self.L - t), t] for t in range(self.L)])
        return torch.where(live_P[:, None], theta_MPV.softmax(-1), one_hot(torch.tensor(0), self.V).to(theta_MPV))

    def probability(self, policy_MPV: Tensor) -> Tensor:
        """p(completion) = product of pi(token | prefix), (M, N)."""
        p_Mp = torch.ones(policy_MPV.shape[0], 1, dtype=policy_MPV.dtype)
        for policy_MpV in self.levels(policy_MPV):
            p_Mp = (p_Mp[:, :, None] * policy_MpV).flatten(1)
        return p_Mp

    def conditional(self, x_MN: Tensor, p_MN: Tensor, t: int) -> Tensor:
        """E[x | first t tokens], given to each completion: (M, N); 0 for a prefix that cannot occur."""
        mass_Mp = self.by_prefix(p_MN, t)
        mean_Mp = self.by_prefix(p_MN * x_MN, t) / mass_Mp.clamp_min(torch.finfo(mass_Mp.dtype).tiny)
        return self.spread(mean_Mp)
