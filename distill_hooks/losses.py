"""The losses of stage I (Eq. 4, 5 and 6)."""
from typing import Optional, Union

import torch
import torch.nn.functional as F

__all__ = ['hidden_loss', 'hard_label_loss', 'dearkd_loss']


def hidden_loss(
        aligned: torch.Tensor,
        feature_map: torch.Tensor,
        std: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Eq. 4: mean squared error between the aligned student tokens and the teacher's feature map.

    Args:
        aligned: Output of the aligner (B, C, H, W).
        feature_map: The teacher's (B, C, H, W).
        std: Fixed standard deviation per channel (C,) to divide the feature map by. Our option.
    """
    if aligned.is_contiguous(memory_format=torch.channels_last):  # one layout for both, which is faster
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    feature_map = feature_map.float()
    if std is not None:
        feature_map = feature_map / std.view(1, -1, 1, 1)
    return F.mse_loss(aligned.float(), feature_map)


def hard_label_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Eq. 5: cross-entropy of the distillation logits (B, classes) with the teacher's hard decision."""
    return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=-1))


def dearkd_loss(
        ce_loss: torch.Tensor,
        logit_loss: Union[torch.Tensor, float],
        hidden: Union[torch.Tensor, float],
        alpha: float,
        beta: float,
) -> torch.Tensor:
    """Eq. 6: alpha * L_CE + (1 - alpha) * L_logit + beta * L_hidden."""
    return alpha * ce_loss + (1 - alpha) * logit_loss + beta * hidden
