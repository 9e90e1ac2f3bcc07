"""Geometric augmentation of synthetic images."""
import math
from typing import Sequence, Tuple

import numpy as np
import torch
from PIL import Image

FILLS = ('edge', 'black', 'mean')
# Largest changes, our choices: log zoom per axis, angles in degrees, shift as a share of the side, log gamma
ZOOM, ANGLE, SHIFT, GAMMA = 0.5, 14., 0.125, 0.4


class AffineJitter:
    """Random zoom, rotation, shear, shift and gamma of a PIL image.

    Zooms in and out, and differently per axis. torchvision's `RandomAffine` has one zoom for both axes and no fill with
    edge pixels.

    Args:
        fill: Pixels outside the image: 'edge' (the nearest pixel of the image), 'black' (0) or 'mean'.
        mean: Mean per channel of pixels from 0 to 1, for 'mean'.
    """

    def __init__(self, fill: str = 'edge', mean: Sequence[float] = (0.,)) -> None:
        self.fill = fill
        self.mean = tuple(round(255 * value) for value in mean)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(fill={self.fill!r})'

    def __call__(self, image: Image.Image) -> Image.Image:
        matrix, offset = self._draw_map(*image.size)
        size, outside = image.size, self.mean if self.fill == 'mean' else (0,) * len(image.getbands())
        if self.fill == 'edge':  # take the part of the image that the map reaches, with its border repeated
            corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size]) @ matrix.T + offset
            first, last = np.floor(corners.min(axis=0)).astype(int) - 1, np.ceil(corners.max(axis=0)).astype(int) + 1
            x, y = (np.arange(a, b + 1).clip(0, side - 1) for a, b, side in zip(first, last, size))
            image, offset = Image.fromarray(np.asarray(image)[y[:, None], x]), offset - first
        coefficients = *matrix[0], offset[0], *matrix[1], offset[1]
        bands = [  # one by one, because Pillow multiplies colours by alpha
            band.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)
            for band, fill in zip(image.split(), outside)]
        moved = Image.merge(image.mode, bands)
        gamma = math.exp(_uniform(GAMMA))
        table = (np.linspace(0, 1, 256) ** gamma * 255).round().astype(np.uint8)
        return Image.fromarray(table[np.asarray(moved)])

    @staticmethod
    def _draw_map(width: int, height: int) -> Tuple[np.ndarray, np.ndarray]:
        """Draw the map from places in the result to places in the image, in pixels: a matrix (2, 2) and an offset."""
        angle, shear = (math.radians(_uniform(ANGLE)) for _ in range(2))
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        slant = np.array([[1., math.tan(shear)], [0., 1.]])
        zoom = np.diag([math.exp(_uniform(ZOOM)) for _ in range(2)])
        matrix = rotation @ slant @ zoom
        centre = np.array([width, height]) / 2
        shift = np.array([_uniform(SHIFT) for _ in range(2)]) * (width, height)
        return matrix, centre + shift - matrix @ centre


def _uniform(limit: float) -> float:
    """Draw a number from -limit to limit."""
    return torch.empty(()).uniform_(-limit, limit).item()
