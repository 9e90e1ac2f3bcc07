"""Losses of synthetic images: priors, BatchNorm, diversity (Eq. 10-16)."""
import math
from typing import Any, Dict, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

KERNEL_DEVICES = ('cpu', 'cuda')  # with torch's kernels of BatchNorm statistics and of sums over segments


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Return R_TV of Eq. 15: l2 norms of the differences to four neighbours.

    Args:
        images: (B, C, H, W). Each norm is over the whole batch.
    """
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return sum((torch.linalg.vector_norm(d) for d in differences), images.new_zeros(()))


def l2_prior(images: torch.Tensor) -> torch.Tensor:
    """Return the l2 term of Eq. 15: the mean l2 norm of images (B, C, H, W)."""
    return torch.linalg.vector_norm(images.flatten(1), dim=1).mean()


class _Moments(torch.autograd.Function):
    """Returns the input (B, C, ...), and its mean and biased variance (C,).

    One pass over the input. The backward adds the gradients of both statistics to the input's gradient, with one kernel
    on CUDA and in place elsewhere. In place is safe, because nothing else uses the gradient that BatchNorm returns.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # torch.compile and MPS have no kernel for `batch_norm_update_stats`, and the CPU's rounds to half precision.
        # The compiler fuses `var_mean`
        is_rounded = x.device.type == 'cpu' and torch.finfo(x.dtype).bits < 32
        if torch.compiler.is_compiling() or x.device.type not in KERNEL_DEVICES or is_rounded:
            var, mean = torch.var_mean(x.float(), dim=(0, *range(2, x.ndim)), correction=0)
        else:
            mean, var = torch.batch_norm_update_stats(x, None, None, 0.)
        return x.view_as(x), mean.float(), var.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[torch.Tensor, ...], output: Tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad, grad_mean, grad_var = grads
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        if x.is_cuda and not torch.compiler.is_compiling():
            # this computes grad - sum_dy / count - (x - mean) * invstd^2 * sum_dy_xmu / count; invstd is 1 here
            counts = torch.full((1,), count, dtype=torch.int32, device=x.device)
            return torch.batch_norm_backward_elemt(
                grad, x, mean, torch.ones_like(mean), None, -grad_mean, -2. * grad_var, counts)
        slope = 2. / count * grad_var
        offset = grad_mean / count - slope * mean
        slope, offset = (t.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2)) for t in (slope, offset))
        return grad.addcmul_(x, slope).add_(offset)


