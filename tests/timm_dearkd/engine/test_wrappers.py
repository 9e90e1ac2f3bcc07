"""Data sets that skip images, convert them, or take a share of them."""
import io
import json
import logging
import re
import shutil
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData

from timm_dearkd.engine.data import (
    class_names,
    classes_of,
    open_dataset,
    open_with_classes,
)
from timm_dearkd.engine.loader import create_train_loader
from timm_dearkd.engine.wrappers import ClassFraction, SkipUnreadable, set_image_mode

CPU = torch.device('cpu')


def test_unreadable_images_are_named_once_and_replaced(image_folder, tmp_path, caplog):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    for name, content in (('a.png', b'nothing'), ('0.png', (root / 'train' / 'grass' / '0.png').read_bytes()[:200])):
        (root / 'train' / 'grass' / name).write_bytes(content)
    dataset = open_dataset('', str(root), 'train')
    for _ in range(2):
        assert [label for _, label in dataset] == [0] * 16 + [1] * 16 + [2] * 17  # after a.png comes the next class
    messages = [r.message for r in caplog.records if r.name == 'timm_dearkd.engine.wrappers']
    assert len(messages) == 2 and 'a.png' in ''.join(messages) and '0.png' in ''.join(messages)
    dataset = open_dataset('', str(root), 'train')
    for path in (root / 'train').glob('*/*.png'):
        path.write_bytes(b'nothing')
    with pytest.raises(OSError, match='10 images in a row cannot be read'):
        dataset[0]
    with pytest.raises(ValueError, match=r'No image of a class can be read: .*, and 8 of 16 were tried'):
        open_dataset('', str(root), 'train')


def test_unreadable_images_are_named_once_by_all_workers(image_folder, tmp_path, capfd):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    dataset = SkipUnreadable(ClassFraction(open_dataset('', str(root), 'train').dataset, 0.5, keep_length=True))
    for path in (root / 'train' / 'grass').iterdir():
        path.write_bytes(b'nothing')
    dataset.transform = np.asarray
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger('timm_dearkd').addHandler(handler)
    try:
        for _ in range(3):  # in new workers each
            assert len(list(DataLoader(dataset, batch_size=48, num_workers=2))) == 1
    finally:
        logging.getLogger('timm_dearkd').removeHandler(handler)
    named = re.findall(r'grass/\d+.png', capfd.readouterr().err)
    assert len(named) == len(set(named)) == 8


def test_fractions_are_balanced_nested_and_always_the_same(image_folder):
    def kept(fraction, **kwargs):
        dataset = open_dataset('', str(image_folder), 'train')
        return ClassFraction(dataset, fraction, **kwargs)

    for fraction, per_class in ((0.01, 1), (0.25, 4), (0.5, 8), (1., 16)):
        labels = [label for _, label in kept(fraction)]
        assert labels == [0] * per_class + [1] * per_class + [2] * per_class
    names = [{str(kept(f).reader.samples[i][0]) for i in kept(f).indices} for f in (0.25, 0.5)]
    assert names[0] < names[1]
    assert kept(0.25).indices.tolist() == kept(0.25).indices.tolist() != kept(0.25, seed=1).indices.tolist()
    repeated = kept(0.25, keep_length=True)
    assert len(repeated) == 48
    assert sorted(label for _, label in repeated) == [0] * 16 + [1] * 16 + [2] * 16


def config(in_chans=3, size=32):
    return dict(
        input_size=(in_chans, size, size), mean=(0.5,) * in_chans, std=(0.25,) * in_chans, interpolation='bilinear',
        crop_pct=1., crop_mode='center')


