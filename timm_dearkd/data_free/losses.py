"""What images are optimised for: priors, BatchNorm statistics, diversity (Eq. 8 and 10 to 16)."""
import math
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = [
    'BatchNormStats', 'competition_loss', 'easiest_positive_loss', 'intra_divergence_loss', 'l2_prior',
    'total_variation', 'triplet_loss',
]


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """R_TV of Eq. 15 for images (B, C, H, W): l2 norms of the differences to four neighbours, over the whole batch."""
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return sum((torch.linalg.vector_norm(d) for d in differences), images.new_zeros(()))


def l2_prior(images: torch.Tensor) -> torch.Tensor:
    """The l2 term of Eq. 15 for images (B, C, H, W): the mean of their norms."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


class _Moments(torch.autograd.Function):
    """The input (B, C, ...) itself, and its mean and biased variance per channel (C,), in one pass.

    The backward adds their gradients to the input's: one kernel on CUDA, in place elsewhere, where the gradient that a
    BatchNorm layer returns has no other user.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():  # the compiler fuses this, and has no kernel for the other
            var, mean = torch.var_mean(x.float(), dim=(0, *range(2, x.ndim)), correction=0)
        else:
            mean, var = torch.batch_norm_update_stats(x, None, None, 0.)
        return x.view_as(x), mean.float(), var.float()

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad, grad_mean, grad_var = grads
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        if x.is_cuda and not torch.compiler.is_compiling():
            # of BatchNorm's backward: grad - sum_dy / count - (x - mean) * invstd^2 * sum_dy_xmu / count, with invstd 1
            counts = torch.full((1,), count, dtype=torch.int32, device=x.device)
            return torch.batch_norm_backward_elemt(
                grad, x, mean, torch.ones_like(mean), None, -grad_mean, -2. * grad_var, counts)
        slope = 2. / count * grad_var
        offset = grad_mean / count - slope * mean
        slope, offset = (t.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2)) for t in (slope, offset))
        return grad.addcmul_(x, slope).add_(offset)


