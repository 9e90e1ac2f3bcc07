import shutil

import pytest
from torchvision.datasets import FakeData

from timm_dearkd.engine.data import (
    ClassFraction,
    check_labels,
    class_names,
    open_dataset,
    open_eval_dataset,
    set_image_mode,
)


def test_class_names(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    assert class_names(dataset) == ['blue sky', 'grass', 'rust']
    assert class_names(FakeData(size=4)) is None
    with pytest.raises(ValueError, match='Set --num-classes 3'):
        check_labels(dataset, 2)
    check_labels(dataset, 5)


def test_unreadable_images_are_named_once_and_replaced(image_folder, tmp_path, caplog):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    for name, content in (('a.png', b'nothing'), ('0.png', (root / 'train' / 'grass' / '0.png').read_bytes()[:200])):
        (root / 'train' / 'grass' / name).write_bytes(content)
    dataset = open_dataset('', str(root), 'train')
    for _ in range(2):
        assert [label for _, label in dataset] == [0] * 16 + [1] * 16 + [2] * 17  # after a.png comes the next class
    messages = [r.message for r in caplog.records if r.name == 'timm_dearkd.engine.data']
    assert len(messages) == 2 and 'a.png' in ''.join(messages) and '0.png' in ''.join(messages)
    for path in (root / 'train').glob('*/*.png'):
        path.write_bytes(b'nothing')
    with pytest.raises(OSError, match='10 images in a row can not be read'):
        open_dataset('', str(root), 'train')[0]


def test_an_empty_class_is_refused(image_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    (root / 'train' / 'clouds').mkdir()
    with pytest.raises(ValueError, match="clouds' has no images"):
        open_dataset('', str(root), 'train', is_training=True)
    (root / 'train' / 'clouds').rename(root / 'train' / '.cache')
    assert len(class_names(open_dataset('', str(root), 'train', is_training=True))) == 3


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


def test_image_mode(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    for mode in ('L', 'RGB'):
        set_image_mode(dataset, mode)
        assert dataset[0][0].mode == mode


def test_validation_takes_the_labels_of_training(image_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    train_set = open_dataset('', str(root), 'train')
    shutil.rmtree(root / 'validation' / 'blue sky')
    dataset = open_eval_dataset(train_set, '', str(root), 'validation')
    assert [label for _, label in dataset] == [1] * 4 + [2] * 4
    (root / 'validation' / 'grass').rename(root / 'validation' / 'Grass')
    with pytest.raises(ValueError, match='has not: Grass'):
        open_eval_dataset(train_set, '', str(root), 'validation')


def test_errors(image_folder, tmp_path):
    with pytest.raises(ValueError, match='No data set given'):
        open_dataset('', None, 'train')
    with pytest.raises(FileNotFoundError, match='train/CLASS/IMAGE'):
        open_dataset('', str(tmp_path / 'nowhere'), 'train')
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match="split 'train'.*DIR/train/CLASS/IMAGE"):
        open_dataset('', str(tmp_path), 'train')
    with pytest.raises(FileNotFoundError, match="No split 'trian'.*train, validation"):
        open_dataset('', str(image_folder), 'trian')


@pytest.mark.parametrize('name', ['', 'image_folder', 'ImageNet', 'torch/image_folder'])
def test_a_split_that_is_not_there_is_refused_whatever_the_folder_is_called(name, image_folder):
    """timm would take train and validation together for it."""
    assert len(open_dataset(name, str(image_folder), 'train')) == 48
    assert len(open_dataset(name, str(image_folder), 'val')) == 12  # timm's other name for validation
    for split in ('trian', 'valid2', ''):
        with pytest.raises(FileNotFoundError, match=f"No split '{split}'.*train, validation"):
            open_dataset(name, str(image_folder), split)
    assert len(open_dataset(name, str(image_folder / 'train'), '')) == 48  # a folder without splits


def test_a_name_without_a_folder_is_refused(tmp_path):
    for name in ('photos', 'torch/cifar10'):
        with pytest.raises(ValueError, match=f'train.py DIR --dataset {name}'):
            open_dataset(name, None, 'train')
    with pytest.raises(FileNotFoundError, match='No data set at'):
        open_dataset('photos', str(tmp_path / 'nowhere'), 'train')
