"""The command line of train.py: timm's flags and defaults, DearKD's own flags, and YAML files of either.

The limits of a flag stand beside it. `resolve_args` checks what several flags decide together.
"""
import argparse
import functools
import logging
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NoReturn, Optional, Sequence, Set, Tuple

import yaml
from timm.models import is_model
from timm.optim import get_optimizer_info
from timm.task import ClassificationEvaluator
from timm.utils import ParseKwargs

from distill_hooks.checkpoint import resolve_model, training_args
from distill_hooks.errors import one_line

from ..commands import NON_NEGATIVE, NON_NEGATIVE_INT, POSITIVE, POSITIVE_INT, POSITIVE_SHARE, RATE, SHARE, limited
from .augmentation import FILLS
from .checkpoints import find_checkpoint
from .process import check_backend, default_workers
from .tracking import check_available

_logger = logging.getLogger(__name__)

_RECIPES = Path(__file__).parents[1] / 'recipes'
_CUDA_GRAPH_MODES = ('reduce-overhead', 'max-autotune')
# Options that name a file, and what to give instead of a folder
_FILES = {
    'resume': 'last.pth.tar in it, or --resume auto with its --output and --experiment',
    'initial_checkpoint': 'last.pth.tar in it, or take --model local-dir:{} --pretrained',
    'pretrained_path': 'model_best.safetensors in it, or take --model local-dir:{} --pretrained',
    'kd_teacher_checkpoint': 'a checkpoint in it, or take --kd-model-name {} alone',
    'kd_class_map': 'a file in it',
}
# Options of each kind of distillation
_WEIGHTS = ('distill_loss_weight', 'task_loss_weight')
_INPUT = ('kd_teacher_img_size', 'kd_teacher_mean', 'kd_teacher_std')
_TAUGHT = {
    'dearkd': (
        'dearkd_stage1_epochs', 'dearkd_stage2', 'dearkd_alpha', 'dearkd_beta', 'dearkd_hooks',
        'dearkd_normalize_features', 'dearkd_labels', 'dearkd_soft_labels', 'kd_temperature', *_INPUT,
        'kd_class_map', 'kd_label_cache'),
    'logit': ('kd_loss_type', 'kd_temperature', *_INPUT, 'kd_class_map', *_WEIGHTS),
    'feature': ('kd_student_feature_dim', 'kd_teacher_feature_dim', *_INPUT, *_WEIGHTS),
    'token': ('kd_token_distill_type', 'kd_temperature', *_INPUT, 'kd_class_map', *_WEIGHTS),
}


class _ParseKwargs(ParseKwargs):
    """timm's KEY=VALUE pairs, with an error for a word of another form."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value and '=' not in value:
                parser.error(f'argument {option_string}: {value!r} is not of the form KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


class _HelpFormatter(argparse.HelpFormatter):
    """Appends the default to a help text that does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        is_set = action.default not in (None, '', False, argparse.SUPPRESS) and action.default not in ([], {})
        return f'{text} (default: %(default)s)' if is_set and 'default' not in text else text


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line: the usage of 190 flags would hide them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


