import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import FakeData

from timm_dearkd.engine.data import (
    ClassFraction,
    check_labels,
    class_names,
    create_eval_loader,
    create_train_loader,
    open_dataset,
    open_eval_dataset,
    set_image_mode,
)

CPU = torch.device('cpu')


def config(in_chans=3, size=32):
    return dict(
        input_size=(in_chans, size, size), mean=(0.5,) * in_chans, std=(0.25,) * in_chans, interpolation='bilinear',
        crop_pct=1., crop_mode='center')


def test_class_names(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    assert class_names(dataset) == ['blue sky', 'grass', 'rust']
    assert class_names(FakeData(size=4)) is None
    with pytest.raises(ValueError, match='Set --num-classes 3'):
        check_labels(dataset, 2)
    check_labels(dataset, 5)


@pytest.mark.parametrize('prefetcher', [True, False])
def test_eval_batches_are_the_images(image_folder, prefetcher):
    dataset = open_dataset('', str(image_folder), 'validation')
    loader = create_eval_loader(dataset, config(size=40), 5, CPU, use_prefetcher=prefetcher, num_workers=0)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [5, 5, 2]
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    first = np.asarray(Image.open(image_folder / 'validation' / 'blue sky' / '0.png'), dtype=np.float32) / 255
    torch.testing.assert_close(images[0], torch.from_numpy((first - 0.5) / 0.25).permute(2, 0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize('prefetcher', [True, False])
def test_mixup(image_folder, prefetcher):
    dataset = open_dataset('', str(image_folder), 'train')
    mixup_cls = timm.data.FastCollateMixup if prefetcher else timm.data.Mixup
    mixup = mixup_cls(mixup_alpha=1., label_smoothing=0., num_classes=3)
    loader = create_train_loader(
        dataset, config(), 6, CPU, use_prefetcher=prefetcher, mixup=mixup, num_workers=0, persistent_workers=False)
    images, target = next(iter(loader))
    assert target.shape == (6, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    loader.mixup_enabled = False
    _, target = next(iter(loader))
    assert target.unique().tolist() == [0., 1.]


@pytest.mark.parametrize('in_chans,mode', [(1, 'RGB'), (3, 'L')])
def test_torchvision_sets_are_converted_to_the_channels_asked_for(in_chans, mode):
    class Images(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return self.transform(Image.new(mode, (40, 40), 128 if mode == 'L' else (128, 128, 128))), index

    loader = create_eval_loader(Images(), config(in_chans), 4, CPU, num_workers=0)
    images, _ = next(iter(loader))
    assert images.shape == (4, in_chans, 32, 32)
    torch.testing.assert_close(images, torch.full_like(images, (128 / 255 - 0.5) / 0.25))


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
    with pytest.raises(ValueError, match="No split 'trian'.*train, validation"):
        open_dataset('', str(image_folder), 'trian')
    dataset = open_dataset('', str(image_folder), 'train')
    with pytest.raises(ValueError, match='--aa'):
        create_train_loader(dataset, config(), 8, CPU, auto_augment='nothing', num_workers=0)
    with pytest.raises(ValueError, match='48 images, less than one batch of 64'):
        create_train_loader(dataset, config(), 64, CPU)
