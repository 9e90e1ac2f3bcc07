"""Options of train.py for a small folder of images, by their number and size. The choices are ours."""
import argparse
from typing import Any, Collection, Dict, Optional, Sequence

import torch
import torch.nn as nn
from PIL import Image
from timm import get_pretrained_cfg
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config

from .engine.image_folder import UNREADABLE
from .images import Images

MAX_SMALL_SIDE = 40  # pixels; images up to this size are trained at 32 pixels
CNN_EPOCHS = 0.4  # of the student's
MAX_EVALUATIONS = 20
MIRROR_AGREEMENT = 0.75  # share of the images whose mirror image gets the same class


def choose_batch_size(num_images: int) -> int:
    """Return the even batch size from 24 to 40 that skips the fewest images in an epoch, or less for fewer images."""
    largest = max(1, num_images // 2 * 2)
    return min(largest, min(range(24, 41, 2), key=lambda size: (num_images % size, abs(size - 32))))


def is_far(size: int, other: int) -> bool:
    """Return whether two image sizes differ so much that a CNN of one gives wrong labels at the other (our choice)."""
    return max(size, other) > 1.5 * min(size, other)


def model_size(name: str) -> int:
    """Return the image size of a timm model, in pixels."""
    cfg: Any = get_pretrained_cfg(name)
    return cfg.input_size[1]


def choose_student(name: Optional[str], images: Images, device: torch.device) -> Dict[str, Any]:
    """Return the options of a student: model, image size, and the learning rate if it is not that of the recipe.

    Args:
        name: timm name; None chooses the model.
        images: The images.
        device: Device of the run.
    """
    if name:
        return dict(model=name, img_size=model_size(name), lr=2e-3 if name.startswith('dearkd_nano') else 5e-4)
    is_small = images.side <= MAX_SMALL_SIDE
    if device.type == 'cpu':  # at 32 pixels, 16 patches take half the time of 64
        return dict(model='dearkd_nano_patch4_32', img_size=32 if is_small else 64, model_kwargs=dict(patch_size=8))
    if is_small:
        return dict(model='dearkd_nano_patch4_32', img_size=32)
    return dict(model='dearkd_tiny_patch16_224', img_size=224, lr=5e-4)


def choose_cnn(name: Optional[str], size: int) -> Dict[str, Any]:
    """Return the model of a CNN to train at an image size.

    Args:
        name: timm name, for a CNN with pretrained weights. None takes a small ResNet.
        size: Side length of the images.
    """
    if name:
        return dict(model=name, pretrained=True, img_size=size, lr=2e-4)
    channels = '(32,64,128,256)' if size < 224 else '(64,128,256,512)'
    return dict(model='resnet18', model_kwargs=dict(channels=channels), img_size=size)


def choose_labels(args: argparse.Namespace, given: Collection[str], batch_size: int) -> Dict[str, Any]:
    """Return the options for a DearKD student that learns soft labels of mixed images from a trained teacher.

    They are empty if the user chooses other labels, or a loss that does not go with them.

    Args:
        args: The user's options and the defaults of the others.
        given: Names of the options that the user sets.
        batch_size: Batch size. Mixup and CutMix need even ones.
    """
    has_other_loss = args.kd_distill_type not in (None, 'dearkd') or args.bce_loss or args.jsd_loss or args.aug_splits
    declined = dict(dearkd_labels='dataset', dearkd_soft_labels=False)
    if has_other_loss or args.kd_label_cache or any(
            name in given and getattr(args, name) == value for name, value in declined.items()):
        return {}
    is_odd = any(size % 2 for size in (batch_size, *(args.train_batch_sizes or ())))
    mixing = {} if is_odd else dict(mixup=0.8, cutmix=1., mixup_prob=0.5)
    return dict(dearkd_labels='teacher', dearkd_soft_labels=True, kd_temperature=4., **mixing)


def cnn_epochs(epochs: int) -> int:
    """Return the epochs of a CNN, which needs fewer than the student."""
    return max(10, round(CNN_EPOCHS * epochs))


def choose_training(images: Images, in_chans: int, device: torch.device, epochs: int) -> Dict[str, Any]:
    """Return the options that do not depend on the model.

    Args:
        images: The images.
        in_chans: Channels of the input.
        device: Device of the run.
        epochs: Epochs of the run.
    """
    # Evaluation takes a third of training per image: at most a fifth of the time, but at least 5 evaluations
    num_evaluations = 0.6 * epochs * images.epoch_length / max(1, images.num_validation)
    num_evaluations = min(MAX_EVALUATIONS, max(5, int(num_evaluations)))
    options: Dict[str, Any] = dict(
        in_chans=in_chans, batch_size=choose_batch_size(images.epoch_length), epochs=epochs,
        warmup_epochs=min(max(1, epochs // 20), epochs - 1), val_interval=max(1, epochs // num_evaluations))
    if in_chans == 1:
        options.update(mean=[0.5], std=[0.5])
    if device.type == 'cuda':  # older GPUs emulate bfloat16
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        options.update(amp=True, amp_dtype='bfloat16' if has_bfloat16 else 'float16')
    return options


@torch.inference_mode()
def is_mirrored_alike(model: nn.Module, paths: Sequence[str], size: int, mode: str) -> bool:
    """Return whether a CNN gives most images and their mirror images the same class.

    Args:
        model: The CNN.
        paths: Image files. Those that cannot be read are skipped.
        size: Image size that the CNN sees as a teacher.
        mode: Pillow mode of the images.
    """
    config = resolve_input_data_config(model)
    transform: Any = create_transform(**{**config, 'input_size': (config['input_size'][0], size, size)})
    tensors = []
    for path in paths:
        try:
            with Image.open(path) as image:
                converted = image.convert(mode)
        except UNREADABLE:
            continue
        tensors.append(transform(converted))
    if not tensors:
        return True
    x = torch.stack(tensors).to(next(model.parameters()).device)
    same = model(x).argmax(1) == model(x.flip(3)).argmax(1)
    return same.float().mean().item() >= MIRROR_AGREEMENT