@functools.lru_cache(maxsize=None)
def build_config_parser() -> argparse.ArgumentParser:
    """Build the parser of `--config` alone, which is read before everything else."""
    parser = argparse.ArgumentParser(description='Training configuration', add_help=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options, or name of a recipe')
    return parser


@functools.lru_cache(maxsize=None)
def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all flags but `--config`."""
    parser = _Parser(
        prog='train.py',
        description='Train a timm model, alone or taught by a CNN with DearKD',
        epilog='-c FILE, --config FILE reads options from a YAML file, or from the recipe of that name'
        f' ({", ".join(recipe_names())}). The command line wins over it.',
        formatter_class=_HelpFormatter,
    )
    _add_dearkd(parser.add_argument_group('DearKD'))
    _add_distillation(parser.add_argument_group("timm's distillation"))
    _add_data(parser.add_argument_group('Data'))
    _add_sizes(parser.add_argument_group('Several image sizes'))
    _add_model(parser.add_argument_group('Model'))
    _add_input(parser.add_argument_group('Input'))
    _add_device(parser.add_argument_group('Device and precision'))
    _add_optimizer(parser.add_argument_group('Optimizer'))
    _add_schedule(parser.add_argument_group('Learning rate schedule'))
    _add_augmentation(parser.add_argument_group('Augmentation'))
    _add_loss(parser.add_argument_group('Loss and mixing'))
    _add_regularization(parser.add_argument_group('Regularization and weight averaging'))
    _add_run(parser.add_argument_group('Run and output'))
    _add_logging(parser.add_argument_group('Experiment trackers'))
    _add_naflex(parser)
    return parser


def _add_dearkd(group) -> None:
    add = group.add_argument
    add('--kd-model-name', metavar='NAME', help='teacher: a timm name, a run folder, local-dir:DIR or hf-hub:ORG/NAME')
    add('--kd-teacher-checkpoint', metavar='FILE', help="weights of the teacher (default: timm's pretrained weights)")
    add('--kd-teacher-img-size', type=int, metavar='N',
        help="side length in pixels at which the teacher sees the images (default: the student's)")
    add('--kd-teacher-mean', type=SHARE, nargs='+', metavar='MEAN',
        help="mean per channel with which the teacher was trained, of images from 0 to 1 (default: the model's)")
    add('--kd-teacher-std', type=POSITIVE_SHARE, nargs='+', metavar='STD',
        help="standard deviation per channel with which the teacher was trained (default: the model's)")
    add('--kd-class-map', metavar='FILE', help="the teacher's class index per line, for each of the student's classes")
    add('--kd-label-cache', metavar='FOLDER',
        help="read the teacher's labels from this folder, and add those that are missing")
    add('--kd-distill-type', choices=('dearkd', 'logit', 'feature', 'token'),
        help="kind of distillation (default: dearkd if the student has tokens, else timm's logit)")
    add('--dearkd-stage1-epochs', type=int, metavar='N', help='epochs of stage I (default: 5/6 of the epochs)')
    add('--dearkd-stage2', default='anneal', choices=('anneal', 'ce'),
        help="stage II: fade the teacher's labels out, or train without the teacher")
    add('--dearkd-alpha', type=float, default=0.5, help='weight of the label loss in Eq. 6')
    add('--dearkd-beta', type=float, default=10.0, help='weight of the hidden loss in Eq. 6; 0 switches it off')
    add('--dearkd-hooks', nargs='+', default=['4'], metavar='BLOCK[:LAYER]',
        help='student block and teacher stage or module that teaches it, e.g. 4, 4:2 or 4:s2.b4')
    add('--dearkd-normalize-features', action=argparse.BooleanOptionalAction, default=True,
        help="divide the teacher's feature maps by their standard deviation per channel (default: on)")
    add('--dearkd-labels', default='dataset', choices=('dataset', 'teacher'),
        help="labels of the head in Eq. 6 and 7: the data set's, or the teacher's answer to the augmented image")
    add('--dearkd-soft-labels', action=argparse.BooleanOptionalAction, default=False,
        help="learn the teacher's soft labels (KL divergence, --kd-temperature) instead of its decision")
    add('--dearkd-rpe-drop', type=float, metavar='RATE', help="dropout rate of MHCA's positional scores (default: 0)")
    add('--dearkd-rpe-drop-mode', choices=('element', 'query'),
        help='drop single scores, or all scores of a token, which is faster (default: element)')


def _add_distillation(group) -> None:
    add = group.add_argument
    add('--kd-loss-type', default='kl', help='loss of logit distillation')
    add('--distill-loss-weight', type=float, help="weight of the distillation loss (default: timm's)")
    add('--task-loss-weight', type=float, help="weight of the label loss (default: timm's)")
    add('--kd-temperature', type=POSITIVE, default=4.0, help='softmax temperature of soft labels')
    add('--kd-student-feature-dim', type=int, help="features of the student (default: found in the model)")
    add('--kd-teacher-feature-dim', type=int, help="features of the teacher (default: found in the model)")
    add('--kd-token-distill-type', default='soft', choices=('soft', 'hard'), help='labels of token distillation')


def _add_data(group) -> None:
    add = group.add_argument
    add('data', nargs='?', metavar='DIR', help='folder of the data set')
    add('--data-dir', metavar='DIR', help='folder of the data set')
    add('--dataset', default='', help='type and name of the data set (default: an image folder)')
    add('--train-split', default='train', help='training split: a folder in DIR, or a path')
    add('--val-split', default='validation', help="validation split; '' trains without one")
    add('--train-num-samples', type=int, help='images of a streamed training split that does not tell its length')
    add('--val-num-samples', type=int, help='images of a streamed validation split that does not tell its length')
    add('--train-fraction', type=POSITIVE_SHARE, default=1.,
        help='train on this share of every class, always the same images')
    add('--fraction-seed', type=int, default=0, help='random seed of --train-fraction')
    add('--fraction-keep', default='epochs', choices=('epochs', 'steps'),
        help='with --train-fraction, keep the number of epochs, or of steps')
    add('--dataset-download', action='store_true', help='download a torch/ or tfds/ data set')
    add('--class-map', default='', metavar='FILE', help='class names, one per line, in the order of their indices')
    add('--input-img-mode', help='Pillow mode of the images, RGB or L (default: by the number of channels)')
    add('--input-key', help='column or file name endings of the images')
    add('--target-key', help='column of the labels')
    add('--dataset-trust-remote-code', action='store_true', help='run code of a Hugging Face data set')
    add('-j', '--workers', type=NON_NEGATIVE_INT,
        help='data loading processes (default: 4, or as many as there are CPU cores)')
    add('--pin-mem', action=argparse.BooleanOptionalAction,
        help='load into page-locked memory, for faster copies to the device (default: on CUDA)')
    add('--no-prefetcher', action='store_true', help='normalise on the CPU, without copies ahead to the device')
    add('--use-multi-epochs-loader', action='store_true', help='no effect')
    add('--worker-seeding', default='all', choices=('all', 'part'),
        help='random generators to seed in the workers of streamed data sets')


def _add_sizes(group) -> None:
    add = group.add_argument
    add('--train-img-sizes', type=int, nargs='+', metavar='N',
        help='train at several side lengths in pixels, one per batch')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each size (default: --batch-size)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='probability of each size (default: equal)')
    add('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
        help='mix the sizes all the time, or move from the first to the last')
    add('--train-size-schedule-spread', type=float, default=0.65, help='neighbouring sizes of a progressive schedule')
    add('--train-size-random-mix', type=float, default=0.1, help='share of random sizes in a progressive schedule')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=POSITIVE_INT, metavar='N',
        help='batches per epoch (default: by the number of images)')
    add('--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
        help='scale the loss of a batch by its size, relative to --batch-size')


def _add_model(group) -> None:
    add = group.add_argument
    add('--model', default='resnet50', metavar='NAME', help='timm model, or the output folder of a run')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='start from this file as if it were the pretrained weights')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=_ParseKwargs,
        help='KEY=VALUE entries to change in the pretrained configuration')
    add('--initial-checkpoint', default='', metavar='FILE', help='load this checkpoint into the new model')
    add('--resume', default='', metavar='FILE',
        help="resume a run from its checkpoint; 'auto': the newest in the folder of --experiment, if any")
    add('--no-resume-opt', action='store_true', help='resume with a new optimizer')
    add('--num-classes', type=int, help="number of classes (default: the data set's, else the model's)")
    add('--gp', help="global pooling, e.g. avg or token (default: the model's)")
    add('--model-kwargs', nargs='*', default={}, action=_ParseKwargs, help='KEY=VALUE arguments of the model')
    add('--head-init-scale', type=float, help="factor on the classifier's initial weights")
    add('--head-init-bias', type=float, help="initial value of the classifier's biases")
    add('--grad-checkpointing', action='store_true', help='compute activations again in the backward, to save memory')
    add('--fast-norm', action='store_true', help='normalise in half precision under --amp')
    add('--torchscript', action='store_true', help='script the model (CNNs and plain ViTs)')
    add('--fuser', default='', help='fuser of TorchScript: te, old or nvfuser')


def _add_input(group) -> None:
    add = group.add_argument
    add('--img-size', type=int, help="side length of the images in pixels (default: the model's)")
    add('--in-chans', type=int, help="channels of the images (default: the model's)")
    add('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="shape of the images (default: the model's)")
    add('--crop-pct', type=POSITIVE, help="share of the validation image that is kept (default: the model's)")
    add('--mean', type=float, nargs='+', help="mean per channel, of images from 0 to 1 (default: the model's)")
    add('--std', type=float, nargs='+', help="standard deviation per channel (default: the model's)")
    add('--interpolation', default='', help="resizing of validation images (default: the model's)")
    add('-b', '--batch-size', type=POSITIVE_INT, default=128, help='images per batch and process')
    add('-vb', '--validation-batch-size', type=POSITIVE_INT, help='images per validation batch (default: --batch-size)')


def _add_device(group) -> None:
    add = group.add_argument
    add('--device', help='cuda, cpu, ... (default: the accelerator if available, else the CPU)')
    add('--amp', action=argparse.BooleanOptionalAction, default=False, help='automatic mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='type of --amp')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='type of the weights (default: float32)')
    add('--channels-last', action=argparse.BooleanOptionalAction, default=False, help='channels-last memory format')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile student and teacher')
    add('--torchcompile-mode', help="mode of torch.compile (default: PyTorch's)")
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DistributedDataParallel')
    add('--deterministic', action='store_true', help='use deterministic kernels, so that a run repeats bit for bit')
    add('--synchronize-step', action='store_true', help='wait for the device after every step')
    add('--local_rank', type=int, default=0, help='ignored; torchrun sets it in the environment')
    add('--device-modules', nargs='+', metavar='MODULE', help='modules to import first, for their devices or models')


def _add_optimizer(group) -> None:
    add = group.add_argument
    add('--opt', default='sgd', help='optimizer, by its name in timm')
    add('--opt-eps', type=float, help="epsilon of the optimizer (default: the optimizer's)")
    add('--opt-betas', type=float, nargs='+', help="betas of the optimizer (default: the optimizer's)")
    add('--momentum', type=float, default=0.9, help='momentum of the optimizer')
    add('--weight-decay', type=float, default=2e-5, help='weight decay')
    add('--clip-grad', type=POSITIVE, help='clip the gradients at this value (default: no clipping)')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'),
        help='clip the norm, each value, or adaptively (agc)')
    add('--layer-decay', type=NON_NEGATIVE, help='factor on the learning rate per layer, from the head down')
    add('--layer-decay-min-scale', type=float, default=0, help='smallest factor of --layer-decay')
    add('--layer-decay-no-opt-scale', type=float, help='freeze layers whose factor is below this')
    add('--opt-kwargs', nargs='*', default={}, action=_ParseKwargs, help='KEY=VALUE arguments of the optimizer')
    add('--grad-accum-steps', type=POSITIVE_INT, default=1, help='batches per optimizer step')


def _add_schedule(group) -> None:
    add = group.add_argument
    add('--sched', default='cosine', help='schedule of the learning rate',
        choices=('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'constant', 'wsd', 'rsqrt', 'none'))
    add('--sched-on-updates', action='store_true', help='change the learning rate after every update, not every epoch')
    add('--lr', type=NON_NEGATIVE, help='learning rate (default: --lr-base scaled by the batch size)')
    add('--lr-base', type=float, default=0.1, help='learning rate at --lr-base-size images per update')
    add('--lr-base-size', type=POSITIVE_INT, default=256, help='images per update of --lr-base')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
        help='scaling of --lr-base with the images per update (default: by the optimizer)')
    add('--lr-noise', type=float, nargs='+', help='shares of the epochs between which the learning rate gets noise')
    add('--lr-noise-pct', type=float, default=0.67, help='largest noise, as a share of the learning rate')
    add('--lr-noise-std', type=float, default=1.0, help='standard deviation of the noise')
    add('--lr-cycle-mul', type=float, default=1.0, help='factor on the length of each cycle')
    add('--lr-cycle-decay', type=float, default=0.5, help='factor on the learning rate of each cycle')
    add('--lr-cycle-limit', type=int, default=1, help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='exponent of the cosine and poly schedules')
    add('--warmup-lr', type=float, default=1e-5, help='learning rate at the start of the warm-up')
    add('--min-lr', type=NON_NEGATIVE, default=0, help='learning rate at the end of a cycle')
    add('--epochs', type=POSITIVE_INT, default=300, help='epochs of the run, without --cooldown-epochs')
    add('--auto-epochs', action='store_true',
        help='choose the epochs by the number of images: 700 / n^(1/4), at least 1,000 updates')
    add('--epoch-repeats', type=float, default=0., help='passes over a streamed data set per epoch')
    add('--start-epoch', type=NON_NEGATIVE_INT, help='first epoch, from 0 (default: after those of the checkpoint)')
    add('--stop-epoch', type=int, metavar='N', help='stop after N epochs; schedules stay those of the whole run')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], help='epochs of the multistep schedule')
    add('--decay-epochs', type=POSITIVE, default=90,
        help='step: epochs between drops; wsd and rsqrt: epochs of the final decay, or its share if below 1')
    add('--warmup-epochs', type=int, default=5, help='epochs of the warm-up')
    add('--warmup-prefix', action='store_true', help='count the warm-up before the epochs of the schedule')
    add('--cooldown-epochs', type=int, default=0, help='epochs at --min-lr after the schedule')
    add('--patience-epochs', type=int, default=10, help='epochs without progress of the plateau schedule')
    add('--decay-rate', '--dr', type=float, default=0.1, help='factor on the learning rate per step')


def _add_augmentation(group) -> None:
    add = group.add_argument
    add('--no-aug', action='store_true', help='no augmentation: resize and centre crop, without --crop-pct')
    add('--train-crop-mode', help='crop of training images: rrc, rkrc or rkrr (default: rrc)')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], help='least and greatest area of the crop')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.],
        help='least and greatest aspect ratio of the crop (default: 3/4 and 4/3)')
    add('--hflip', type=SHARE, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=SHARE, default=0., help='probability of a vertical flip (default: 0)')
    add('--color-jitter', type=float, default=0.4, help='strength of the colour jitter')
    add('--color-jitter-prob', type=SHARE, help='probability of the colour jitter (default: 1)')
    add('--grayscale-prob', type=SHARE, help='probability of a grey image (default: 0)')
    add('--gaussian-blur-prob', type=SHARE, help='probability of a blur (default: 0)')
    add('--aa', metavar='NAME', help='AutoAugment policy, e.g. rand-m9-mstd0.5-inc1 (default: none)')
    add('--affine-aug', choices=FILLS, metavar='FILL',
        help='random zoom in and out, rotation, shear, shift and gamma; FILL of the border: edge, black or mean')
    add('--aug-repeats', type=limited(float, '1 or more; 0 switches them off', lambda value: value == 0 or value >= 1),
        default=0, metavar='N', help='augmentations of each image per epoch (default: once)')
    add('--aug-splits', type=int, default=0, metavar='N', help='augment every image N times, the first time lightly')
    add('--reprob', type=SHARE, default=0., help='probability of random erasing (default: 0)')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='content of erased areas')
    add('--recount', type=POSITIVE_INT, default=1, help='number of erased areas')
    add('--resplit', action='store_true', help='do not erase in the first of the --aug-splits')
    add('--train-interpolation', default='random', help='resizing of training images')


def _add_loss(group) -> None:
    add = group.add_argument
    add('--jsd-loss', action='store_true', help='Jensen-Shannon divergence over the --aug-splits')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum over the classes')
    add('--bce-target-thresh', type=SHARE, help='soft labels above this become 1, others 0')
    add('--bce-pos-weight', type=float, help='weight of the positive labels')
    add('--smoothing', type=RATE, default=0.1, help='label smoothing')
    add('--mixup', type=NON_NEGATIVE, default=0., help="alpha of Mixup's beta distribution (default: 0, off)")
    add('--cutmix', type=NON_NEGATIVE, default=0., help="alpha of CutMix's beta distribution (default: 0, off)")
    add('--cutmix-minmax', type=float, nargs='+', help='least and greatest side of CutMix, instead of --cutmix')
    add('--mixup-prob', type=SHARE, default=1., help='probability of mixing a batch')
    add('--mixup-switch-prob', type=SHARE, default=0.5, help='probability of CutMix, where both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'),
        help='draw a mixing ratio per batch, pair or image')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on (default: 0, never)')


def _add_regularization(group) -> None:
    add = group.add_argument
    add('--drop', type=RATE, default=0., help='dropout rate (default: 0)')
    add('--drop-connect', type=RATE, help='the old name of --drop-path')
    add('--drop-path', type=RATE, help='rate of stochastic depth (default: 0)')
    add('--drop-block', type=SHARE, help='rate of DropBlock (default: 0)')
    add('--bn-momentum', type=float, help="momentum of BatchNorm (default: the model's)")
    add('--bn-eps', type=float, help="epsilon of BatchNorm (default: the model's)")
    add('--sync-bn', action='store_true', help='one BatchNorm over all processes')
    add('--dist-bn', default='reduce', choices=('', 'reduce', 'broadcast'),
        help='after an epoch, average or broadcast BatchNorm statistics between processes')
    add('--split-bn', action='store_true', help='a BatchNorm per augmentation split')
    add('--model-ema', action='store_true', help='evaluate and export an exponential moving average of the weights')
    add('--model-ema-force-cpu', action='store_true', help='keep the average on the CPU, and do not evaluate it')
    add('--model-ema-decay', type=RATE, default=0.9998, help='decay of the average per update')
    add('--model-ema-warmup', action='store_true', help='start with a small decay')


def _add_run(group) -> None:
    add = group.add_argument
    add('--seed', type=NON_NEGATIVE_INT, default=42, help='random seed')
    add('--output', default='', metavar='DIR', help='parent of the output folder (default: ./output/train)')
    add('--experiment', default='', metavar='NAME', help='name of the output folder (default: date, model and size)')
    add('--log-interval', type=POSITIVE_INT, default=50, metavar='N',
        help='updates between log lines; batches in an evaluation')
    add('--val-interval', type=POSITIVE_INT, default=1, metavar='N', help='epochs between evaluations')
    add('--recovery-interval', type=NON_NEGATIVE_INT, default=0, metavar='N',
        help='updates between checkpoints within an epoch (default: 0, none)')
    add('--save-epochs', type=int, nargs='+', default=[], metavar='N',
        help='evaluate after N epochs, and keep that checkpoint as milestone-N')
    add('--checkpoint-hist', type=POSITIVE_INT, default=10, metavar='N', help='epochs to keep checkpoints of')
    add('--skip-nan-steps', type=NON_NEGATIVE_INT, default=0, metavar='N',
        help='skip up to N steps whose loss is not finite (default: 0, stop)')
    add('--eval-metric', default='top1', choices=ClassificationEvaluator.metric_names,
        help='metric that ranks the checkpoints')
    add('--eval-only', action='store_true', help='evaluate the model on the validation split, and print JSON')
    add('--tta', type=int, default=0, choices=(0, 1, 2), metavar='N', help='2: average each image and its mirror image')
    add('--save-images', action='store_true', help='write the training batches of the log lines')
    add('--track-attention-distance', action='store_true',
        help='after every epoch, record how far the heads look on 32 validation images')
    add('--report', action='store_true', help='write report.html at the end')


def _add_logging(group) -> None:
    add = group.add_argument
    add('--log-tensorboard', action='store_true', help='write TensorBoard events into the output folder')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project', help='project of Weights & Biases')
    add('--wandb-tags', nargs='+', default=[], help='tags of the run in Weights & Biases')
    add('--wandb-resume-id', default='', help='run of Weights & Biases to resume')


def _add_naflex(parser: argparse.ArgumentParser) -> None:
    """Add the flags of timm's NaFlex loader, so that `resolve_args` can refuse them with the reason."""
    def add(*names: str, **kwargs: Any) -> None:
        parser.add_argument(*names, help=argparse.SUPPRESS, **kwargs)

    add('--naflex-loader', action='store_true')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024])
    add('--naflex-max-seq-len', type=int, default=576)
    add('--naflex-patch-sizes', type=int, nargs='+')
    add('--naflex-patch-size-probs', type=float, nargs='+')
    add('--naflex-loss-scale', default='linear', choices=('none', 'sqrt', 'linear'))
    add('--naflex-patchify-channels-first', action='store_true')


