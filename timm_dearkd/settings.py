"""Options of train.py for a small folder of images, by the number and the size of the images. The choices are ours."""
from typing import Any, Dict, Optional

import torch

from .images import Images

__all__ = ['choose_batch_size', 'choose_cnn', 'choose_sizes', 'choose_training', 'cnn_epochs']

MAX_SMALL_SIDE = 40  # pixels; images up to this size are trained at 32 pixels
CNN_EPOCHS = 0.4  # of the student's
MAX_EVALUATIONS = 20


def choose_batch_size(num_images: int) -> int:
    """Return the batch size from 24 to 40 that skips the fewest images in an epoch, or fewer for fewer images."""
    return min(num_images, min(range(24, 41), key=lambda size: (num_images % size, abs(size - 32))))


def choose_sizes(images: Images, device: torch.device) -> Dict[str, Any]:
    """Return the student's model and image size."""
    if images.side <= MAX_SMALL_SIDE:
        return dict(model='dearkd_nano_patch4_32', img_size=32)
    if device.type == 'cpu':  # 8x8 patches, as with 32 pixels
        return dict(model='dearkd_nano_patch4_32', img_size=64, model_kwargs=dict(patch_size=8))
    return dict(model='dearkd_tiny_patch16_224', img_size=224, lr=5e-4)


def choose_cnn(name: Optional[str], images: Images, device: torch.device) -> Dict[str, Any]:
    """Return the model and the image size of a CNN to train.

    Args:
        name: timm name, for a CNN with pretrained weights. None takes a small ResNet.
        images: The images.
        device: Device of the run.
    """
    size = choose_sizes(images, device)['img_size']
    if name:
        return dict(model=name, pretrained=True, img_size=size, lr=2e-4)
    channels = '(32,64,128,256)' if size < 224 else '(64,128,256,512)'
    return dict(model='resnet18', model_kwargs=dict(channels=channels), img_size=size)


def cnn_epochs(epochs: int) -> int:
    """Return the epochs of a CNN, which needs fewer than the student."""
    return max(10, round(CNN_EPOCHS * epochs))


def choose_training(
        images: Images,
        in_chans: int,
        device: torch.device,
        epochs: int,
        hflip: Optional[float] = None,
) -> Dict[str, Any]:
    """Return the options that do not depend on the model.

    Args:
        images: The images.
        in_chans: Channels of the input.
        device: Device of the run.
        epochs: Epochs of the run.
        hflip: Probability of mirroring. 0 for a CNN: its answers to mirror images then tell whether the student may see
            them.
    """
    # an image is evaluated three times as fast as it is trained on: at most a fifth of the time, but five times
    num_evaluations = 0.6 * epochs * images.num_train / max(1, images.num_validation)
    num_evaluations = min(MAX_EVALUATIONS, max(5, int(num_evaluations)))
    options: Dict[str, Any] = dict(
        in_chans=in_chans, batch_size=choose_batch_size(images.num_train), epochs=epochs,
        warmup_epochs=max(1, epochs // 20), val_interval=max(1, epochs // num_evaluations))
    if in_chans == 1:
        options.update(mean=[0.5], std=[0.5])
    if hflip is not None:
        options['hflip'] = hflip
    if device.type == 'cuda':
        options.update(amp=True, amp_dtype='bfloat16')
    return options
