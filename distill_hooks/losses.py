"""The losses of stage I (Eq. 4, 5 and 6)."""
import math
from typing import Optional, Union

import torch
import torch.nn.functional as F

NO_LABEL = -100


def hidden_loss(
        aligned: torch.Tensor,
        feature_map: torch.Tensor,
        std: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the mean squared error of aligned tokens and feature map (Eq. 4).

    Args:
        aligned: Output of the aligner (B, C, H, W).
        feature_map: The teacher's feature map (B, C, H, W).
        std: Fixed standard deviation per channel (C,) to divide the feature map by. Our option.
    """
    if aligned.is_contiguous(memory_format=torch.channels_last):  # faster if both have one layout
        feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    feature_map = feature_map.float()
    if std is not None:
        feature_map = feature_map / std.view(1, -1, 1, 1)
    return F.mse_loss(aligned.float(), feature_map)


def hard_labels(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of the highest logit (B,); `NO_LABEL` where logits (B, classes) are not finite."""
    return logits.argmax(dim=-1).where(logits.isfinite().all(dim=-1), NO_LABEL)


def hard_label_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits with the teacher's hard labels (Eq. 5).

    Args:
        logits: Logits of `head_dist` (B, classes).
        teacher_logits: The teacher's logits (B, classes), or its labels (B,).

    Returns:
        The loss; NaN if an image has no label, see `hard_labels`.
    """
    labels = teacher_logits if teacher_logits.ndim == 1 else hard_labels(teacher_logits)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL)
    return loss.where((labels != NO_LABEL).all(), math.nan)


def soft_label_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the KL divergence of the teacher's soft labels and the student's (our option).

    Args:
        logits: The student's logits (B, classes).
        teacher_logits: The teacher's logits (B, classes).
        temperature: Temperature T of both softmaxes. The loss is multiplied by T squared, so that the size of its
            gradient does not depend on T.
    """
    student, teacher = ((z.float() / temperature).log_softmax(dim=-1) for z in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature ** 2


def dearkd_loss(
        ce_loss: torch.Tensor,
        logit_loss: Union[torch.Tensor, float],
        hidden: Union[torch.Tensor, float],
        alpha: float,
        beta: float,
) -> torch.Tensor:
    """Return alpha * L_CE + (1 - alpha) * L_logit + beta * L_hidden (Eq. 6)."""
    return alpha * ce_loss + (1 - alpha) * logit_loss + beta * hidden
