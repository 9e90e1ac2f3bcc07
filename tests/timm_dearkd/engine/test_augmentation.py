"""Geometric augmentation against Pillow's own transform, and its borders."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_dearkd.engine import augmentation
from timm_dearkd.engine.augmentation import FILLS, AffineJitter, add_affine


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


def test_the_map_is_pillows(monkeypatch):
    """Pillow takes the matrix from places in the result to places in the image, in pixels from the corner."""
    width, height = 50, 30
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray((120 + 60 * np.sin(x / 5.) + 60 * np.cos(y / 4.)).astype(np.uint8))
    angle, shear, zoom, shift = 10., -7., (0.3, -0.2), (0.05, -0.1)
    draw(monkeypatch, angle, shear, *zoom, *shift, 0.)
    a, s = math.radians(angle), math.tan(math.radians(shear))
    matrix = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ [[1, s], [0, 1]] @ np.diag(
        np.exp(zoom))
    centre = np.array([width, height]) / 2
    offset = centre + np.array(shift) * [width, height] - matrix @ centre
    expected = image.transform(
        image.size, Image.Transform.AFFINE, (*matrix[0], offset[0], *matrix[1], offset[1]), Image.Resampling.BILINEAR)
    inside = image.point(lambda _: 255).transform(
        image.size, Image.Transform.AFFINE, (*matrix[0], offset[0], *matrix[1], offset[1]))
    result = AffineJitter('black')(image)
    difference = np.abs(np.asarray(result, float) - np.asarray(expected, float))[2:-2, 2:-2]
    assert np.asarray(inside).mean() < 254  # some of the border is seen
    assert np.quantile(difference, 0.9) < 2 and difference.mean() < 2


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


@pytest.mark.parametrize('separate', [False, True])
def test_it_comes_first(separate, monkeypatch):
    draw(monkeypatch, 0., 0., math.log(2), math.log(2), 0., 0., 0.)
    transform = create_transform(
        (3, 8, 8), is_training=True, use_prefetcher=True, separate=separate, scale=(1., 1.), ratio=(1., 1.), hflip=0.,
        color_jitter=0.)
    result = Image.new('RGB', (16, 16), (200, 100, 50))
    parts = add_affine(transform, AffineJitter('black'))
    for part in parts if separate else [parts]:
        result = part(result)
    assert result[:, 4, 4].tolist() == [200, 100, 50] and result[:, 0, 0].tolist() == [0, 0, 0]
