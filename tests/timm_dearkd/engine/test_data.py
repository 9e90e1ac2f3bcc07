import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData

from timm_dearkd.engine.data import (
    check_labels,
    class_names,
    create_eval_loader,
    create_mixup,
    create_train_loader,
    open_dataset,
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
    mixup = create_mixup(3, prefetcher, mixup=1., smoothing=0.)
    loader = create_train_loader(
        dataset, config(), 6, CPU, use_prefetcher=prefetcher, mixup=mixup, num_workers=0, persistent_workers=False)
    images, target = next(iter(loader))
    assert target.shape == (6, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    loader.mixup_enabled = False
    _, target = next(iter(loader))
    assert target.unique().tolist() == [0., 1.]
    assert create_mixup(3, prefetcher) is None


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


def test_errors(image_folder, tmp_path):
    with pytest.raises(ValueError, match='No data set given'):
        open_dataset('', None, 'train')
    with pytest.raises(FileNotFoundError, match='train/CLASS/IMAGE'):
        open_dataset('', str(tmp_path / 'nowhere'), 'train')
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match="split 'train'.*DIR/train/CLASS/IMAGE"):
        open_dataset('', str(tmp_path), 'train')
    dataset = open_dataset('', str(image_folder), 'train')
    with pytest.raises(ValueError, match='48 images, less than one batch of 64'):
        create_train_loader(dataset, config(), 64, CPU)
