"""The sets of images."""
import gzip

import numpy as np
import pytest
from PIL import Image

from reproduction.fashion_mnist import write_fashion_mnist


def test_sets_of_images(tmp_path):
    """What is set aside is no training image of the tuning set, and all come from the training file."""
    source, rng = tmp_path / 'source', np.random.default_rng(0)
    source.mkdir()
    pixels = {}
    for name, count in (('train', 6000), ('t10k', 20)):
        labels = np.arange(count) % 10
        pixels[name] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, array in (('images-idx3', pixels[name]), ('labels-idx1', labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes()
            (source / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(header + array.tobytes(), 1))
    write_fashion_mnist(tmp_path / 'out', source)
    files = {part: {(p.parent.name, p.name) for p in (tmp_path / 'out' / part).rglob('*.png')}
             for part in ('train', 'validation', 'tuning/train', 'tuning/validation')}
    assert [len(files[part]) for part in files] == [6000, 20, 1000, 5000]
    assert not files['tuning/train'] & files['tuning/validation']
    assert files['tuning/train'] | files['tuning/validation'] == files['train']
    image = np.asarray(Image.open(tmp_path / 'out' / 'validation' / '7' / '00017.png'))
    np.testing.assert_array_equal(image, pixels['t10k'][17])
    with pytest.raises(FileNotFoundError, match='Give the folder'):
        write_fashion_mnist(tmp_path / 'other', tmp_path)
    packed = source / 't10k-images-idx3-ubyte.gz'
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(OSError, match='is damaged'):
        write_fashion_mnist(tmp_path / 'other', source)
    assert {path.name for path in tmp_path.iterdir()} == {'out', 'source'}
