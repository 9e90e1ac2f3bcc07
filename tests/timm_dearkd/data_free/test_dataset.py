"""What is written of synthetic images, and read back."""
import numpy as np
import pytest
from PIL import Image

from timm_dearkd.data_free.dataset import FORMATS, SyntheticSet


@pytest.mark.parametrize('data_format', FORMATS)
def test_samples_are_the_first_images_of_the_first_classes(data_format, tmp_path, monkeypatch):
    """Whatever order the classes come in, and with no more images in memory than are shown."""
    classes = {index: f'class {index}' for index in range(6)}
    dataset = SyntheticSet(str(tmp_path), classes, {}, data_format)
    order, kept = [5, 3, 4, 1, 2, 1, 3, 1, 0, 1], {}
    for batch, target in enumerate(order):
        images = [Image.fromarray(np.full((4, 4), 20 * batch + i, np.uint8)) for i in range(2)]
        records = [dict(target=target, teacher_prob=1., kept=target != 2 and i == 0) for i in range(2)]
        dataset.write(batch, images, records)
        if target != 2:
            kept.setdefault(target, []).append(20 * batch)
        found = dataset.samples(rows=3, columns=2)
        shown = {classes[index]: kept[index][:2] for index in sorted(kept)[:3]}
        assert {name: [np.asarray(image)[0, 0] for image in images] for name, images in found.items()} == shown
        assert list(found) == list(shown) and sum(map(len, dataset._samples.values())) <= 6


def test_an_image_that_was_taken_out(tmp_path):
    """By hand, for it was poor: it is not shown, and a class that has no other has no place in the class map."""
    dataset = SyntheticSet(str(tmp_path), {0: 'a', 1: 'b', 2: 'c'}, {})
    dataset.start()
    for batch in range(3):
        image = Image.fromarray(np.full((4, 4), batch, np.uint8))
        dataset.write(batch, [image], [dict(target=batch, teacher_prob=1., kept=True)])
    assert dataset.finish()[1] == [0, 1, 2]
    (tmp_path / 'train' / 'b' / '000001-00.png').unlink()
    again = SyntheticSet(str(tmp_path), {0: 'a', 1: 'b', 2: 'c'}, {}, resume=True)
    assert list(again.samples()) == ['a', 'c']
    counts, class_map = again.finish()
    assert counts['kept'] == 2 and class_map == [0, 2]
