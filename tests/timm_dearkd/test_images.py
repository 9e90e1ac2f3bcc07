import json
import os
import shutil

import pytest

from timm_dearkd.engine.image_folder import scan_folder
from timm_dearkd.images import split_images


@pytest.fixture
def flat(image_folder, tmp_path):
    """Classes of 16, 2 and 1 images, with the same file names in each."""
    root = tmp_path / 'flat'
    for name, count in (('blue sky', 16), ('grass', 2), ('rust', 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            shutil.copy(image_folder / 'train' / name / f'{i}.png', root / name)
    return root


def files(folder):
    return {split: {str(p.relative_to(folder / split)) for p in (folder / split).rglob('*.png')}
            for split in ('train', 'validation')}


def test_a_fifth_of_each_class_is_for_validation(flat, tmp_path):
    """Every image is in one split, with its own content; another seed draws others; nothing is copied."""
    split_images(scan_folder(str(flat)), tmp_path / 'a')
    split_images(scan_folder(str(flat)), tmp_path / 'b', seed=1)
    first, second = files(tmp_path / 'a'), files(tmp_path / 'b')
    assert first['train'] | first['validation'] == {str(p.relative_to(flat)) for p in flat.rglob('*.png')}
    assert not first['train'] & first['validation'] and first != second
    counts = {name: sum(path.startswith(name) for path in first['validation']) for name in os.listdir(flat)}
    assert counts == {'blue sky': 3, 'grass': 1, 'rust': 0}
    for split, paths in first.items():
        for path in paths:
            assert (tmp_path / 'a' / split / path).samefile(flat / path)


def test_the_same_images_keep_their_split_and_others_are_refused(flat, tmp_path):
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    before = files(tmp_path / 'split')
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert files(tmp_path / 'split') == before
    shutil.copy(flat / 'rust' / '0.png', flat / 'rust' / 'new.png')
    with pytest.raises(ValueError, match='split of other images.*another --output'):
        split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert files(tmp_path / 'split') == before


def test_an_interrupted_split_is_made_again(flat, tmp_path):
    """split.json is written last."""
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    before = files(tmp_path / 'split')
    (tmp_path / 'split' / 'split.json').unlink()
    next((tmp_path / 'split' / 'train').rglob('*.png')).unlink()
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert files(tmp_path / 'split') == before
    assert json.loads((tmp_path / 'split' / 'split.json').read_text())['seed'] == 0


def test_images_of_a_class_in_two_folders_keep_apart(flat, tmp_path):
    """Both folders have an image 0.png."""
    (flat / 'more').mkdir()
    shutil.move(flat / 'rust', flat / 'more' / 'grass')
    split_images(scan_folder(str(flat)), tmp_path / 'split')
    assert sum(map(len, files(tmp_path / 'split').values())) == 19
