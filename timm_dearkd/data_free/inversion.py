"""The optimiser that makes images out of a CNN (section 4, Eq. 8, after DeepInversion)."""
import contextlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_model_input_config

from distill_hooks import Teacher
from distill_hooks.errors import first_line

from .losses import BatchNormStats, competition_loss, intra_divergence_loss, l2_prior, total_variation

__all__ = ['DIVERSITIES', 'Inverter', 'LossWeights', 'Resolution', 'batch_targets', 'spectator']

DIVERSITIES = ('none', 'adi', 'intra')


class Resolution(NamedTuple):
    """A phase of the optimisation: the side length at which the CNN sees the images, the steps, and Adam's rate."""
    size: int
    steps: int
    lr: float


@dataclass
class LossWeights:
    """Weights of the losses: the paper's, but for `first_bn`, `margin`, `adi` and `adi_temperature`, which are ours.

    For small images: the 224 pixels of ImageNet take 0.2 for `adi` (DeepInversion's code).
    """
    tv: float = 1e-4
    l2: float = 1e-5
    bn: float = 5e-2
    first_bn: float = 1.
    ep: float = 50.
    triplet: float = 0.5
    margin: float = 1.
    adi: float = 10.
    adi_temperature: float = 3.


def batch_targets(
        num_batches: int,
        classes: Sequence[int],
        classes_per_batch: int = 6,
        images_per_class: int = 7,
        seed: int = 0,
) -> List[torch.Tensor]:
    """Targets of batches: some different classes, and as many images of each.

    The classes go round in a new order each time, so that all come equally often (our choice; the paper draws them).
    The first batches do not depend on how many follow.

    Args:
        num_batches: How many.
        classes: Class indices to choose from.
        classes_per_batch: How many of them (all, if there are fewer).
        images_per_class: Images of each.
        seed: Of the orders.

    Returns:
        Tensors (classes_per_batch * images_per_class,).
    """
    count = min(classes_per_batch, len(classes))
    generator = torch.Generator().manual_seed(seed)
    queue: List[int] = []
    batches = []
    for _ in range(num_batches):
        chosen: List[int] = []
        while len(chosen) < count:
            place = next((i for i, index in enumerate(queue) if index not in chosen), None)
            if place is None:
                queue += [classes[i] for i in torch.randperm(len(classes), generator=generator).tolist()]
            else:
                chosen.append(queue.pop(place))
        batches.append(torch.tensor(chosen).repeat_interleave(images_per_class))
    return batches


