"""The command line of train.py: timm's flags with timm's defaults, DearKD's own, and YAML files of either."""
import argparse
import logging
import os
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

import yaml
from timm.models import is_model
from timm.utils import ParseKwargs

__all__ = ['build_config_parser', 'build_parser', 'parse_args']

_logger = logging.getLogger(__name__)


class _ParseKwargs(ParseKwargs):
    """timm's KEY=VALUE pairs, with a message for what is none."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value and '=' not in value:
                parser.error(f'argument {option_string}: {value!r} is not of the form KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, for the usage of 150 flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def build_config_parser() -> argparse.ArgumentParser:
    """Parser of `--config` alone, which is read before everything else."""
    parser = argparse.ArgumentParser(description='Training configuration', add_help=False)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file of options; the command line wins over it')
    return parser


def build_parser() -> argparse.ArgumentParser:
    """Parser of everything but `--config`."""
    parser = _Parser(
        prog='train.py',
        description='Train a timm model, alone or taught by a CNN with DearKD',
        epilog='-c FILE, --config FILE reads options from a YAML file; the command line wins over it.',
    )
    _add_dearkd(parser.add_argument_group('DearKD'))
    _add_distillation(parser.add_argument_group("timm's distillation"))
    _add_data(parser.add_argument_group('Data'))
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
    add('--kd-model-name', metavar='NAME', help='teacher, any timm name, local-dir: and hf-hub: included')
    add('--kd-teacher-checkpoint', metavar='FILE', help="weights of the teacher; without it, timm's pretrained ones")
    add('--kd-teacher-img-size', type=int, metavar='N', help="size at which the teacher sees the images (student's)")
    add('--kd-class-map', metavar='FILE', help="the teacher's class index per line, for each of the student's classes")
    add('--kd-distill-type', choices=('dearkd', 'logit', 'feature', 'token'),
        help="kind of distillation; dearkd where the student has tokens, timm's logit elsewhere")
    add('--dearkd-stage1-epochs', type=int, metavar='N', help='epochs of stage I (5/6 of the epochs)')
    add('--dearkd-stage2', default='anneal', choices=('anneal', 'ce'),
        help='stage II: fade the teacher out, or go on without it')
    add('--dearkd-alpha', type=float, default=0.5, help='weight of the label loss in Eq. 6')
    add('--dearkd-beta', type=float, default=10.0, help='weight of the hidden loss in Eq. 6; 0 is logits alone')
    add('--dearkd-hooks', nargs='+', default=['4'], metavar='BLOCK[:LAYER]',
        help='student block and teacher stage number or module name, e.g. 4 or 4:2 or 4:s2.b4')
    add('--dearkd-normalize-features', action=argparse.BooleanOptionalAction, default=True,
        help="divide the teacher's feature maps by their standard deviation per channel, that of the first batch")
    add('--dearkd-rpe-drop', type=float, metavar='RATE', help='dropout rate of the positional scores of MHCA')
    add('--dearkd-rpe-drop-mode', choices=('element', 'query'),
        help='what is dropped at once: single scores (the default), or all scores of a token, which is faster')


def _add_distillation(group) -> None:
    add = group.add_argument
    add('--kd-loss-type', default='kl', help="loss of 'logit'")
    add('--distill-loss-weight', type=float)
    add('--task-loss-weight', type=float)
    add('--kd-temperature', type=float, default=4.0)
    add('--kd-student-feature-dim', type=int)
    add('--kd-teacher-feature-dim', type=int)
    add('--kd-token-distill-type', default='soft', choices=('soft', 'hard'))


def _add_data(group) -> None:
    add = group.add_argument
    add('data', nargs='?', metavar='DIR', help='data set folder')
    add('--data-dir', metavar='DIR', help='data set folder')
    add('--dataset', default='', help="type and name ('' is an image folder)")
    add('--train-split', default='train', help='training split: a folder in DIR, or a path (train)')
    add('--val-split', default='validation',
        help="validation split, as --train-split; '' trains without one (validation)")
    add('--train-num-samples', type=int, help='of streamed data sets that do not say it')
    add('--val-num-samples', type=int)
    add('--train-fraction', type=float, default=1., help='train on this share of every class, always the same images')
    add('--fraction-seed', type=int, default=0, help='which images those are')
    add('--fraction-keep', default='epochs', choices=('epochs', 'steps'),
        help='with fewer images, train for as many epochs, or for as many steps as with all of them')
    add('--dataset-download', action='store_true')
    add('--class-map', default='', metavar='FILE', help='class names, one per line, in the order of their indices')
    add('--input-img-mode', help='image mode, RGB or L (by the number of channels)')
    add('--input-key')
    add('--target-key')
    add('--dataset-trust-remote-code', action='store_true')
    add('-j', '--workers', type=int, help='data loading processes (4, or fewer on fewer cores)')
    add('--pin-mem', action=argparse.BooleanOptionalAction,
        help='load into page-locked memory, for faster copies to the device (on CUDA)')
    add('--no-prefetcher', action='store_true')
    add('--use-multi-epochs-loader', action='store_true')
    add('--worker-seeding', default='all', help='for streamed data sets; others are seeded by seed, epoch and place')
    add('--train-img-sizes', type=int, nargs='+', metavar='N', help='train at several sizes, one per batch')
    add('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch size of each (--batch-size)')
    add('--train-size-probs', type=float, nargs='+', metavar='P', help='how often each of them comes (all alike)')
    add('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
        help='mix them all the time, or move from the first to the last')
    add('--train-size-schedule-spread', type=float, default=0.65, help='how many neighbours take part in that')
    add('--train-size-random-mix', type=float, default=0.1, help='share of any size in that')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N')
    add('--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
        help='scale the loss of a batch by its size, relative to --batch-size')


def _add_model(group) -> None:
    add = group.add_argument
    add('--model', default='resnet50', metavar='NAME', help='timm model, or the output folder of a run (resnet50)')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='start from this file as if it were the pretrained weights')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=_ParseKwargs,
        help='change entries of the pretrained configuration')
    add('--initial-checkpoint', default='', metavar='FILE', help='load into the model after it is made')
    add('--resume', default='', metavar='FILE',
        help="continue a run from its checkpoint; 'auto': go on in the folder of --experiment, or start there")
    add('--no-resume-opt', action='store_true', help='but with a fresh optimizer')
    add('--num-classes', type=int, help="number of classes (those of the image folder, else the model's)")
    add('--gp', help='global pooling')
    add('--model-kwargs', nargs='*', default={}, action=_ParseKwargs)
    add('--head-init-scale', type=float)
    add('--head-init-bias', type=float)
    add('--grad-checkpointing', action='store_true')
    add('--fast-norm', action='store_true')
    add('--torchscript', action='store_true', help='script the model (CNNs and plain ViTs)')
    add('--fuser', default='', help="TorchScript's fuser: te, old or nvfuser")


def _add_input(group) -> None:
    add = group.add_argument
    add('--img-size', type=int)
    add('--in-chans', type=int)
    add('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'))
    add('--crop-pct', type=float)
    add('--mean', type=float, nargs='+')
    add('--std', type=float, nargs='+')
    add('--interpolation', default='')
    add('-b', '--batch-size', type=int, default=128)
    add('-vb', '--validation-batch-size', type=int)


def _add_device(group) -> None:
    add = group.add_argument
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add('--amp', action=argparse.BooleanOptionalAction, default=False, help='automatic mixed precision')
    add('--amp-dtype', default='float16')
    add('--model-dtype')
    add('--channels-last', action=argparse.BooleanOptionalAction, default=False)
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile student and teacher')
    add('--torchcompile-mode')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DistributedDataParallel')
    add('--deterministic', action='store_true',
        help='use deterministic kernels: a run repeats bit for bit on the same device, at some cost in speed')
    add('--synchronize-step', action='store_true', help='wait for the device after every step')
    add('--local_rank', type=int, default=0, help='ignored; torchrun sets it in the environment')
    add('--device-modules', nargs='+', metavar='MODULE', help='modules to import first, for their devices or models')


def _add_optimizer(group) -> None:
    add = group.add_argument
    add('--opt', default='sgd')
    add('--opt-eps', type=float)
    add('--opt-betas', type=float, nargs='+')
    add('--momentum', type=float, default=0.9)
    add('--weight-decay', type=float, default=2e-5)
    add('--clip-grad', type=float)
    add('--clip-mode', default='norm', help='norm, value or agc')
    add('--layer-decay', type=float)
    add('--layer-decay-min-scale', type=float, default=0)
    add('--layer-decay-no-opt-scale', type=float)
    add('--opt-kwargs', nargs='*', default={}, action=_ParseKwargs)
    add('--grad-accum-steps', type=int, default=1)


def _add_schedule(group) -> None:
    add = group.add_argument
    add('--sched', default='cosine')
    add('--sched-on-updates', action='store_true')
    add('--lr', type=float, help='learning rate; without it, lr-base scaled by the batch size')
    add('--lr-base', type=float, default=0.1)
    add('--lr-base-size', type=int, default=256)
    add('--lr-base-scale', default='', help='linear or sqrt (by the optimizer)')
    add('--lr-noise', type=float, nargs='+')
    add('--lr-noise-pct', type=float, default=0.67)
    add('--lr-noise-std', type=float, default=1.0)
    add('--lr-cycle-mul', type=float, default=1.0)
    add('--lr-cycle-decay', type=float, default=0.5)
    add('--lr-cycle-limit', type=int, default=1)
    add('--lr-k-decay', type=float, default=1.0)
    add('--warmup-lr', type=float, default=1e-5)
    add('--min-lr', type=float, default=0)
    add('--epochs', type=int, default=300)
    add('--epoch-repeats', type=float, default=0., help='of streamed data sets')
    add('--start-epoch', type=int)
    add('--stop-epoch', type=int, metavar='N', help='stop after N epochs; schedules stay those of the whole run')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270])
    add('--decay-epochs', type=float, default=90)
    add('--warmup-epochs', type=int, default=5)
    add('--warmup-prefix', action='store_true')
    add('--cooldown-epochs', type=int, default=0)
    add('--patience-epochs', type=int, default=10)
    add('--decay-rate', '--dr', type=float, default=0.1)


def _add_augmentation(group) -> None:
    add = group.add_argument
    add('--no-aug', action='store_true')
    add('--train-crop-mode')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0])
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.])
    add('--hflip', type=float, default=0.5)
    add('--vflip', type=float, default=0.)
    add('--color-jitter', type=float, default=0.4)
    add('--color-jitter-prob', type=float)
    add('--grayscale-prob', type=float)
    add('--gaussian-blur-prob', type=float)
    add('--aa', metavar='NAME', help='AutoAugment policy, e.g. rand-m9-mstd0.5-inc1')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation: each image N times')
    add('--aug-splits', type=int, default=0, metavar='N', help='augment every image N times, first time lightly')
    add('--reprob', type=float, default=0., help='random erasing probability')
    add('--remode', default='pixel')
    add('--recount', type=int, default=1)
    add('--resplit', action='store_true')
    add('--train-interpolation', default='random')


def _add_loss(group) -> None:
    add = group.add_argument
    add('--jsd-loss', action='store_true', help='Jensen-Shannon divergence over the --aug-splits')
    add('--bce-loss', action='store_true')
    add('--bce-sum', action='store_true')
    add('--bce-target-thresh', type=float)
    add('--bce-pos-weight', type=float)
    add('--smoothing', type=float, default=0.1)
    add('--mixup', type=float, default=0.)
    add('--cutmix', type=float, default=0.)
    add('--cutmix-minmax', type=float, nargs='+')
    add('--mixup-prob', type=float, default=1.)
    add('--mixup-switch-prob', type=float, default=0.5)
    add('--mixup-mode', default='batch')
    add('--mixup-off-epoch', type=int, default=0, metavar='N')


def _add_regularization(group) -> None:
    add = group.add_argument
    add('--drop', type=float, default=0.)
    add('--drop-connect', type=float, help='the old name of --drop-path')
    add('--drop-path', type=float)
    add('--drop-block', type=float)
    add('--bn-momentum', type=float)
    add('--bn-eps', type=float)
    add('--sync-bn', action='store_true', help='one BatchNorm over all processes')
    add('--dist-bn', default='reduce', help='after an epoch, average (reduce) or broadcast BatchNorm statistics')
    add('--split-bn', action='store_true', help='a BatchNorm per augmentation split')
    add('--model-ema', action='store_true', help='evaluate and export an exponential moving average of the weights')
    add('--model-ema-force-cpu', action='store_true')
    add('--model-ema-decay', type=float, default=0.9998)
    add('--model-ema-warmup', action='store_true')


def _add_run(group) -> None:
    add = group.add_argument
    add('--seed', type=int, default=42)
    add('--output', default='', metavar='DIR', help='parent of the output folder (./output/train)')
    add('--experiment', default='', metavar='NAME', help='name of the output folder (date, model and size)')
    add('--log-interval', type=int, default=50, metavar='N')
    add('--val-interval', type=int, default=1, metavar='N')
    add('--recovery-interval', type=int, default=0, metavar='N', help='updates between checkpoints within an epoch')
    add('--save-epochs', type=int, nargs='+', default=[], metavar='N',
        help='evaluate after N epochs, and keep that checkpoint as milestone-N')
    add('--checkpoint-hist', type=int, default=10, metavar='N')
    add('--skip-nan-steps', type=int, default=0, metavar='N',
        help='leave out up to N steps whose loss is not finite, rather than stop')
    add('--eval-metric', default='top1')
    add('--eval-only', action='store_true', help='evaluate the model on the validation split, and print JSON')
    add('--tta', type=int, default=0, metavar='N', help='2: evaluate each image with its mirror image')
    add('--save-images', action='store_true', help='write the training batches of the log lines')
    add('--track-attention-distance', action='store_true',
        help='after every epoch, write how far the heads look on 32 validation images')
    add('--report', action='store_true', help='write report.html at the end')


def _add_logging(group) -> None:
    add = group.add_argument
    add('--log-tensorboard', action='store_true', help='write TensorBoard events into the output folder')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project')
    add('--wandb-tags', nargs='+', default=[])
    add('--wandb-resume-id', default='')


def _add_naflex(parser) -> None:
    """Flags of timm's NaFlex loader, known so as to say why they do not apply; see `check_args`."""
    def add(*names: str, **kwargs: Any) -> None:
        parser.add_argument(*names, help=argparse.SUPPRESS, **kwargs)

    add('--naflex-loader', action='store_true')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024])
    add('--naflex-max-seq-len', type=int, default=576)
    add('--naflex-patch-sizes', type=int, nargs='+')
    add('--naflex-patch-size-probs', type=float, nargs='+')
    add('--naflex-loss-scale', default='linear', choices=('none', 'sqrt', 'linear'))
    add('--naflex-patchify-channels-first', action='store_true')


