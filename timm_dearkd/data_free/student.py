"""The command that trains a student on synthetic images."""
import argparse
import shlex
from typing import Any, Sequence

from timm_dearkd.engine.options import read_config
from timm_dearkd.settings import MAX_SMALL_SIDE, is_far


def train_command(
        args: argparse.Namespace,
        folder: str,
        num_images: int,
        class_map: Sequence[int],
        model: Any,
        size: int,
        mirror: bool,
) -> str:
    """Return the command that trains a student on the images.

    Args:
        args: Options of data_free.
        folder: Folder of the data set.
        num_images: Number of images in it, 2 or more.
        class_map: The CNN's class for each class of the data set.
        model: The CNN.
        size: Side length of the images.
        mirror: Mirror the images at random.
    """
    root = shlex.quote(folder)
    data = f'{root} --val-split ""' if args.format == 'folder' else (
        f'{root} --dataset wds/ --train-split train --val-split "" --class-map {root}/class_map.txt')
    map_flag = '' if class_map == list(range(model.num_classes)) else f' --kd-class-map {root}/kd_class_map.txt'
    checkpoint = f' --kd-teacher-checkpoint {shlex.quote(args.checkpoint)}' if args.checkpoint else ''
    for name, values in (('mean', args.mean), ('std', args.std)):
        checkpoint += f' --kd-teacher-{name} {" ".join(map(str, values))}' if values else ''
    channels = {1: ' --in-chans 1', 2: ' --in-chans 2 --input-img-mode LA', 3: '',
                4: ' --in-chans 4 --input-img-mode RGBA'}[model.in_chans]
    flip = '' if mirror else ' --hflip 0'
    # Mixup needs even batches
    batch = f' --batch-size {num_images // 2 * 2}' if num_images < read_config('data_free')['batch_size'] else ''
    return (f'timm-dearkd train {data}{channels} -c data_free {student_flags(size)}'
            f' --kd-model-name {shlex.quote(args.model)}{checkpoint}{map_flag}{flip}{batch}')


def student_flags(size: int) -> str:
    """Return the flags of a student for images of a size: a small one with 64 patches, or one of 224 pixels.

    The teacher sees the student's images, so the student's size is about theirs.
    """
    if 1.5 * size >= 224:
        flags, student_size = '--model dearkd_tiny_patch16_224 --lr 5e-4', 224
    else:
        patch = 4 if size <= MAX_SMALL_SIDE else round(size / 8)
        flags, student_size = '--model dearkd_nano_patch4_32', 8 * patch
        if patch > 4:
            flags += f' --img-size {student_size} --model-kwargs patch_size={patch}'
    return flags + (f' --kd-teacher-img-size {size}' if is_far(size, student_size) else '')