class BatchNormStats:
    """R_BN of Eq. 16: distance between batch and running statistics of BatchNorm.

    Measures with forward pre-hooks on all BatchNorm layers, until `close()` or the end of a `with` block. Ignores
    forwards without gradients.

    Args:
        model: The CNN, in eval mode.
        relative: Divide the differences of means by the layer's running deviation, and those of variances by its
            running variance (our option, `--bn-norm relative`).
        first_weight: Weight of the first layer. The other layers have 1.
        averaged: Take root mean squares over channels instead of norms, and the mean over layers instead of the sum
            (our option). With `relative`, the value then means the same for all CNNs.

    Raises:
        ValueError: If the model has no BatchNorm layers.

    Examples:

        ```python
        with BatchNormStats(cnn) as stats:
            logits = cnn(images)
            loss = F.cross_entropy(logits, labels) + 5e-2 * stats.loss()
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            relative: bool = False,
            first_weight: float = 1.,
            averaged: bool = False,
    ) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [m for m in layers if m.running_mean is not None]
        if not layers:
            raise ValueError(
                f'{type(model).__name__} has no BatchNorm layers, whose statistics the images are to match.'
                ' Choose a CNN with BatchNorm, such as a ResNet, RegNet or EfficientNet.')
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
        if averaged:
            self._weights /= self._sizes.sqrt() * self._weights.sum()
        self._moments: Dict[nn.Module, Tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [m.register_forward_pre_hook(self._measure) for m in layers]

    def _measure(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
        if not torch.is_grad_enabled():
            return args
        x, mean, var = _Moments.apply(args[0])
        self._moments[module] = (mean, var)  # layers may run in another order than `modules()`
        return (x, *args[1:])

    def clear(self) -> None:
        """Discard the statistics of the latest forward."""
        self._moments.clear()

    def loss(self) -> torch.Tensor:
        """Return R_BN of the latest forward, and discard its statistics."""
        if len(self._moments) != len(self.layers):
            raise RuntimeError(f'{len(self._moments)} of {len(self.layers)} BatchNorm layers have run.')
        moments = torch.stack([torch.cat(values) for values in zip(*(self._moments[m] for m in self.layers))])
        self._moments.clear()
        squares = ((moments - self._targets) / self._scales).square()
        if squares.device.type in KERNEL_DEVICES:
            # `index_add` is not deterministic on CUDA; `unsafe` skips a check that would synchronise the device
            sums = torch.segment_reduce(squares.T.contiguous(), 'sum', lengths=self._sizes, axis=0, unsafe=True)
        else:
            sums = torch.stack([part.sum(dim=1) for part in squares.split(self._sizes.tolist(), dim=1)])
        return (sums.clamp(min=1e-24).sqrt() * self._weights.unsqueeze(1)).sum()  # sqrt has no gradient at 0

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._moments.clear()

    def __enter__(self) -> 'BatchNormStats':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _distances(features: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Euclidean distances (B, B), and masks of positive and negative pairs.

    A positive pair is two images of one class, a negative pair has two classes.
    """
    distances = torch.cdist(features.float(), features.float(), compute_mode='donot_use_mm_for_euclid_dist')
    same = targets[:, None] == targets[None, :]
    return distances, same & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device), ~same


def _mean_over(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean of the valid values (B,), or 0 if none is valid."""
    return torch.where(valid, values, 0.).sum() / valid.sum().clamp(min=1)


def easiest_positive_loss(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return L_ep (Eq. 11): minus the mean distance to the nearest of the class.

    Args:
        features: (B, D).
        targets: Classes (B,). The only image of a class is ignored.
    """
    distances, positive, _ = _distances(features, targets)
    nearest = distances.masked_fill(~positive, float('inf')).min(dim=1).values
    return -_mean_over(nearest, positive.any(dim=1))


def triplet_loss(features: torch.Tensor, targets: torch.Tensor, margin: float = 1.) -> torch.Tensor:
    """Return L_triplet (Eq. 12), with the farthest positive and the nearest negative.

    Args:
        features: (B, D).
        targets: Classes (B,). An image without a positive or a negative is ignored.
        margin: Least difference of the two distances (our choice: 1).
    """
    distances, positive, negative = _distances(features, targets)
    farthest = distances.masked_fill(~positive, -float('inf')).max(dim=1).values
    nearest = distances.masked_fill(~negative, float('inf')).min(dim=1).values
    valid = positive.any(dim=1) & negative.any(dim=1)
    return _mean_over(F.relu(torch.where(valid, farthest - nearest, 0.) + margin), valid)


def intra_divergence_loss(
        features: torch.Tensor,
        targets: torch.Tensor,
        ep_weight: Union[float, torch.Tensor] = 50.,
        triplet_weight: Union[float, torch.Tensor] = 0.5,
        margin: float = 1.,
) -> torch.Tensor:
    """Return the intra-divergence loss (Eq. 13): weighted sum of L_ep and L_triplet.

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
    """Return ADI's loss: 1 minus the mean Jensen-Shannon divergence of the networks.

    Args:
        teacher_logits: (B, classes).
        student_logits: (B, classes).
        temperature: Temperature of both softmaxes, as in DeepInversion's code. The divergence is in nats.
    """
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=1)
    student = (student_logits.float() / temperature).log_softmax(dim=1)
    middle = torch.logaddexp(teacher, student) - math.log(2.)
    halves = [F.kl_div(middle, p, reduction='batchmean', log_target=True) for p in (teacher, student)]
    return 1. - (halves[0] + halves[1]) / 2
