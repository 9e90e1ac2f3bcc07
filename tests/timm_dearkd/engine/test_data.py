import logging
import os
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import FakeData

from timm_dearkd.engine.data import (
    build_datasets,
    check_labels,
    class_names,
    describe_files,
    image_mode,
    open_dataset,
    open_eval_dataset,
)
from timm_dearkd.engine.student import build_student
from timm_dearkd.engine.wrappers import set_image_mode
from timm_dearkd.train import _parse_args


def test_class_names(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    assert class_names(dataset) == ['blue sky', 'grass', 'rust']
    assert class_names(FakeData(size=4)) is None
    with pytest.raises(ValueError, match='Set --num-classes 3'):
        check_labels(dataset, 2)
    check_labels(dataset, 5)


@pytest.mark.parametrize('text, count, shown', [
    ('blue sky\ngrass\nrust\n', 3, None),
    ('0 blue sky\n0 grass\n1 rust\n', 2, None),
    ('1 blue sky\n2 grass\n3 rust\n', 4, '1, 2, 3, expected 0 to 2'),
    ('0 blue sky\n0 grass\n700 rust\n', 701, '0, 700, expected 0 to 1'),
], ids=['names', 'merged classes', 'from 1', 'gap'])
def test_a_model_has_as_many_classes_as_a_class_map(text, count, shown, image_folder, tmp_path):
    """And gaps in the map are refused, unless --num-classes says that they are meant."""
    path = tmp_path / 'map.txt'
    path.write_text(text)
    dataset = open_dataset('', str(image_folder), 'train', class_map=str(path))

    def build(*args):
        args = _parse_args([str(image_folder), '--model', 'test_resnet', '--class-map', str(path), *args])[0]
        return build_student(args, dataset, torch.device('cpu'), timm.create_model)[0]

    if shown is None:
        assert build().eval()(torch.randn(1, 3, 32, 32)).shape == (1, count)
        return
    with pytest.raises(ValueError, match=f"--class-map '.*map.txt' has the .* {shown}.* set --num-classes {count} for"):
        build()
    assert build('--num-classes', str(count)).num_classes == count


def test_an_empty_class_is_refused(image_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    (root / 'train' / 'clouds').mkdir()
    with pytest.raises(ValueError, match="clouds' has no images"):
        open_dataset('', str(root), 'train', is_training=True)
    (root / 'train' / 'clouds').rename(root / 'train' / '.cache')
    assert len(class_names(open_dataset('', str(root), 'train', is_training=True))) == 3


def copy_into(image_folder, root, *names):
    """The classes, some of them in other folders of the training split."""
    shutil.copytree(image_folder, root)
    for name in names:
        target = root / 'train' / name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / 'train' / 'grass' / '0.png', target)
    return str(root)


@pytest.mark.parametrize('names, message', [
    (['grass/2021', 'rust/2020'], 'innermost folders: 2020, 2021. Move the images up'),
    (['rust/grass'], 'innermost folders: grass'),
    (['.'], "images in '.*/train' itself"),
], ids=['years', 'class in a class', 'no class'])
def test_classes_are_the_folders_of_the_split(names, message, image_folder, tmp_path):
    root = copy_into(image_folder, tmp_path / 'data', *names)
    for name in ('', 'image_folder'):
        for is_training in (True, False):
            with pytest.raises(ValueError, match=message):
                open_dataset(name, root, 'train', is_training=is_training)


def test_a_class_map_chooses_among_any_folders_and_is_compared_with_them(image_folder, tmp_path, caplog):
    root = copy_into(image_folder, tmp_path / 'data', 'animals/dog', 'animals/owl')
    class_map = tmp_path / 'map.txt'
    class_map.write_text('dog\nOwl\ngrass\n')
    dataset = open_dataset('', root, 'train', is_training=True, class_map=str(class_map))
    assert [label for _, label in dataset] == [0] + [2] * 16
    assert len(caplog.messages) == 1
    assert 'it does not name: blue sky, owl, rust.' in caplog.text and 'classes have no images: Owl.' in caplog.text
    caplog.clear()
    class_map.write_text('dog\nowl\ngrass\nrust\nblue sky\n')
    open_dataset('', root, 'train', is_training=True, class_map=str(class_map))
    open_dataset('', root, 'validation', class_map=str(class_map))  # has no dogs, as it may
    assert not caplog.messages


def test_images_of_other_types_are_read_and_those_that_are_not_are_counted(image_folder, tmp_path, caplog):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    pixels = np.asarray(Image.open(root / 'train' / 'grass' / '0.png'))
    types = ('webp', 'BMP', 'tif', 'tiff', 'gif', 'jfif', 'jpe')
    for kind in types:
        Image.fromarray(pixels).save(root / 'train' / 'grass' / f'a.{kind}')
    for name in ('a.heic', 'b.HEIC', 'c.tga', 'Thumbs.db', 'notes.txt'):
        (root / 'train' / 'rust' / name).touch()
    dataset = open_dataset('', str(root), 'train', is_training=True)
    assert len(dataset) == 48 + len(types)
    means = {dataset.filename(i)[-5:]: np.asarray(dataset[i][0]).mean() for i in range(len(dataset))}
    for kind in types:
        assert means[f'a.{kind}'[-5:]] == pytest.approx(pixels.mean(), abs=5)
    assert len(caplog.messages) == 1 and 'are not read: 2 .heic, 1 .tga.' in caplog.text
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(root / 'train', arcname='.')
    packed = open_dataset('', str(tmp_path / 'data.tar'), 'train', is_training=True)
    assert {packed.filename(i)[-5:]: np.asarray(packed[i][0]).mean() for i in range(len(packed))} == means
    assert timm.data.get_img_extensions() == ('.png', '.jpg', '.jpeg')  # timm's own list, for other code


@pytest.mark.parametrize('name, content, message', [
    ('data.zip', b'', 'is a file, expected an image folder or a .tar file.'),
    ('data.tar', b'no tar file', 'cannot be read (truncated header). Expected'),
    ('data.tar', bytes(10240), 'No images in'),
])
def test_files_that_are_no_tar_of_images(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as e:
        open_dataset('', str(tmp_path / name), 'train')
    assert message in str(e.value) and name in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('mode, name', [('I;16', '0.png'), ('I', '0.tif'), ('F', '0.tif')])
def test_deep_images_are_refused(mode, name, image_folder, tmp_path, monkeypatch):
    """Pillow's convert would make them white."""
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    shutil.rmtree(root / 'train' / 'rust')
    path = root / 'train' / 'rust' / name
    path.parent.mkdir()
    Image.fromarray(np.full((8, 8), 30_000, {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode])).save(path)
    for wanted in ('RGB', 'L'):
        with pytest.raises(ValueError, match=f'rust/{name}.*Convert them to 8 bits'):
            open_dataset('', str(root), 'train', input_img_mode=wanted, is_training=True)
    shutil.copy(path, path.parent / f'1{path.suffix}')
    with pytest.raises(ValueError, match='Convert them to 8 bits'):
        open_dataset('', str(root), 'train')
    for place in ('first', 'last'):  # among others, it is skipped when it is read
        shutil.rmtree(path.parent)
        shutil.copytree(root / 'train' / 'grass', path.parent)
        names = sorted(os.listdir(path.parent))
        Image.new('I;16', (8, 8)).save(path.parent / names[0 if place == 'first' else -1])
        assert len(open_dataset('', str(root), 'train', is_training=True))
    monkeypatch.setattr('timm_dearkd.engine.image_folder.NUM_CHECKED_CLASSES', 50)
    for i in range(60):  # of many classes, not every one is looked at
        shutil.copytree(root / 'train' / 'grass', root / 'train' / str(i))
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, 'open', lambda path: opened.append(path) or Image.new('L', (8, 8)))
        open_dataset('', str(root), 'train')
    assert 50 <= len(opened) <= 100


def test_image_mode(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    for mode in ('L', 'RGB'):
        set_image_mode(dataset, mode)
        assert dataset[0][0].mode == mode


@pytest.mark.parametrize('mode', ['I', 'I;16', 'F', '1'])
def test_modes_without_8_bits_are_refused(mode):
    with pytest.raises(ValueError, match=f'--input-img-mode {mode} does not have 8 bits per channel'):
        image_mode(mode, 1)
    assert image_mode('L', 1) == 'L' and image_mode('YCbCr', 3) == 'YCbCr'


def test_validation_takes_the_labels_of_training(image_folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(image_folder, root)
    train_set = open_dataset('', str(root), 'train')
    shutil.rmtree(root / 'validation' / 'blue sky')
    dataset = open_eval_dataset(train_set, '', str(root), 'validation')
    assert [label for _, label in dataset] == [1] * 4 + [2] * 4
    for name in ('torch/folder', 'torch/image_folder'):
        dataset = open_eval_dataset(open_dataset(name, str(root), 'train'), name, str(root), 'validation')
        assert [label for _, label in dataset] == [1] * 4 + [2] * 4
    (root / 'validation' / 'grass').rename(root / 'validation' / 'Grass')
    with pytest.raises(ValueError, match='does not have: Grass'):
        open_eval_dataset(train_set, '', str(root), 'validation')


def test_other_classes_of_a_data_set_without_a_class_map_are_refused(tmp_path, monkeypatch):
    class Animals(FakeData):
        def __init__(self, root, train, **kwargs):
            super().__init__(size=4)
            self.class_to_idx = {'cat': 0, 'dog': 1} if train else {'dog': 0}

    monkeypatch.setitem(timm.data.dataset_factory._TORCH_BASIC_DS, 'animals', Animals)
    train_set = open_dataset('torch/animals', str(tmp_path), 'train')
    with pytest.raises(ValueError, match='Its labels cannot be changed. Use a data set with the same classes'):
        open_eval_dataset(train_set, 'torch/animals', str(tmp_path), 'validation')


def test_errors(image_folder, tmp_path):
    with pytest.raises(ValueError, match='No data set given'):
        open_dataset('', None, 'train')
    with pytest.raises(FileNotFoundError, match='train/CLASS/IMAGE'):
        open_dataset('', str(tmp_path / 'nowhere'), 'train')
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match="No images in .*, split 'train'.*DIR/train/CLASS/IMAGE"):
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


@pytest.mark.parametrize('name', ['', 'torch/folder'])
def test_a_class_may_have_the_name_of_a_split(name, tmp_path):
    for split in ('train', 'validation'):
        for label in ('boat', 'train'):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / split / label / '0.png')
    assert class_names(open_dataset(name, str(tmp_path), 'train')) == ['boat', 'train']


def build(*args):
    return build_datasets(_parse_args([*map(str, args), '--model', 'test_dearkd'])[0])


def test_the_share_that_is_logged_is_the_real_one(image_folder, caplog):
    caplog.set_level(logging.INFO)
    build(image_folder, '--train-fraction', '0.01')  # of 16 images a class
    assert 'Training on 3 images, 6.25 % of all.' in caplog.text


def test_a_folder_without_splits_is_taken_for_both_with_advice(image_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(image_folder, 'photos', target_is_directory=True)
    os.symlink(image_folder / 'train', 'alone', target_is_directory=True)
    instead = 'Make alone/train and alone/validation.'
    for args, advice in (
            (['photos/train/'], 'Did you mean photos?'), ([image_folder / 'train'], f'Did you mean {image_folder}?'),
            (['alone'], instead), (['alone', '--dataset', 'image_folder'], instead)):
        caplog.clear()
        train_set, eval_set = build(*args)
        assert len(train_set) == len(eval_set) == 48 and caplog.text.strip().endswith(advice)


def test_options_of_streams_are_said_to_do_nothing(image_folder, caplog):
    build(image_folder, '--val-num-samples', '2', '--epoch-repeats', '3')
    assert '--val-num-samples is for streamed' in caplog.text and '--epoch-repeats is for streamed' in caplog.text
    assert '--train-num-samples' not in caplog.text


def test_shards_without_a_length_name_its_flag(tmp_path):
    pytest.importorskip('webdataset')
    (tmp_path / 'x-0000.tar').write_bytes(b'')
    with pytest.raises(ValueError, match='--train-num-samples not specified'):
        open_dataset('wds/', str(tmp_path), 'x-0000.tar', is_training=True, batch_size=1)


def test_data_sets_that_are_no_files():
    first, second = (torch.utils.data.TensorDataset(torch.zeros(count, 1)) for count in (2, 3))
    assert describe_files(first) == describe_files(first) != describe_files(second)
    first.targets, second = [0, 1], torch.utils.data.TensorDataset(torch.zeros(2, 1))
    assert describe_files(first) != describe_files(second)
