"""Several reward models: ``--reward.model_name_or_path`` with commas between the paths.

The score is the mean of theirs, the credit the mean of their credit (``credit.shaping``), and where they disagree on a
token its credit goes back to the last token. Each worker holds all of them, one after the other in each forward.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from abc_plugin.host.options import option


def reward_models(args: Namespace) -> list[str]:
    """The paths of ``--reward.model_name_or_path``."""
    return [path.strip() for path in (option(args, "reward.model_name_or_path") or "").split(",") if path.strip()]


def mean_score(scores: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean over the models (B,), metrics): ``reward_disagreement`` is the deviation of the scores, divisor M."""
    if len(scores) == 1:
        return scores[0], {}
    score_MB = torch.stack([score_B.float() for score_B in scores])
    return score_MB.mean(0), {"reward_disagreement": score_MB.std(0, correction=0)}


def mean_info(infos: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each metric's mean over the models that report it."""
    names = {name for info in infos for name in info}
    return {name: torch.stack([info[name] for info in infos if name in info]).mean(0) for name in sorted(names)}
