"""The picture of synthetic images beside real ones."""
import numpy as np
import pytest
from conftest import run_python
from PIL import Image


@pytest.fixture()
def output(tmp_path):
    """Sets of images whose grey value tells the set, the class and the number."""
    for i, name in enumerate(('small/images-none-seed1', 'small/images-generator-seed1', 'data/fashion_mnist')):
        for label in range(10):
            folder = tmp_path / name / 'train' / str(label)
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new('L', (28, 28), 60 * i + 5 * label + number).save(folder / f'{number}.png')
    return tmp_path


def test_sets_are_side_by_side_in_rows_of_classes(output):
    assert run_python('reproduction/pictures.py', '--output', output, '--picture', output / 'a.png').returncode == 0
    pixels = np.asarray(Image.open(output / 'a.png').convert('L'))
    assert pixels[:20, :90].min() == 255 and pixels[:20, 90:].min() < 128  # headings
    found = pixels[20 + 15::34, 90 + 15::34].astype(int)
    gap = [255]
    assert found.tolist() == [
        [*range(start, start + 4), *gap, *range(start + 60, start + 64), *gap, *range(start + 120, start + 124)]
        for start in range(0, 50, 5)]


def test_too_few_images(output):
    (output / 'small' / 'images-generator-seed1' / 'train' / '3' / '0.png').unlink()
    (output / 'small' / 'images-generator-seed1' / 'train' / '3' / '1.png').unlink()
    result = run_python('reproduction/pictures.py', '--output', output, '--picture', output / 'a.png')
    assert result.returncode == 2 and 'fewer than 4 images of class 3. Run table5 first.' in result.stderr
    assert not (output / 'a.png').exists()