def recipe_names() -> List[str]:
    """Return the names of the recipes in this package."""
    return sorted(path.stem for path in _RECIPES.glob('*.yaml'))


def find_config(name: str) -> Path:
    """Return the YAML file of a `--config`: a file, or a recipe of this package.

    Args:
        name: Path of a file, name of a recipe, or `recipes/NAME.yaml`. A file wins over a recipe of the same name.

    Raises:
        FileNotFoundError: If there is neither.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():  # is_file() is False for a pipe
        return path
    recipe = _RECIPES / f'{path.stem}.yaml'
    if path.parent.name in ('', 'recipes') and path.suffix in ('', '.yaml') and recipe.is_file():
        return recipe
    raise FileNotFoundError(
        f'--config is {name!r}, expected a YAML file or the name of a recipe: {", ".join(recipe_names())}.')


def options_to_argv(config: Mapping[str, Any]) -> List[str]:
    """Return options, by their names in a YAML file, as a command line. Types and limits are then checked alike.

    Raises:
        ValueError: If a switch is neither true nor false.
    """
    actions = {action.dest: action for action in build_parser()._actions}
    argv = []
    for key, value in config.items():
        action = actions.get(str(key).replace('-', '_'))
        if action is None or action.dest == 'help':
            if value:  # timm's own args.yaml lists every flag it has, mostly unset
                _logger.warning(f'Unknown option {key!r} in the configuration file, ignored.')
            continue
        either = isinstance(action, argparse.BooleanOptionalAction)
        if value is None or value == [] or value is False and not action.default and not either:  # off, as without it
            continue
        flag = action.option_strings[-1] if action.option_strings else '--data-dir'
        if either and value is not False:
            flag = action.option_strings[0]
        if action.nargs == 0:
            if value is not True and not (either and value is False):
                raise ValueError(f'{key} is {value!r}, expected true or false.')
            argv.append(flag)
        elif action.nargs == '?' and value is True:
            argv.append(flag)
        elif isinstance(value, dict):
            argv += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)) or action.nargs in ('+', '*', 3):
            argv += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
        else:
            argv.append(f'{flag}={value}')
    return argv


def read_config(name: str) -> Dict[str, Any]:
    """Return the options in a YAML file or a recipe.

    Args:
        name: See `find_config`.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If the file cannot be read.
    """
    path = find_config(name)
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ValueError(f'configuration file {name}: {one_line(e)}') from e
    if not isinstance(config, dict):
        raise ValueError(f'configuration file {name}: expected "option: value" lines')
    return config


def given_options(argv: Sequence[str]) -> Set[str]:
    """Return the names of the options that a command line sets."""
    parser = build_parser()
    unset = argparse.Namespace(**{action.dest: None for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, unset)).items() if value is not None}


def parse_args(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, str]:
    """Parse the command line over the configuration file, if there is one.

    Returns:
        The options, and all of them as YAML text that `--config` reads again.
    """
    parser = build_parser()
    config_args, rest = build_config_parser().parse_known_args(argv)
    config_argv = []
    if config_args.config:
        try:
            config = read_config(config_args.config)
        except (FileNotFoundError, ValueError) as e:
            parser.error(str(e))
        if config.get('kd_distill_type') == 'logit' and not config.get('kd_model_name'):
            del config['kd_distill_type']  # timm writes its default into every args.yaml
        try:
            config_argv = options_to_argv(config)
        except ValueError as e:
            parser.error(f'configuration file {config_args.config}: {e}')
    args = parser.parse_args(rest, parser.parse_args(config_argv))
    given = given_options(rest)
    if 'epochs' in given:
        args.auto_epochs = False  # the command line wins
    if args.data and 'data_dir' not in given:
        args.data_dir = None  # DIR on the command line wins over the file's
    for key, value in vars(args).items():
        if isinstance(value, str) and value.startswith('~'):  # the shell leaves it in --output=~/runs and in quotes
            setattr(args, key, os.path.expanduser(value))
    if os.path.isdir(args.model) and not is_model(args.model):
        args.model = f'local-dir:{args.model}'
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    return args, args_text


def resolve_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check the options that need neither data nor model, and fill in those that depend on the machine or on files.

    Returns:
        A copy, which nothing changes later.

    Raises:
        ValueError: If a value is impossible, or options do not go together.
        FileNotFoundError: If a checkpoint does not exist.
    """
    _check_model(args)
    _check_files(args)
    _check_values(args)
    _check_combinations(args)
    _check_mixing(args)
    _check_teacher(args)
    _check_size_schedule(args)
    check_available(tensorboard=args.log_tensorboard, wandb=args.log_wandb)
    changes: Dict[str, Any] = {}
    if args.workers is None:
        changes['workers'] = default_workers()
    if not args.val_split:
        changes['eval_metric'] = 'loss'
    if args.eval_only:
        changes.update(_resolve_weights(args))
    return argparse.Namespace(**{**vars(args), **changes})


