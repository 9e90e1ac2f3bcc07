"""Generator of images that a CNN recognises; far cheaper per image than `Inverter` (ours, after FastDFKD)."""
import logging
import math
from dataclasses import replace
from typing import Collection, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_dearkd.engine.seeding import seeded

from .inversion import Augmentation, Inverter, LossWeights, OnCheck, Resolution

_logger = logging.getLogger(__name__)

# Our choices. `bn` is chosen by `run_pilot`
GENERATOR_WEIGHTS = LossWeights(tv=0., l2=0., bn=10., bn_norm='averaged', smoothing=0.1)
PILOT_WEIGHTS = (10., 5., 2.5, 1., 0.5)
PILOT_SCALES = (1., 0.1, 0.01, 0.001)  # of the diversity loss
PILOT_STEPS = 50
MIN_CORRECT = 0.9  # share of the pilot's images whose class the CNN predicts
CODE = 128  # values of the code of an image; fewer make codes alike
NOISE = 32  # values that make images of one code differ
MIN_WIDTH, MAX_WIDTH = 8, 128  # channels at full size, and in small maps
BATCH_SIZE = 120  # BatchNorm statistics need many images of all classes
PERIODS = 8  # each has new codes and a new first layer, and so new images; this is cheaper than a new generator
MIN_PERIOD = 50  # steps; with fewer than 400 in all, there are fewer periods
WARMUP_PERIODS = 2  # their images have too little structure
MIN_CROP = 0.6  # share of the area