class BatchNormStats:
    """R_BN of Eq. 16: how far the statistics of a batch are from those that a CNN's BatchNorm layers have kept.

    Forward pre-hooks on all BatchNorm layers, in eval mode, until `close` or the end of a `with`. A forward without
    gradients is not measured.

    Args:
        model: The CNN.
        relative: Divide the differences of means by the layer's running deviation, and those of variances by its
            running variance (our option, `--bn-norm relative`).
        first_weight: Weight of the first layer; the others have 1.

    Raises:
        ValueError: A model without BatchNorm.

    Examples:

        ```python
        with BatchNormStats(cnn) as stats:
            logits = cnn(images)
            loss = F.cross_entropy(logits, labels) + 5e-2 * stats.loss()
        ```
    """

    def __init__(self, model: nn.Module, relative: bool = False, first_weight: float = 1.) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [m for m in layers if m.running_mean is not None]
        if not layers:
            raise ValueError(
                f'{type(model).__name__} has no BatchNorm layers, whose statistics the images are made to match.'
                ' Choose a CNN with BatchNorm, such as a ResNet, a RegNet or an EfficientNet.')
        self.layers = layers
        means = torch.cat([m.running_mean.detach().float() for m in layers])  # type: ignore[union-attr]
        variances = torch.cat([m.running_var.detach().float() for m in layers])  # type: ignore[union-attr]
        eps = torch.cat([torch.full_like(m.running_var, m.eps).float() for m in layers])  # type: ignore[arg-type]
        self._sizes = torch.tensor([m.num_features for m in layers], device=means.device)
        self._targets = torch.stack([means, variances])  # (2, channels of all layers)
        scales = torch.stack([(variances + eps).sqrt(), variances + eps])
        self._scales = scales if relative else torch.ones_like(scales)
        self._weights = means.new_ones(len(layers))
        self._weights[0] = first_weight
        self._moments: Dict[nn.Module, Tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [m.register_forward_pre_hook(self._measure) for m in layers]

    def _measure(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():
            return args
        x, mean, var = _Moments.apply(args[0])
        self._moments[module] = (mean, var)  # layers may run in another order than they are listed in
        return (x, *args[1:])

    def clear(self) -> None:
        """Forget the latest forward."""
        self._moments.clear()

    def loss(self) -> torch.Tensor:
        """R_BN of the latest forward, which it forgets."""
        if len(self._moments) != len(self.layers):
            raise RuntimeError(f'{len(self._moments)} of {len(self.layers)} BatchNorm layers have seen the batch.')
        moments = torch.stack([torch.cat(values) for values in zip(*(self._moments[m] for m in self.layers))])
        self._moments.clear()
        squares = ((moments - self._targets) / self._scales).square()
        # `index_add` is not deterministic on CUDA; `unsafe` skips a check that waits for the device
        sums = torch.segment_reduce(squares.T.contiguous(), 'sum', lengths=self._sizes, axis=0, unsafe=True)
        return (sums.clamp(min=1e-24).sqrt() * self._weights.unsqueeze(1)).sum()  # a root has no slope at 0

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._moments.clear()

    def __enter__(self) -> 'BatchNormStats':
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _distances(features: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Euclidean distances (B, B), and which pairs are of one class, but not one image, and of two."""
    distances = torch.cdist(features.float(), features.float(), compute_mode='donot_use_mm_for_euclid_dist')
    same = targets[:, None] == targets[None, :]
    return distances, same & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device), ~same


def _mean_over(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of the values (B,) that are valid; 0 if none is."""
    return torch.where(valid, values, 0.).sum() / valid.sum().clamp(min=1)


def easiest_positive_loss(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """L_ep (Eq. 11): minus the distance of each image to the nearest one of its class, on average.

    Args:
        features: (B, D).
        targets: Classes (B,). An image that is alone in its class does not count.
    """
    distances, positive, _ = _distances(features, targets)
    nearest = distances.masked_fill(~positive, float('inf')).min(dim=1).values
    return -_mean_over(nearest, positive.any(dim=1))


def triplet_loss(features: torch.Tensor, targets: torch.Tensor, margin: float = 1.) -> torch.Tensor:
    """L_triplet (Eq. 12): the farthest of the same class against the nearest of another, on average.

    Args:
        features: (B, D).
        targets: Classes (B,). An image without a positive or a negative does not count.
        margin: By how much the negative has to be farther (our choice: 1).
    """
    distances, positive, negative = _distances(features, targets)
    farthest = distances.masked_fill(~positive, -float('inf')).max(dim=1).values
    nearest = distances.masked_fill(~negative, float('inf')).min(dim=1).values
    valid = positive.any(dim=1) & negative.any(dim=1)
    return _mean_over(F.relu(torch.where(valid, farthest - nearest, 0.) + margin), valid)


def intra_divergence_loss(
        features: torch.Tensor,
        targets: torch.Tensor,
        ep_weight: float = 50.,
        triplet_weight: float = 0.5,
        margin: float = 1.,
) -> torch.Tensor:
    """Eq. 13: what keeps the images of a class apart, and the classes farther.

    Args:
        features: Pooled penultimate features (B, D).
        targets: Classes (B,).
        ep_weight: alpha_ep.
        triplet_weight: alpha_tr.
        margin: See `triplet_loss`.
    """
    return ep_weight * easiest_positive_loss(features, targets) + triplet_weight * triplet_loss(
        features, targets, margin)


def competition_loss(
        teacher_logits: torch.Tensor,
        student_logits: torch.Tensor,
        temperature: float = 3.,
) -> torch.Tensor:
    """ADI's term: 1 - the Jensen-Shannon divergence (in nats) of teacher and student, on average.

    Args:
        teacher_logits: (B, classes).
        student_logits: (B, classes).
        temperature: Of both softmaxes, as in DeepInversion's code.
    """
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=1)
    student = (student_logits.float() / temperature).log_softmax(dim=1)
    middle = torch.logaddexp(teacher, student) - math.log(2.)
    halves = [F.kl_div(middle, p, reduction='batchmean', log_target=True) for p in (teacher, student)]
    return 1. - (halves[0] + halves[1]) / 2
