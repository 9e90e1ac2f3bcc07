"""Geometric augmentation of synthetic images."""
import math
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

__all__ = ['FILLS', 'AffineJitter', 'add_affine']

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
        self.mean = torch.tensor(mean).view(-1, 1, 1)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(fill={self.fill!r})'

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = pil_to_tensor(image).float() / 255
        outside = self.mean if self.fill == 'mean' else 0.
        height, width = pixels.shape[1:]
        grid = F.affine_grid(self._draw_map(height, width), [1, 1, height, width], align_corners=False)
        mode = 'border' if self.fill == 'edge' else 'zeros'
        moved = F.grid_sample((pixels - outside)[None], grid, padding_mode=mode, align_corners=False)[0] + outside
        gamma = math.exp(_uniform(GAMMA))
        return to_pil_image((moved.clamp(0, 1) ** gamma * 255).round().to(torch.uint8), image.mode)

    @staticmethod
    def _draw_map(height: int, width: int) -> torch.Tensor:
        """Draw the map from places in the result to places in the image, in half sides (1, 2, 3)."""
        angle, shear = (math.radians(_uniform(ANGLE)) for _ in range(2))
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        slant = torch.tensor([[1., math.tan(shear)], [0., 1.]])
        zoom = torch.tensor([math.exp(_uniform(ZOOM)) for _ in range(2)])
        pixels = torch.tensor([width, height], dtype=torch.float)
        matrix = rotation @ slant @ torch.diag(zoom) * pixels / pixels[:, None]
        shift = torch.tensor([2 * _uniform(SHIFT) for _ in range(2)])
        return torch.cat([matrix, shift[:, None]], dim=1)[None]


def _uniform(limit: float) -> float:
    """Draw a number from -limit to limit."""
    return torch.empty(()).uniform_(-limit, limit).item()


def add_affine(transform: Any, affine: AffineJitter) -> Any:
    """Return a transform of timm's `create_transform` that begins with an `AffineJitter`."""
    if isinstance(transform, tuple):  # the three of --aug-splits
        return (Compose([affine, transform[0]]), *transform[1:])
    return Compose([affine, transform])