class Generator(nn.Module):
    """Convolutional generator of images, each from a code of its own that is learned, and a little noise.

    The maps are larger than the image, and the middle is kept. The padding at the border of the maps would show as a
    frame.

    Args:
        num_codes: Number of codes.
        in_chans: Channels of the images.
        size: Side length of the images in pixels.
    """

    def __init__(self, num_codes: int, in_chans: int, size: int) -> None:
        super().__init__()
        self.size = size
        depth = max(1, int(math.log2(size / 8))) if size >= 8 else 1
        widths = [min(MAX_WIDTH, MIN_WIDTH * 2 ** i) for i in range(depth, -1, -1)]
        self.grid = math.ceil(size / 2 ** depth) + 1
        self.codes = nn.Parameter(torch.randn(num_codes, CODE))
        self.first = nn.Linear(NOISE + CODE, widths[0] * self.grid ** 2)
        layers: List[nn.Module] = [nn.BatchNorm2d(widths[0])]
        for before, width in zip(widths, widths[1:]):
            layers += [
                nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], in_chans, 3, padding=1), nn.BatchNorm2d(in_chans))

    def reset(self) -> None:
        """Draw the codes and the first layer again."""
        nn.init.normal_(self.codes)
        self.first.reset_parameters()

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Return an image of each code (num_codes, C, H, W), pixels from 0 to 1, for noise (num_codes, NOISE)."""
        x = self.first(torch.cat([noise, self.codes], dim=1))
        x = self.layers(x.unflatten(1, (-1, self.grid, self.grid)))
        margin = (x.shape[-1] - self.size) // 2
        return torch.sigmoid(x[..., margin:margin + self.size, margin:margin + self.size])


def random_views(images: torch.Tensor, flip: bool) -> torch.Tensor:
    """Crop each image at random, resize it back to its size and mirror half of the images. Has gradients.

    Args:
        images: (B, C, H, W).
        flip: Mirror.
    """
    count, device = len(images), images.device
    side = torch.empty(count, device=device).uniform_(MIN_CROP, 1.).sqrt()
    centre = (1 - side) * torch.empty(2, count, device=device).uniform_(-1., 1.)
    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1., 1.) if flip else torch.ones_like(side)
    zero = torch.zeros_like(side)
    maps = torch.stack([side * mirror, zero, centre[0], zero, side, centre[1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode='border', align_corners=False)


class GeneratorInverter(Inverter):
    """Makes images of given classes with a generator that is trained against the CNN.

    Each batch trains a generator of its own, so that batches do not depend on each other. A training step has an image
    of each code. A code belongs to one class. (With an embedding of the class instead of codes, all images of a class
    would be alike, because such a generator ignores the noise.) The codes and the first layer are drawn again for each
    of `PERIODS` periods. The images come from the ends of all but the first ones.

    The arguments are those of `Inverter`. There is one resolution.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if len(self.resolutions) != 1:
            raise ValueError('--generator has one phase. Set one --resolutions SIZE:STEPS:LR.')

    def set_choices(self, weights: LossWeights, mirror: bool) -> None:
        """Set the weights of the losses, and whether the CNN sees mirror images."""
        self.set_weights(weights)
        self.augmentation = Augmentation(self.augmentation.jitter, flip=mirror)

    def run(
            self,
            targets: torch.Tensor,
            seed: int,
            on_check: Optional[OnCheck] = None,
            max_steps: Optional[int] = None,
    ) -> Optional[torch.Tensor]:
        """Train a generator, for at most `max_steps` steps, and make a batch of images with it. See `Inverter.run`."""
        size, steps, lr = self.resolutions[0]
        with seeded(seed, device=self.device):
            return self._run(targets, on_check, Resolution(size, min(steps, max_steps or steps), lr))

    def _run(
            self,
            targets: torch.Tensor,
            on_check: Optional[OnCheck],
            resolution: Resolution,
    ) -> Optional[torch.Tensor]:
        size, steps, lr = resolution
        classes, labels = targets.unique(return_inverse=True)
        num_codes = max(BATCH_SIZE, len(classes))
        code_targets = classes[torch.arange(num_codes) % len(classes)].to(self.device)
        generator = Generator(num_codes, self.in_chans, size).to(self.device)
        images = torch.empty(len(targets), self.in_chans, size, size)
        period = _period(steps)
        ends = _harvest_steps(steps, period)[-len(targets):]
        optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=self.betas)
        for step in range(1, steps + 1):
            losses = self._losses(random_views(self._generate(generator), self.augmentation.flip), code_targets)
            optimizer.zero_grad()
            losses['loss'].backward()
            optimizer.step()
            if (step == steps or step % self.check_interval == 0) and not self._check(step, losses, on_check):
                return None
            if step in ends:
                places = torch.arange(ends.index(step), len(targets), len(ends))
                codes, rounds = _share_codes(labels[places], len(classes), num_codes)
                for number in rounds.unique():
                    chosen = rounds == number
                    with torch.no_grad():
                        images[places[chosen]] = self._generate(generator).cpu()[codes[chosen]]
            if step % period == 0 and step < steps:
                generator.reset()
                optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=self.betas)
        return images

    def _generate(self, generator: Generator) -> torch.Tensor:
        """Return a normalised image of each code."""
        pixels = generator(torch.randn(len(generator.codes), NOISE, device=self.device))
        return self.low + pixels.contiguous(memory_format=self.memory_format) * (self.high - self.low)


