"""For attention modules outside transformers' attention interface: read the weights that they compute themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from abc_plugin.attention.layers import OUTSIDE, REMEDY
from abc_plugin.attention.matrix import MatrixReader, check_outside, own_weights
from abc_plugin.errors import CreditError, UserError


class Fallback(MatrixReader):
    """Has one layer compute its attention eagerly, inside the model's own forward, and keeps one row of it.

    Interface and errors of ``tap.AttentionTap``, for the modules of ``layers.OUTSIDE``. Most of them know no other way
    than the full matrix, so that nothing is added; Falcon under sdpa gives up its kernel in this one layer, and its
    score may differ from the stock one by rounding.
    In train mode the weights are those after dropout: CreditError where the model has been switched to it.
    """

    how = "read from its own weights"

    def _check_support(self) -> None:
        kind = type(self.module).__name__
        if kind not in OUTSIDE:
            raise UserError(f"{self.model_name} is not supported: {kind} hands out no weights; {REMEDY}")
        check_outside(self.module, self.config, self.model_name)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return None if self.recording is None else own_weights(module, args, kwargs)

    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        if self.module.training:
            raise CreditError(f"{self.describe()}: in train mode its weights are after dropout; call model.eval()")
        return output[1].detach()