def _resolve_weights(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the options of --eval-only: where its weights are, and the input and model options of their training.

    Options of the command win.

    Raises:
        ValueError: If there is no run to evaluate.
    """
    resume = args.resume
    if resume == 'auto':
        folder = os.path.join(output_parent(args), args.experiment)
        resume = find_checkpoint(folder)
        if not resume:
            raise ValueError(f'--resume auto: there is no run in {folder!r}. Set its --output and --experiment.')
    model, file = resolve_model(args.model)
    checkpoint = args.initial_checkpoint or args.pretrained_path or file or resume
    changes = dict(model=model, initial_checkpoint=checkpoint, pretrained_path=None, pretrained=not checkpoint)
    changes['input_img_mode'] = args.input_img_mode or run_options(model, checkpoint).get('input_img_mode')
    return {**changes, **(_trained_options(args, training_args(checkpoint)) if checkpoint else {})}


def run_options(name: str, checkpoint: Optional[str] = None) -> Dict[str, Any]:
    """Return the options of the run that trained a model, from its `args.yaml` or its checkpoint; {} for other models.

    Raises:
        ValueError: If `args.yaml` in the folder cannot be read.
    """
    recorded = Path(name.removeprefix('local-dir:'), 'args.yaml')
    if recorded.is_file() and not is_model(name):
        try:
            return yaml.safe_load(recorded.read_text(encoding='utf-8')) or {}
        except (ValueError, yaml.YAMLError) as e:
            raise ValueError(f'{str(recorded)!r} cannot be read ({one_line(e)}). Repair it, or move it away.') from e
    weights = checkpoint or name
    return training_args(weights) if os.path.isfile(weights) else {}


def _trained_options(args: argparse.Namespace, saved: Dict[str, Any]) -> Dict[str, Any]:
    """Return the options for the input and the model that a checkpoint has and the command does not."""
    changes: Dict[str, Any] = {}
    keys = ['mean', 'std', 'crop_pct', 'interpolation', 'bn_eps', 'gp', 'num_classes']
    if not args.input_size and saved.get('input_size'):
        if not args.img_size:
            changes['input_size'] = [args.in_chans or saved['input_size'][0], *saved['input_size'][1:]]
        else:
            changes['in_chans'] = args.in_chans or saved['input_size'][0]
    elif not args.input_size:
        keys += ['img_size', 'in_chans']
    changes.update({key: saved[key] for key in keys if not getattr(args, key) and saved.get(key)})
    for key in ('model_kwargs', 'pretrained_cfg_overlay'):
        changes[key] = {**(saved.get(key) or {}), **getattr(args, key)}
    return changes


def output_parent(args: argparse.Namespace) -> str:
    """Return the parent of the output folders."""
    return args.output or os.path.join('.', 'output', 'train')


def _changed(args: argparse.Namespace, keys: Sequence[str]) -> List[str]:
    """Return those options that do not have their defaults."""
    parser = build_parser()
    return [key for key in keys if getattr(args, key) != parser.get_default(key)]


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _check_model(args: argparse.Namespace) -> None:
    try:
        name, checkpoint = resolve_model(args.model, flag='--initial-checkpoint')
    except ValueError as e:
        raise ValueError(f'--model: {e}') from None
    if checkpoint and (args.initial_checkpoint or args.pretrained_path or args.resume):
        raise ValueError(f'--model {args.model!r} has weights, and another flag names others. Give --model {name}.')
    if checkpoint and not args.eval_only:
        raise ValueError(f'--model {args.model!r} is a file. Give --model {name} --initial-checkpoint {checkpoint}.')
    for key in _changed(args, [key for key in vars(args) if key.startswith('naflex_')]):
        raise ValueError(
            f'{_flag(key)} is not supported: NaFlex feeds sequences of patches, and a DearKD student needs a grid of'
            ' tokens. Remove the flag. --train-img-sizes trains at several sizes.')


def _check_files(args: argparse.Namespace) -> None:
    for key, remedy in _FILES.items():
        path = getattr(args, key)
        if path and path != 'auto' and os.path.isdir(path):
            raise ValueError(f'{_flag(key)}: {path!r} is a folder. Name {remedy.format(path)}.')
        if path and path != 'auto' and not os.path.isfile(path):
            raise FileNotFoundError(f'{_flag(key)}: no file {path!r}.')


def _check_values(args: argparse.Namespace) -> None:
    for key in ('scale', 'ratio', 'cutmix_minmax'):
        values = getattr(args, key) or (1., 1.)
        least = 0. if key == 'cutmix_minmax' else 1e-9  # a crop of no area or no width is no image
        most = 1. if key == 'cutmix_minmax' else math.inf
        if len(values) != 2 or not least <= values[0] <= values[1] <= most:
            raise ValueError(
                f'{_flag(key)} is {" ".join(map(str, values))}, expected the least and the greatest value'
                f'{", of 0 to 1" if key == "cutmix_minmax" else ""}.')
    if args.opt_betas:
        num_betas = get_optimizer_info(args.opt.lower().split('_')[-1]).num_betas  # without lookahead_, as timm does
        if len(args.opt_betas) != num_betas:
            raise ValueError(f'--opt-betas has {len(args.opt_betas)} values, {args.opt} takes {num_betas}.')
    check_backend(args.torchcompile, args.torchcompile_mode)
    if args.torchcompile_mode in _CUDA_GRAPH_MODES and (args.kd_model_name or args.grad_accum_steps > 1):
        what = 'a teacher' if args.kd_model_name else '--grad-accum-steps'
        raise ValueError(
            f'--torchcompile-mode {args.torchcompile_mode} records CUDA graphs, which do not work with {what}: they'
            ' overwrite their outputs. Set --torchcompile-mode max-autotune-no-cudagraphs.')


def _check_combinations(args: argparse.Namespace) -> None:
    if args.eval_only and not args.val_split:
        raise ValueError('--eval-only looks at validation images. Set --val-split.')
    if args.resume == 'auto' and not args.experiment:
        raise ValueError('--resume auto resumes the run in the folder of --experiment, so it needs --experiment NAME.')
    if args.affine_aug and args.no_aug:
        raise ValueError('--affine-aug augments, and --no-aug does not. Remove one of them.')
    if args.layer_decay is not None and args.sched == 'none':
        raise ValueError('--layer-decay is applied by the schedule, and --sched is none. Set --sched constant.')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise ValueError('--sched plateau looks at epochs, so it does not go with --sched-on-updates. Remove that.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise ValueError('--amp keeps the weights in float32. Remove --model-dtype or --amp.')
    if args.torchscript and (args.torchcompile or args.sync_bn):
        raise ValueError('--torchscript does not go with --torchcompile or --sync-bn. Remove one of them.')
    if args.torchscript and args.eval_only:
        raise ValueError('--torchscript is for training. Remove it with --eval-only; in a file, torchscript: false.')


def _check_mixing(args: argparse.Namespace) -> None:
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    for flag, sizes in (('--batch-size', [args.batch_size]), ('--train-batch-sizes', args.train_batch_sizes or [])):
        odd = [size for size in sizes if size % 2]
        if mixes and odd:
            raise ValueError(f'{flag} has {odd[0]}, but --mixup and --cutmix pair the images up. Make it even.')
    if mixes and args.aug_splits:
        raise ValueError('--aug-splits does not go with --mixup or --cutmix. Remove one of them.')
    if args.aug_splits and args.no_prefetcher:
        raise ValueError('--aug-splits needs the prefetcher. Remove --no-prefetcher.')
    if args.aug_splits == 1 or ((args.jsd_loss or args.split_bn) and not args.aug_splits):
        raise ValueError(
            f'--aug-splits is {args.aug_splits}, expected 2 or more for --jsd-loss and --split-bn. Set --aug-splits 3.')


def _check_teacher(args: argparse.Namespace) -> None:
    for key in ('kd_teacher_checkpoint', 'kd_class_map'):
        if getattr(args, key) and not args.kd_model_name:
            raise ValueError(f'{_flag(key)} needs the architecture of the teacher: add --kd-model-name NAME.')
    taught = [key for keys in _TAUGHT.values() for key in keys]
    if args.dearkd_labels == 'teacher' and (args.bce_loss or args.jsd_loss):
        flag = '--bce-loss' if args.bce_loss else '--jsd-loss'
        raise ValueError(f'--dearkd-labels teacher does not go with {flag}: it has its own loss. Remove one of them.')
    for key in _changed(args, taught) if args.kd_model_name is None else ():
        raise ValueError(
            f'{_flag(key)} needs a teacher: add --kd-model-name NAME. An empty name ("") trains without a teacher.')


def check_distillation(args: argparse.Namespace, distill_type: str) -> None:
    """Refuse options of another kind of distillation than the student gets.

    With --kd-distill-type they only give a warning, because they may come from a recipe. Options that name a file are
    always refused.

    Raises:
        ValueError: If there is such an option, or the kind does not go with TorchScript.
    """
    if args.torchscript and distill_type == 'token':
        raise ValueError(
            '--torchscript does not go with --kd-distill-type token, which trains two heads that TorchScript merges.'
            ' Use --torchcompile.')
    if distill_type == 'dearkd' and not args.dearkd_soft_labels and _changed(args, ['kd_temperature']):
        message = '--kd-temperature is the temperature of soft labels, and DearKD learns hard ones'
        if args.kd_distill_type is None:
            raise ValueError(f'{message}. Add --dearkd-soft-labels, or remove the flag.')
        _logger.warning(f'{message}. It has no effect.')
    if args.kd_label_cache and args.dearkd_soft_labels:
        raise ValueError('--kd-label-cache keeps hard labels. Remove the flag, or --dearkd-soft-labels.')
    others = dict.fromkeys(key for keys in _TAUGHT.values() for key in keys if key not in _TAUGHT[distill_type])
    for key in _changed(args, list(others)):
        kinds = ' or '.join(kind for kind, keys in _TAUGHT.items() if key in keys)
        message = f'{_flag(key)} goes with --kd-distill-type {kinds}, this run has {distill_type}'
        if args.kd_distill_type is None or key in ('kd_class_map', 'kd_label_cache'):
            raise ValueError(f'{message}. Remove it, or choose the kind with --kd-distill-type.')
        _logger.warning(f'{message}. It has no effect.')


def _check_size_schedule(args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes
    for key in ('train_batch_sizes', 'train_size_probs'):
        given = getattr(args, key)
        if given and len(given) != len(sizes or ()):
            raise ValueError(
                f'{_flag(key)} has {len(given)} values for the {len(sizes or ())} of --train-img-sizes. Give as many.')
    if args.auto_epochs and sizes:
        raise ValueError('--auto-epochs does not go with --train-img-sizes. Set --epochs instead.')
    if args.train_size_schedule == 'progressive' and len(sizes or ()) < 2:
        raise ValueError('--train-size-schedule progressive needs two or more --train-img-sizes.')
    if (sizes or args.train_batches_per_epoch) and args.aug_splits:
        flag = '--train-img-sizes' if sizes else '--train-batches-per-epoch'
        raise ValueError(f'{flag} does not go with --aug-splits. Remove one of them.')