def test_fractions_behave_as_the_data_set_does(image_folder):
    """Class names, image mode and transforms reach through; torchvision's sets have fractions too."""
    dataset = ClassFraction(open_dataset('', str(image_folder), 'train'), 0.5)
    assert class_names(dataset) == ['blue sky', 'grass', 'rust']
    set_image_mode(dataset, 'L')
    loader = create_train_loader(dataset, config(in_chans=1), 6, CPU, num_workers=1)
    images, _ = next(iter(loader))
    assert images.shape == (6, 1, 32, 32) and len(loader) == 4

    class Labelled(FakeData):
        targets = [0, 1] * 8

    loader = create_train_loader(ClassFraction(Labelled(size=16), 0.25), config(), 4, CPU, num_workers=0)
    assert next(iter(loader))[0].shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match='lists its labels'):
        ClassFraction(FakeData(size=4), 0.5)


def make_folder(root, names, count=2, value=0):
    """An image folder whose images have the place of their class's name as their grey value."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new('L', (8, 8), value + place).save(root / name / f'{i}.png')
    return str(root)


def deep(kind):
    """A 16-bit image as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize('name', ['', 'torch/folder'])
def test_deep_images_behind_others_are_skipped_by_name(name, tmp_path, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'], count=3)
    (tmp_path / 'data' / 'cat' / '1.png').write_bytes(deep('png'))
    dataset = open_dataset(name, root, 'train')
    for mode in ('RGB', 'L'):
        set_image_mode(dataset, mode)
        for _ in range(2):
            values = [np.asarray(image).max() for image, _ in dataset]
            assert values == [0, 0, 0, 1, 1, 1]  # none is white
    assert len(caplog.messages) == 1
    assert 'cat/1.png' in caplog.text and 'mode I;16' in caplog.text and 'the next image takes its place' in caplog.text


@pytest.mark.parametrize('image, is_told', [
    (Image.new('RGBA', (8, 8), (9, 9, 9, 0)), True),
    (Image.new('LA', (8, 8), (9, 254)), True),
    (Image.new('P', (8, 8), 0), True),
    (Image.new('RGBA', (8, 8), (9, 9, 9, 255)), False),
    (Image.new('RGB', (8, 8)), False),
])
def test_the_first_image_with_transparent_pixels_is_named(image, is_told, tmp_path, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'], count=3)
    for name in ('1', '2'):
        image.save(tmp_path / 'data' / 'dog' / f'{name}.png', **(dict(transparency=0) if image.mode == 'P' else {}))
    dataset = open_dataset('', root, 'train')
    for mode in ('RGBA', 'RGB', 'L'):
        set_image_mode(dataset, mode)
        assert [picture.mode for picture, _ in dataset] == [mode] * 6
        assert len(caplog.messages) == (is_told and mode != 'RGBA')
    assert not is_told or ('dog/1.png' in caplog.text and 'has transparent pixels' in caplog.text)


def test_the_first_image_that_a_viewer_would_turn_is_named(tmp_path, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'], count=2)
    for name, value in (('a', 1), ('b', 6), ('c', 8)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = value
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'dog' / f'{name}.jpg', exif=exif)
    Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'dog' / 'd.jpg', exif=b'Exif\0\0II*\0damaged')
    assert len(list(open_dataset('', root, 'train'))) == 8
    assert len(caplog.messages) == 1 and 'dog/b.jpg' in caplog.text and 'EXIF orientation' in caplog.text


def test_warnings_of_pillow_come_once(tmp_path):
    """Whatever looks at an image must not reset what Python has shown already."""
    for i in range(3):
        (tmp_path / 'train' / 'cat').mkdir(parents=True, exist_ok=True)
        Image.new('P', (8, 8), 0).save(tmp_path / 'train' / 'cat' / f'{i}.png', transparency=b'\x80')
    dataset = open_dataset('', str(tmp_path), 'train')
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('default')
        assert len(list(dataset)) == 3
    assert sum('Palette images' in str(warning.message) for warning in found) == 1


def make_stream(root, kinds):
    """A WebDataset shard of images whose grey value is their label; `d` stands for one of 16 bits, `g` for one of 8."""
    with tarfile.open(root / 'train-000000.tar', 'w') as tar:
        for place, kind in enumerate(kinds):
            buffer = io.BytesIO()
            Image.new('L', (8, 8), place).save(buffer, 'png')
            content = deep('png') if kind == 'd' else buffer.getvalue()
            for member, data in ((f'{place}.png', content), (f'{place}.cls', str(place).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    count = len(kinds)
    split = dict(name='train', num_samples=count, filenames=['train-000000.tar'], shard_lengths=[count])
    (root / '_info.json').write_text(json.dumps(dict(splits=dict(train=split))))
    return str(root)


@pytest.mark.parametrize('kinds, expected', [('gdg', [0, 0, 2]), ('ddgdg', [2, 2, 2, 2, 4]), ('dgd', [1, 1, 1])])
def test_deep_images_of_streams_are_replaced(kinds, expected, tmp_path, caplog):
    dataset = open_dataset('wds/', make_stream(tmp_path, kinds), 'train', input_img_mode='L')
    for _ in range(2):
        assert [(image.getpixel((0, 0)), label) for image, label in dataset] == [(i, i) for i in expected]
    assert len([m for m in caplog.messages if 'mode I;16' in m and 'last image of 8 bits takes their place' in m]) == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_an_epoch_with_deep_images_is_as_long_as_its_loader_says(workers, tmp_path):
    dataset = open_dataset('wds/', make_stream(tmp_path, 'dgdgdgdg'), 'train', is_training=True, batch_size=2)
    config = dict(input_size=(3, 8, 8), mean=(0.,) * 3, std=(1.,) * 3, interpolation='bilinear')
    loader = create_train_loader(dataset, config, 2, torch.device('cpu'), num_workers=workers, no_aug=True)
    assert len(loader) == 4
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 4
        labels = torch.cat([labels for _, labels in batches])
        torch.testing.assert_close(torch.cat([images for images, _ in batches])[:, 0, 0, 0], labels / 255)


def test_a_stream_takes_a_class_map_of_names(tmp_path):
    """Its labels are numbers, which the map names."""
    root = make_stream(tmp_path, 'ggg')
    (tmp_path / 'names.txt').write_text('cat\ndog\nemu\n')
    for class_map in (str(tmp_path / 'names.txt'), dict(cat=0, dog=1, emu=2)):
        dataset = open_dataset('wds/', root, 'train', class_map=class_map)
        assert [label for _, label in dataset] == [0, 1, 2] and class_names(dataset) == ['cat', 'dog', 'emu']
    (tmp_path / 'names.txt').write_text('emu\ndog\ncat\n')
    with pytest.raises(ValueError, match="The class order of the stream 'wds/' differs from that of training"):
        open_with_classes(classes_of(dataset), 'wds/', root, 'train', class_map=str(tmp_path / 'names.txt'))
    for class_map in (dict(cat=0, dog=1), {0: 0, 1: 1, 5: 2}):  # also of integers, which stand for themselves
        with pytest.raises(OSError, match='--class-map has no class for the label 2 of an image'):
            list(open_dataset('wds/', root, 'train', class_map=class_map))
    assert [label for _, label in open_dataset('wds/', root, 'train', class_map={0: 1, 1: 0, 2: 2})] == [1, 0, 2]


def test_a_stream_of_deep_images_alone_is_refused(tmp_path):
    dataset = open_dataset('wds/', make_stream(tmp_path, 'ddd'), 'train')
    with pytest.raises(OSError, match='All 3 images in the shards of a process have 16 bits'):
        list(dataset)


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch, caplog):
    root = make_folder(tmp_path / 'data', ['cat', 'dog'])
    Image.new('L', (64, 64)).save(tmp_path / 'data' / 'cat' / '1.png')
    dataset = open_dataset('', root, 'train')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert [label for _, label in dataset] == [0, 1, 1, 1] and 'cat/1.png' in caplog.text
