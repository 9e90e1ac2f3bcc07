"""Options of the command that makes images, their defaults, and which go together."""
import argparse
from typing import Any, Collection, Dict

from timm_dearkd.commands import NON_NEGATIVE_INT, POSITIVE_INT, POSITIVE_SHARE, RATE, SHARE, add_device

from .dataset import FORMATS
from .generator import GENERATOR_WEIGHTS
from .inversion import BN_NORMS, DIVERSITIES, LossWeights, Resolution

MIN_PROB = 0.1  # by a verifier
WEIGHTS = ('tv', 'l2', 'bn', 'first_bn', 'ep', 'triplet', 'adi')


def _resolution(text: str) -> Resolution:
    try:
        size, steps, lr = text.split(':')
        return Resolution(POSITIVE_INT(size), POSITIVE_INT(steps), float(lr))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f'{text!r} is not SIZE:STEPS:LR, such as 112:2000:0.5') from None


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog='timm-dearkd data-free', description='Make training images from a CNN (DF-DearKD)')
    _add_image_arguments(parser)
    _add_loss_arguments(parser)
    add = parser.add_argument
    add('--betas', type=RATE, nargs=2, default=(0.5, 0.9), help="Adam's betas (default: 0.5 0.9)")
    add('--jitter', type=NON_NEGATIVE_INT, metavar='N',
        help='largest shift in pixels, at full size (default: size / 8)')
    add('--no-flip', action='store_true', help='do not mirror the images at random')
    add('--seed', type=NON_NEGATIVE_INT, default=0, help='random seed (default: %(default)s)')
    add('--format', default='folder', choices=FORMATS,
        help='image folder or WebDataset shards (default: %(default)s)')
    add('--resume', action='store_true', help='continue with the images in OUT')
    add_device(parser)
    add('--amp', action='store_true', help='run the CNN in bfloat16 (float16 would underflow)')
    add('--channels-last', action=argparse.BooleanOptionalAction, default=True,
        help='use the channels_last memory format (default: yes)')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the CNN and the losses (BACKEND: inductor; default: off)')
    return parser


def _add_image_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('output', metavar='OUT', help='folder of the new data set')
    add('--model', required=True, metavar='NAME', help='the CNN: timm name, hf-hub:, local-dir: or run folder')
    add('--checkpoint', metavar='FILE', help='weights of the CNN (default: its pretrained ones)')
    add('--mean', type=SHARE, nargs='+', metavar='MEAN',
        help="mean per channel with which the CNN was trained, of images from 0 to 1 (default: the CNN's)")
    add('--std', type=POSITIVE_SHARE, nargs='+', metavar='STD',
        help="standard deviation per channel with which the CNN was trained (default: the CNN's)")
    add('--num-images', type=POSITIVE_INT, required=True, metavar='N',
        help='images to make, rounded up to whole batches')
    add('--classes', nargs='+', metavar='INDEX', help='class indices, or ranges such as 0-9 (default: all)')
    add('--class-names', metavar='FILE', help="names of the CNN's classes, one per line (default: those it knows)")
    add('--generator', action='store_true',
        help='train a generator for each batch instead of optimising pixels: far cheaper per image')
    add('--classes-per-batch', type=POSITIVE_INT, metavar='N',
        help='different classes in a batch (default: 6; --generator: 20)')
    add('--images-per-class', type=POSITIVE_INT, metavar='N',
        help='images of each class in a batch (default: 7; --generator: up to 1920 in a batch)')
    add('--resolutions', nargs='+', type=_resolution, metavar='SIZE:STEPS:LR',
        help='phases (default: SIZE/2:2000:0.5 SIZE:2000:0.01, where SIZE is --img-size; --generator: SIZE:400:0.005)')
    add('--img-size', type=POSITIVE_INT, metavar='N',
        help="side length of the images in pixels, without --resolutions (default: the CNN's)")


def _add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    paper, ours = LossWeights(), GENERATOR_WEIGHTS
    add = parser.add_argument
    add('--diversity', choices=DIVERSITIES,
        help='none (DeepInversion), adi (competes with --student) or intra (the paper) (default: intra; --generator:'
        ' none)')
    add('--student', metavar='NAME', help='competitor of --diversity adi')
    add('--student-checkpoint', metavar='FILE', help='weights of --student (default: its pretrained ones)')
    add('--verifier', metavar='NAME', help='keep only images to whose class this network gives --min-prob')
    add('--verifier-checkpoint', metavar='FILE', help='weights of --verifier (default: its pretrained ones)')
    add('--min-prob', type=SHARE, metavar='P',
        help=f'least probability by --verifier of an image to keep (default: {MIN_PROB})')
    for name, text in (
        ('tv', 'total variation'), ('l2', 'l2 norm'), ('bn', 'BatchNorm statistics'),
        ('first-bn', 'first BatchNorm layer (the others have 1)'), ('ep', 'easiest-positive loss'),
        ('triplet', 'triplet loss'), ('adi', 'competition with --student'),
    ):
        values = [getattr(weights, name.replace('-', '_')) for weights in (paper, ours)]
        own = 'by a pilot' if name in ('bn', 'ep', 'triplet', 'adi') else values[1]
        other = f'; --generator: {own}' if own != values[0] else ''
        add(f'--{name}-weight', type=float, metavar='W', help=f'weight of the {text} (default: {values[0]}{other})')
    add('--latent', choices=('raw', 'normalized'),
        help='features that --diversity intra compares: as they are, or of length 1 (default: raw)')
    add('--margin', type=float, help=f'margin of the triplet loss (default: {paper.margin})')
    add('--adi-temperature', type=float, metavar='T',
        help=f'softmax temperature of --diversity adi (default: {paper.adi_temperature})')
    add('--bn-norm', choices=BN_NORMS,
        help="relative divides differences by the layer's own deviation and variance; averaged also takes the mean over"
        ' channels and layers (default: absolute; --generator: averaged)')


def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the defaults of --generator or of the optimisation of pixels.

    Raises:
        ValueError: If an option has no effect.
    """
    preset = GENERATOR_WEIGHTS if args.generator else LossWeights()
    defaults: Dict[str, Any] = {f'{name}_weight': getattr(preset, name) for name in WEIGHTS}
    defaults.update(
        classes_per_batch=20 if args.generator else 6, diversity='none' if args.generator else 'intra',
        bn_norm=preset.bn_norm, latent='raw', margin=preset.margin, adi_temperature=preset.adi_temperature,
        min_prob=MIN_PROB)
    given = {key: value for key, value in vars(args).items() if value is not None}
    filled = argparse.Namespace(**{**vars(args), **defaults, **given})
    _refuse_unused(filled, given)
    return filled


def _refuse_unused(args: argparse.Namespace, given: Collection[str]) -> None:
    """Raise an error for a given option that has no effect."""
    for is_used, condition, names in (
        (args.diversity == 'intra', 'with --diversity intra', ('ep_weight', 'triplet_weight', 'margin', 'latent')),
        (args.diversity == 'adi', 'with --diversity adi', ('adi_weight', 'adi_temperature', 'student')),
        (args.student, 'with --student NAME', ('student_checkpoint',)),
        (args.verifier, 'with --verifier NAME', ('min_prob', 'verifier_checkpoint')),
        (not args.generator, 'without --generator', ('jitter',)),
        (not args.resolutions, 'without --resolutions', ('img_size',)),
    ):
        for name in names:
            if name in given and not is_used:
                flag = f'--{name.replace("_", "-")}'
                raise ValueError(
                    f'{flag} {getattr(args, name)} has an effect only {condition}. Remove {flag}, or run the command'
                    f' {condition}.')
