"""Geometric augmentation against torch's `grid_sample`, and its borders."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from timm_dearkd.engine import augmentation
from timm_dearkd.engine.augmentation import FILLS, AffineJitter


def draw(monkeypatch, *numbers):
    """Take these numbers instead of random ones: angle, shear, two zooms, two shifts, gamma."""
    values = iter(numbers)
    monkeypatch.setattr(augmentation, '_uniform', lambda limit: next(values))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_no_change_is_no_change(mode, monkeypatch):
    draw(monkeypatch, *[0.] * 7)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, len(mode)), dtype=np.uint8).squeeze()
    result = AffineJitter()(Image.fromarray(pixels, mode))
    assert result.mode == mode and np.array_equal(np.asarray(result), pixels)


@pytest.mark.parametrize('fill,padding', [('black', 'zeros'), ('edge', 'border')])
def test_the_map_is_that_of_grid_sample(fill, padding, monkeypatch):
    """torch's grid has places from -1 to 1 on both axes."""
    width, height = 50, 30
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray((120 + 60 * np.sin(x / 5.) + 60 * np.cos(y / 4.)).astype(np.uint8))
    angle, shear, zoom, shift = 10., -7., (0.3, -0.2), (0.05, -0.1)
    draw(monkeypatch, *[angle, shear, *zoom, *shift, 0.] * 2)
    a, s = math.radians(angle), math.tan(math.radians(shear))
    matrix = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ [[1, s], [0, 1]] @ np.diag(
        np.exp(zoom))
    sides = np.array([width, height])
    matrix = matrix * sides / sides[:, None]
    grid = F.affine_grid(
        torch.tensor(np.c_[matrix, 2 * np.array(shift)])[None], [1, 1, height, width], align_corners=False)
    pixels = torch.tensor(np.asarray(image), dtype=torch.float64)[None, None]
    expected = F.grid_sample(pixels, grid, padding_mode=padding, align_corners=False)[0, 0].numpy()
    assert (grid.abs() > 1).any()  # some of the border is seen
    difference = np.abs(np.asarray(AffineJitter(fill)(image), float) - expected)
    if fill == 'black':  # Pillow does not blend the border with the fill
        difference = difference[np.asarray(AffineJitter(fill)(Image.new('L', (width, height), 255))) == 255]
        assert 500 < len(difference) < width * height and np.quantile(difference, 0.9) < 1.5
    else:
        assert difference.max() < 1.5


def test_the_largest_maps_stay_within_the_padding():
    """With the largest changes, of any signs, every pixel of an image of one colour has this colour."""
    image = Image.new('RGB', (10, 40), (200, 100, 50))
    for signs in np.ndindex(*[2] * 6):
        numbers = iter([*((1, -1)[sign] for sign in signs), 0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(augmentation, '_uniform', lambda limit, numbers=numbers: limit * next(numbers))
            pixels = np.asarray(AffineJitter('edge')(image))
        assert (pixels == [200, 100, 50]).all(), signs


@pytest.mark.parametrize('fill', FILLS)
def test_the_border(fill, monkeypatch):
    """Of an image that is zoomed out to half of its side."""
    draw(monkeypatch, 0., 0., math.log(2), math.log(2), 0., 0., 0.)
    image = Image.new('RGB', (16, 16), (200, 100, 50))
    pixels = np.asarray(AffineJitter(fill, (0.2, 0.4, 0.6))(image))
    assert pixels[8, 8].tolist() == [200, 100, 50]
    assert pixels[0, 0].tolist() == dict(edge=[200, 100, 50], black=[0, 0, 0], mean=[51, 102, 153])[fill]


def test_it_depends_on_torchs_generator_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(np.asarray(AffineJitter()(image)).tobytes())
    assert results[0] == results[1] != results[2]