def _period(steps: int) -> int:
    """Return the steps of a period. Periods are of about equal length."""
    return math.ceil(steps / max(1, min(PERIODS, steps // MIN_PERIOD)))


def _harvest_steps(steps: int, period: int) -> List[int]:
    """Return the steps after which images are taken: the ends of the periods, but for the first ones."""
    ends = [*range(period, steps, period), steps]
    return ends[min(WARMUP_PERIODS, len(ends) - 1):]


def _share_codes(labels: torch.Tensor, num_classes: int, num_codes: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return a code of its class for each image, in turns, and how often the code was used before.

    Args:
        labels: Classes (B,), from 0.
        num_classes: Number of classes.
        num_codes: Number of codes. Code c is of class c % num_classes.
    """
    before = F.one_hot(labels, num_classes).cumsum(0).gather(1, labels[:, None])[:, 0] - 1  # images of the class
    per_class = (num_codes - 1 - labels) // num_classes + 1
    return labels + num_classes * (before % per_class), before // per_class


class Choice(NamedTuple):
    """Weights of the losses, and whether the CNN sees mirror images."""
    weights: LossWeights
    mirror: bool


def run_pilot(
        inverter: GeneratorInverter,
        targets: torch.Tensor,
        seed: int,
        kept: Collection[str] = (),
        mirror: bool = True,
) -> Choice:
    """Choose the loss weights and the mirroring for a CNN by short trainings, log the choices and set them.

    The BatchNorm weight comes first, without the diversity loss. It is the largest with which the CNN predicts the
    class of `MIN_CORRECT` of the images; if there is none, the one with which it predicts most. The weights of the
    diversity loss then are the largest in the same sense. The images are mirrored if, among the images that the CNN
    classifies correctly, the share of correctly classified mirror images is above (1 + 1/classes) / 2.

    Args:
        inverter: Trains the generators.
        targets: Classes (B,) of the pilot's images.
        seed: Random seed.
        kept: Names in `LossWeights` that stay as they are.
        mirror: Mirror images are allowed.

    Raises:
        ValueError: If the losses of all trainings are not finite.
    """
    first, steps = inverter.weights, min(PILOT_STEPS, inverter.resolutions[0].steps)
    scaled = () if inverter.diversity == 'none' else ('adi',) if inverter.diversity == 'adi' else ('ep', 'triplet')
    off = replace(first, **dict.fromkeys(scaled, 0.))  # type: ignore[arg-type]
    _logger.info(f'Pilot: trains generators for {steps} steps each, to choose weights of losses.')
    chosen, result = _choose(inverter, targets, seed, ('bn',), [off] if 'bn' in kept else [
        replace(off, bn=weight) for weight in PILOT_WEIGHTS])
    if scaled:
        free = [name for name in scaled if name not in kept]
        chosen, result = _choose(inverter, targets, seed, ('bn', *scaled), [
            replace(first, bn=chosen.bn, **{name: getattr(first, name) * scale for name in free})
            for scale in (PILOT_SCALES if free else (1.,))])
    chance = 1 / int(inverter.model.num_classes)  # type: ignore[arg-type]
    mirror = mirror and result.mirrored > (1 + chance) / 2
    inverter.set_choices(chosen, mirror)
    level = logging.INFO if result.correct >= 0.5 else logging.WARNING
    _logger.log(
        level, f'Pilot: {_flags(chosen, ("bn", *scaled))}. The CNN predicts the class of {100 * result.correct:.0f} %'
        f' of the images, and that of the mirror images of {100 * result.mirrored:.0f} % of these. Images are'
        f' {"" if mirror else "not "}mirrored.')
    return Choice(chosen, mirror)


def _flags(weights: LossWeights, names: Sequence[str]) -> str:
    return ', '.join(f'--{name}-weight {getattr(weights, name):g}' for name in names)


class _Result(NamedTuple):
    """Share of images whose class the CNN predicts, and share of these where it does so for the mirror image."""
    correct: float
    mirrored: float


def _choose(
        inverter: GeneratorInverter,
        targets: torch.Tensor,
        seed: int,
        names: Sequence[str],
        candidates: Sequence[LossWeights],
) -> Tuple[LossWeights, _Result]:
    """Return the first weights with which the CNN predicts the class of `MIN_CORRECT` of the images, else the best.

    Args:
        inverter: Trains the generators.
        targets: Classes (B,) of the images.
        seed: Random seed.
        names: Weights to log.
        candidates: Weights to try.
    """
    results: Dict[LossWeights, _Result] = {}
    for weights in candidates:
        inverter.set_choices(weights, mirror=False)
        images = inverter.run(targets, seed, max_steps=PILOT_STEPS)
        if images is None:
            _logger.info(f'Pilot: {_flags(weights, names)}: the loss is not finite.')
            continue
        with torch.no_grad():
            right, mirrored = (torch.cat([
                inverter.model(chunk.to(inverter.device)).argmax(1).cpu() for chunk in x.split(BATCH_SIZE)]) == targets
                for x in (images, images.flip(3)))
        results[weights] = _Result(
            right.float().mean().item(), (right & mirrored).sum().item() / max(1, right.sum().item()))
        _logger.info(
            f'Pilot: {_flags(weights, names)}: the CNN predicts the class of {100 * results[weights].correct:.0f} % of'
            ' the images.')
        if results[weights].correct >= MIN_CORRECT:
            return weights, results[weights]
    if not results:
        raise ValueError('The losses of the pilot are not finite. Choose other weights, or another CNN.')
    best = max(results, key=lambda weights: results[weights].correct)
    return best, results[best]