def _config_argv(config: Dict[str, Any], parser: argparse.ArgumentParser) -> List[str]:
    """A YAML mapping as the command line that says the same, so that types and choices are checked alike."""
    actions = {action.dest: action for action in parser._actions}
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
                parser.error(f'configuration file: {key} is {value!r}, expected true or false')
            argv.append(flag)
        elif action.nargs == '?' and value is True:
            argv.append(flag)
        elif isinstance(value, dict):
            argv += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)] if action.nargs in ('+', '*', 3) else [f'{flag}={value}']
    return argv


def parse_args(
        parser: argparse.ArgumentParser,
        config_parser: argparse.ArgumentParser,
        argv: Optional[Sequence[str]] = None,
) -> Tuple[argparse.Namespace, str]:
    """Parse the command line over the configuration file, if there is one.

    Returns:
        The options, and all of them as YAML text that `--config` reads again.
    """
    config_args, rest = config_parser.parse_known_args(argv)
    config_argv = []
    if config_args.config:
        try:
            with open(config_args.config, encoding='utf-8') as f:
                config = yaml.safe_load(f) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            parser.error(f'configuration file {config_args.config}: {" ".join(str(e).split())}')
        if not isinstance(config, dict):
            parser.error(f'configuration file {config_args.config}: expected "option: value" lines')
        if config.get('kd_distill_type') == 'logit' and not config.get('kd_model_name'):
            del config['kd_distill_type']  # timm writes its default into every args.yaml
        config_argv = _config_argv(config, parser)
    args = parser.parse_args(rest, parser.parse_args(config_argv))
    if args.data and not parser.parse_args(rest).data_dir:
        args.data_dir = None  # the file's
    if os.path.isdir(args.model) and not is_model(args.model):
        args.model = f'local-dir:{args.model}'
    args_text = yaml.safe_dump(vars(args), default_flow_style=False)
    return args, args_text
