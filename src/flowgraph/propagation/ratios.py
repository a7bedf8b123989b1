"""Division where only some entries are defined, with derivatives that stay finite."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor


def masked_ratio(
    where: Bool[Tensor, "*shape"],
    numerator: Tensor | float,
    denominator: Tensor,
    otherwise: Tensor | float = 0.0,
) -> Tensor:
    """Return ``numerator / denominator`` on the mask, and ``otherwise`` elsewhere.

    Off the mask the denominator is replaced by 1: a division by 0 there would make the gradient NaN, although
    ``torch.where`` drops its value.

    Example:
        >>> where = torch.tensor([True, False])
        >>> masked_ratio(where, torch.tensor([1.0, 1.0]), torch.tensor([4.0, 0.0])).tolist()
        [0.25, 0.0]
    """
    ratio = numerator / torch.where(where, denominator, 1.0)
    return torch.where(where, ratio, otherwise)