def spectator(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """Another network, to look at images of a CNN's normalisation; a ViT sees them at its own size."""
    size = get_model_input_config(model)['input_size'][1:] if hasattr(model, 'patch_embed') else None
    device = next(model.parameters()).device
    return Teacher(model, in_chans=len(mean), mean=mean, std=std, img_size=size).to(device)


class Inverter:
    """Makes images of given classes out of a classifier with BatchNorm.

    What the paper does not say is DeepInversion's: shifts, mirror images, Adam's betas, pixels clipped to their range.

    Args:
        model: The CNN; it is frozen, in place, and takes normalised images.
        mean: Its normalisation, which says what range the pixels are clipped to.
        std: See `mean`.
        resolutions: The phases. The images have the size of the largest one, and are average-pooled for the others.
        weights: Of the losses.
        bn_relative: See `BatchNormStats`.
        diversity: 'none' (DeepInversion), 'adi' (its competition with a student) or 'intra' (the paper's).
        student: Competitor for 'adi'. A ViT sees the images at its own size.
        student_classes: The CNN's class for each of the student's; None if they are the same.
        jitter: Pixels that the images are shifted by at the most in each step, at the full size.
        flip: Mirror the batch in every other step, at random.
        betas: Adam's.
        autocast: Makes the context in which the CNN runs.
        channels_last: Memory format of the CNN and the images.
        compile: Compile the forward and the losses with this backend of `torch.compile`.
        check_interval: Steps between looks at the loss, which stop a batch that is lost, and at the rates.

    Raises:
        ValueError: A network without BatchNorm, or settings that do not fit.
    """

    def __init__(
            self,
            model: nn.Module,
            mean: Sequence[float],
            std: Sequence[float],
            resolutions: Sequence[Resolution],
            weights: Optional[LossWeights] = None,
            bn_relative: bool = False,
            diversity: str = 'intra',
            student: Optional[nn.Module] = None,
            student_classes: Optional[Sequence[int]] = None,
            jitter: int = 30,
            flip: bool = True,
            betas: Tuple[float, float] = (0.5, 0.9),
            autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
            channels_last: bool = False,
            compile: Optional[str] = None,
            check_interval: int = 50,
    ) -> None:
        if diversity not in DIVERSITIES:
            raise ValueError(f'Unknown diversity {diversity!r}, expected one of {", ".join(DIVERSITIES)}.')
        if (diversity == 'adi') != (student is not None):
            raise ValueError("Diversity 'adi' needs a student to compete with, and the others have none.")
        device = next(model.parameters()).device
        self.model = model.eval().requires_grad_(False)
        self.student = None if student is None else spectator(student, mean, std)
        self.resolutions = list(resolutions)
        self.size = max(resolution.size for resolution in resolutions)
        self.weights = weights or LossWeights()
        self.diversity = diversity
        self.jitter = jitter
        self.flip = flip
        self.betas = betas
        self.autocast = autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.check_interval = check_interval
        self.device = device
        self.student_classes = None
        if student_classes is not None:
            self.student_classes = torch.tensor(student_classes, device=device)
        self.in_chans = len(mean)
        low, high = ((value - torch.tensor(mean)) / torch.tensor(std) for value in (0., 1.))
        self.low, self.high = (bound.float().view(1, -1, 1, 1).to(self.device) for bound in (low, high))
        self.model.to(memory_format=self.memory_format)
        self._stats = BatchNormStats(self.model, relative=bn_relative, first_weight=self.weights.first_bn)
        self._features: List[torch.Tensor] = []
        self._handles = []
        if diversity == 'intra':
            classifier: Any = model.get_classifier()  # type: ignore[operator]
            classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # of a distilled CNN
            self._handles.append(classifier.register_forward_pre_hook(self._keep_features))
        # one graph per size, so that a batch does not depend on those before
        self._losses = torch.compile(self.losses, backend=compile, dynamic=False) if compile else self.losses

    def close(self) -> None:
        """Take the hooks off the CNN."""
        self._stats.close()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> 'Inverter':
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _keep_features(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._features.append(args[0].flatten(1))

    def check_sizes(self) -> None:
        """Try every resolution.

        Raises:
            ValueError: One that the CNN does not take; or the CNN keeps its features to itself.
        """
        for resolution in self.resolutions:
            images = torch.zeros(1, self.in_chans, resolution.size, resolution.size, device=self.device)
            try:
                self.model(images.to(memory_format=self.memory_format))
            except (RuntimeError, AssertionError) as e:
                raise ValueError(
                    f'The CNN does not take images of {resolution.size} pixels ({first_line(e)}). Choose other'
                    ' sizes with --resolutions SIZE:STEPS:LR.') from e
            if self._handles and not self._features:
                raise ValueError(
                    f'{type(self.model).__name__} does not call the classifier that it names, whose input the'
                    ' intra-divergence loss compares. Choose another CNN, or --diversity none.')
            self._features.clear()
            self._stats.clear()

    def losses(self, images: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Eq. 8 and its terms, unweighted, for images (B, C, H, W) as the CNN sees them and targets (B,)."""
        weights = self.weights
        with self.autocast():
            logits = self.model(images)
            student_logits = self._compete(images)
        terms = dict(
            ce=F.cross_entropy(logits.float(), targets),
            bn=self._stats.loss(),
            tv=total_variation(images),
            l2=l2_prior(images),
        )
        loss = terms['ce'] + weights.bn * terms['bn'] + weights.tv * terms['tv'] + weights.l2 * terms['l2']
        if self.diversity == 'intra':
            features = self._features.pop()
            terms['diversity'] = intra_divergence_loss(features, targets, weights.ep, weights.triplet, weights.margin)
            loss = loss + terms['diversity']
        if student_logits is not None:
            if self.student_classes is not None:
                logits = logits.index_select(1, self.student_classes)
            terms['diversity'] = competition_loss(logits, student_logits, weights.adi_temperature)
            loss = loss + weights.adi * terms['diversity']
        return dict(loss=loss, **terms)

    def _compete(self, images: torch.Tensor) -> Optional[torch.Tensor]:
        """The student's logits, with gradients, for images normalised for the CNN."""
        return self.student.model(self.student.prepare_input(images)) if self.student is not None else None

    def run(
            self,
            targets: torch.Tensor,
            seed: int,
            on_check: Optional[Callable[[int, Dict[str, float]], None]] = None,
    ) -> Optional[torch.Tensor]:
        """Make a batch of images.

        Args:
            targets: Classes (B,).
            seed: Of the noise that the images start from, the shifts and the flips. The same gives the same images.
            on_check: Called with the number of the step and the losses at every check and at the end.

        Returns:
            Normalised images (B, C, size, size); None if the loss was not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (len(targets), self.in_chans, self.size, self.size)
        images = torch.randn(shape, generator=generator).to(self.device, memory_format=self.memory_format)
        images.requires_grad_()
        targets = targets.to(self.device)
        step = 0
        for resolution in self.resolutions:
            optimizer = torch.optim.Adam([images], lr=resolution.lr, betas=self.betas)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, resolution.steps))
            for i in range(resolution.steps):
                losses = self._losses(self._view(images, resolution.size, generator), targets)
                images.grad, = torch.autograd.grad(losses['loss'], images)
                optimizer.step()
                scheduler.step()
                with torch.no_grad():
                    torch.clamp(images, self.low, self.high, out=images)
                step += 1
                if step % self.check_interval == 0 or i + 1 == resolution.steps:
                    values = dict(zip(losses, torch.stack([v.detach().float() for v in losses.values()]).tolist()))
                    if on_check is not None:
                        on_check(step, values)
                    if not torch.isfinite(torch.tensor(values['loss'])):
                        return None
        return images.detach()

    def _view(self, images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        """The images as the CNN sees them in a step: pooled, shifted, mirrored."""
        if size != self.size:
            images = F.interpolate(images, size=(size, size), mode='area')
        limit = self.jitter * size // self.size
        dy, dx, mirrored = (
            *torch.randint(-limit, limit + 1, (2,), generator=generator).tolist(),
            torch.rand((), generator=generator).item() < 0.5,
        )
        images = torch.roll(images, shifts=(dy, dx), dims=(2, 3))
        return images.flip(3) if self.flip and mirrored else images
