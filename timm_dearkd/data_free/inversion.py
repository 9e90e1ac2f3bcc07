"""Optimisation of images for a CNN (section 4, Eq. 8, based on DeepInversion)."""
import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import get_model_input_config

from distill_hooks import Teacher
from distill_hooks.errors import first_line

from .losses import BatchNormStats, competition_loss, intra_divergence_loss, l2_prior, total_variation

DIVERSITIES = ('none', 'adi', 'intra')
BN_NORMS = ('absolute', 'relative', 'averaged')
SCALES = ('tv', 'l2', 'bn', 'ep', 'triplet', 'adi')  # the factors in `LossWeights`
OnCheck = Callable[[int, Dict[str, float]], None]


class Resolution(NamedTuple):
    """Phase of the optimisation: side length in pixels, steps and learning rate."""
    size: int
    steps: int
    lr: float


@dataclass(frozen=True)
class LossWeights:
    """Weights and settings of the losses.

    `tv`, `l2`, `bn`, `ep` and `triplet` are the paper's, the others are ours. `adi` is for small images; the code of
    DeepInversion takes 0.2 for ImageNet's 224 pixels. `bn_norm` is one of `BN_NORMS`.
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
    bn_norm: str = 'absolute'
    smoothing: float = 0.
    normalized_latent: bool = False


@dataclass(frozen=True)
class Competitor:
    """Network that the CNN competes with ('adi').

    Args:
        model: The network. A ViT sees the images at its own size.
        classes: The CNN's class for each class of the network; None if they are the same.
    """
    model: nn.Module
    classes: Optional[Sequence[int]] = None


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the images in each step.

    Args:
        jitter: Largest shift in pixels, at the full size.
        flip: Mirror the batch in half of the steps.
    """
    jitter: int = 30
    flip: bool = True


@dataclass(frozen=True)
class Execution:
    """Precision, memory format and compilation of the CNN.

    Args:
        autocast: Returns the context of its forward.
        channels_last: Memory format of the CNN and the images.
        backend: Backend of `torch.compile` for the forward and the losses; None runs them eagerly.
    """
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    channels_last: bool = False
    backend: Optional[str] = None


def batch_targets(
        num_batches: int,
        classes: Sequence[int],
        classes_per_batch: int = 6,
        images_per_class: int = 7,
        seed: int = 0,
) -> List[torch.Tensor]:
    """Draw the classes of the images in each batch.

    The classes are shuffled again each time all have been used, so that they come equally often (our choice; the paper
    draws them independently). The first batches do not depend on the number of batches.

    Args:
        num_batches: Number of batches.
        classes: Class indices to choose from.
        classes_per_batch: Different classes in a batch; all classes if there are fewer.
        images_per_class: Images of each class in a batch.
        seed: Random seed of the order.

    Returns:
        Targets (classes_per_batch * images_per_class,) of each batch.
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


def wrap_network(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """Wrap a network so that it takes images with a CNN's normalisation.

    A ViT sees the images at its own size.
    """
    size = get_model_input_config(model)['input_size'][1:] if hasattr(model, 'patch_embed') else None
    device = next(model.parameters()).device
    return Teacher(model, in_chans=len(mean), mean=mean, std=std, img_size=size).to(device)


class Inverter:
    """Makes images of given classes from a classifier with BatchNorm.

    The paper does not name the shifts, the flips, Adam's betas and the range of the pixels. They are DeepInversion's.

    Args:
        model: The CNN, which takes normalised images. It is frozen in place.
        mean: Normalisation of the CNN. Pixels are clipped to the range that it maps 0 to 1 to.
        std: See `mean`.
        resolutions: Phases. The images have the largest size, and are average-pooled for the others.
        weights: Weights and settings of the losses.
        diversity: 'none' (DeepInversion), 'adi' (its competition with a student) or 'intra' (the paper's loss).
        competitor: The student of 'adi'.
        augmentation: Random changes in each step.
        betas: Adam's betas.
        execution: Precision, memory format and compilation.
        check_interval: Steps between checks of the loss. A loss that is not finite stops the batch.

    Raises:
        ValueError: If the network has no BatchNorm, or 'adi' and `competitor` do not come together.
    """

    def __init__(
            self,
            model: nn.Module,
            mean: Sequence[float],
            std: Sequence[float],
            resolutions: Sequence[Resolution],
            weights: Optional[LossWeights] = None,
            diversity: str = 'intra',
            competitor: Optional[Competitor] = None,
            augmentation: Optional[Augmentation] = None,
            betas: Tuple[float, float] = (0.5, 0.9),
            execution: Optional[Execution] = None,
            check_interval: int = 50,
    ) -> None:
        if diversity not in DIVERSITIES:
            raise ValueError(f'Unknown diversity {diversity!r}, expected one of {", ".join(DIVERSITIES)}.')
        if (diversity == 'adi') != (competitor is not None):
            raise ValueError("Diversity 'adi' needs a student (--student NAME). The others take none.")
        execution = execution or Execution()
        self.device = next(model.parameters()).device
        self.resolutions = list(resolutions)
        self.size = max(resolution.size for resolution in resolutions)
        self.set_weights(weights or LossWeights())
        self.diversity = diversity
        self.augmentation = augmentation or Augmentation()
        self.betas = betas
        self.autocast = execution.autocast
        self.memory_format = torch.channels_last if execution.channels_last else torch.contiguous_format
        self.check_interval = check_interval
        self.in_chans = len(mean)
        low, high = ((value - torch.tensor(mean)) / torch.tensor(std) for value in (0., 1.))
        self.low, self.high = (bound.float().view(1, -1, 1, 1).to(self.device) for bound in (low, high))
        self.model = model.eval().requires_grad_(False).to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.student = None if competitor is None else wrap_network(competitor.model, mean, std)
        self.student_classes = None
        if competitor is not None and competitor.classes is not None:
            self.student_classes = torch.tensor(competitor.classes, device=self.device)
        self._stats = BatchNormStats(
            self.model, self.weights.bn_norm != 'absolute', self.weights.first_bn, self.weights.bn_norm == 'averaged')
        self._features: List[torch.Tensor] = []
        self._handles = []
        if diversity == 'intra':
            classifier: Any = model.get_classifier()  # type: ignore[operator]
            classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # of a distilled CNN
            self._handles.append(classifier.register_forward_pre_hook(self._keep_features))
        self._losses = self.losses
        if execution.backend:  # a graph per size, so that a batch does not depend on those before
            self._losses = torch.compile(self.losses, backend=execution.backend, dynamic=False)

    def set_weights(self, weights: LossWeights) -> None:
        """Set the weights of the losses."""
        self.weights = weights
        # Tensors: a compiled function is compiled again for each value of a number
        self._scales = {name: torch.tensor(getattr(weights, name), device=self.device) for name in SCALES}

    def close(self) -> None:
        """Remove the hooks from the CNN."""
        self._stats.close()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> 'Inverter':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _keep_features(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._features.append(args[0].flatten(1))

    def check_sizes(self) -> None:
        """Run the CNN and the competitor once at every resolution.

        Raises:
            ValueError: If one of them does not take a size, or the CNN does not call its classifier.
        """
        for resolution in self.resolutions:
            images = torch.zeros(1, self.in_chans, resolution.size, resolution.size, device=self.device)
            try:
                self.model(images.to(memory_format=self.memory_format))
            except (RuntimeError, AssertionError) as e:
                raise ValueError(
                    f'The CNN does not take images of {resolution.size} pixels ({first_line(e)}). Set other sizes with'
                    ' --resolutions SIZE:STEPS:LR.') from e
            try:
                self._compete(images)
            except (RuntimeError, AssertionError) as e:
                raise ValueError(
                    f'--student does not take images of {resolution.size} pixels ({first_line(e)}). Choose another one.'
                ) from e
            if self._handles and not self._features:
                raise ValueError(
                    f'{type(self.model).__name__} does not call its classifier (get_classifier()), whose input the'
                    ' intra-divergence loss compares. Choose another CNN, or --diversity none.')
            self._features.clear()
            self._stats.clear()

    def losses(self, images: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the loss of Eq. 8 and its terms. They are unweighted, except the diversity of 'intra'.

        Args:
            images: Normalised images (B, C, H, W).
            targets: Classes (B,).
        """
        weights, scales = self.weights, self._scales
        with self.autocast():
            logits = self.model(images)
            student_logits = self._compete(images)
        terms = dict(
            ce=F.cross_entropy(logits.float(), targets, label_smoothing=weights.smoothing),
            bn=self._stats.loss(),
            tv=total_variation(images),
            l2=l2_prior(images),
        )
        loss = terms['ce']
        for name in ('bn', 'tv', 'l2'):
            loss = loss + scales[name] * terms[name]
        if self.diversity == 'intra':
            features = self._features.pop()
            if weights.normalized_latent:
                features = F.normalize(features.float(), dim=1)
            terms['diversity'] = intra_divergence_loss(
                features, targets, scales['ep'], scales['triplet'], weights.margin)
            loss = loss + terms['diversity']
        if student_logits is not None:
            if self.student_classes is not None:
                logits = logits.index_select(1, self.student_classes)
            terms['diversity'] = competition_loss(logits, student_logits, weights.adi_temperature)
            loss = loss + scales['adi'] * terms['diversity']
        return dict(loss=loss, **terms)

    def _compete(self, images: torch.Tensor) -> Optional[torch.Tensor]:
        """Return the student's logits, with gradients, for images normalised for the CNN."""
        return self.student.model(self.student.prepare_input(images)) if self.student is not None else None

    def run(
            self,
            targets: torch.Tensor,
            seed: int,
            on_check: Optional[OnCheck] = None,
    ) -> Optional[torch.Tensor]:
        """Make a batch of images.

        Args:
            targets: Classes (B,).
            seed: Random seed of the initial noise, the shifts and the flips. Equal seeds give equal images.
            on_check: Called at every check and after every phase, with the number of steps so far and the losses.

        Returns:
            Normalised images (B, C, size, size), or None if the loss was not finite.
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
                losses = self.step(images, targets, optimizer, resolution.size, generator)
                scheduler.step()
                step += 1
                is_last = i + 1 == resolution.steps
                if (is_last or step % self.check_interval == 0) and not self._check(step, losses, on_check):
                    return None
        return images.detach()

    def step(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            optimizer: torch.optim.Optimizer,
            size: int,
            generator: torch.Generator,
    ) -> Dict[str, torch.Tensor]:
        """Change the images in place by one step, and return its losses.

        Args:
            images: Normalised images (B, C, H, W), a leaf that takes gradients.
            targets: Classes (B,).
            optimizer: Optimizer of the images.
            size: Side length in pixels that the CNN sees.
            generator: Draws the shift and the flip.
        """
        losses = self._losses(self._view(images, size, generator), targets)
        images.grad, = torch.autograd.grad(losses['loss'], images)
        optimizer.step()
        with torch.no_grad():
            torch.clamp(images, self.low, self.high, out=images)
        return losses

    @staticmethod
    def _check(step: int, losses: Dict[str, torch.Tensor], on_check: Optional[OnCheck]) -> bool:
        """Pass the losses to `on_check`. Return whether their sum is finite."""
        values = dict(zip(losses, torch.stack([v.detach().float() for v in losses.values()]).tolist()))
        if on_check is not None:
            on_check(step, values)
        return math.isfinite(values['loss'])

    def _view(self, images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        """Pool, shift and mirror the images for a step."""
        if size != self.size:
            images = F.interpolate(images, size=(size, size), mode='area')
        limit = self.augmentation.jitter * size // self.size
        dy, dx, mirrored = (
            *torch.randint(-limit, limit + 1, (2,), generator=generator).tolist(),
            torch.rand((), generator=generator).item() < 0.5,
        )
        images = torch.roll(images, shifts=(dy, dx), dims=(2, 3))
        return images.flip(3) if self.augmentation.flip and mirrored else images
