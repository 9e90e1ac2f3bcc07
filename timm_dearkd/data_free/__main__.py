"""Make training images out of a CNN: `python -m timm_dearkd.data_free OUT --model NAME --checkpoint FILE`."""
import argparse
import logging
import math
import shlex
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import resolve_model_data_config
from timm.utils import setup_default_logging
from tqdm import tqdm

import timm_dearkd
from distill_hooks import create_teacher
from distill_hooks.errors import first_line
from distill_hooks.teacher import input_normalisation, weights_fingerprint
from timm_dearkd.analysis.inputs import label_names
from timm_dearkd.commands import run_command
from timm_dearkd.engine.device import Precision, Ranks, check_backend, compile_errors, select_device
from timm_dearkd.files import write_bytes

from .dataset import FORMATS, SyntheticSet, folder_name
from .inversion import DIVERSITIES, Inverter, LossWeights, Resolution, batch_targets, spectator
from .look import contact_sheet, loss_curves

_logger = logging.getLogger(__name__)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not 0, 1, 2, ...')
    return int(text)


def _count(text: str) -> int:
    if not _natural(text):
        raise argparse.ArgumentTypeError(f'{text!r}, expected 1 or more')
    return int(text)


def _beta(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not from 0 to below 1')
    return float(text)


def _resolution(text: str) -> Resolution:
    try:
        size, steps, lr = text.split(':')
        return Resolution(_count(size), _count(steps), float(lr))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f'{text!r} is not SIZE:STEPS:LR, such as 112:2000:0.5') from None


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    defaults = LossWeights()
    parser = argparse.ArgumentParser(
        prog='python -m timm_dearkd.data_free', description='Make training images out of a CNN (DF-DearKD)')
    add = parser.add_argument
    add('output', metavar='OUT', help='folder of the new data set')
    add('--model', required=True, metavar='NAME', help='the CNN: a timm name, hf-hub:, local-dir: or a run folder')
    add('--checkpoint', metavar='FILE', help='its weights (its pretrained ones)')
    add('--num-images', type=_count, required=True, metavar='N', help='images to make, rounded up to whole batches')
    add('--classes', nargs='+', metavar='INDEX', help='classes, or ranges such as 0-9 (all)')
    add('--class-names', metavar='FILE', help="names of all the CNN's classes, one per line (those it knows)")
    add('--classes-per-batch', type=_count, default=6)
    add('--images-per-class', type=_count, default=7, help='images of each class in a batch')
    add('--resolutions', nargs='+', type=_resolution, metavar='SIZE:STEPS:LR',
        help='phases (half the size of the CNN: 2000 steps at 0.5, then all of it: 2000 at 0.01)')
    add('--img-size', type=_count, help="size of the images (the CNN's), where --resolutions does not say")
    add('--diversity', default='intra', choices=DIVERSITIES,
        help='none (DeepInversion), adi (competition with --student), intra (the intra-divergence loss)')
    add('--student', metavar='NAME', help='competitor of adi')
    add('--student-checkpoint', metavar='FILE')
    add('--verifier', metavar='NAME', help='keep an image only if this CNN gives its class --min-prob')
    add('--verifier-checkpoint', metavar='FILE')
    add('--min-prob', type=float, default=0.1)
    for name, text in (
        ('tv', 'total variation'), ('l2', 'l2 norm'), ('bn', 'BatchNorm statistics'),
        ('first-bn', 'first BatchNorm layer among them'), ('ep', 'easiest positive'), ('triplet', 'triplet loss'),
        ('adi', 'competition'),
    ):
        add(f'--{name}-weight', type=float, default=getattr(defaults, name.replace('-', '_')), help=f'weight: {text}')
    add('--margin', type=float, default=defaults.margin, help='of the triplet loss')
    add('--adi-temperature', type=float, default=defaults.adi_temperature)
    add('--bn-norm', default='absolute', choices=('absolute', 'relative'),
        help="relative divides the differences by the layer's running deviation and variance")
    add('--betas', type=_beta, nargs=2, default=(0.5, 0.9), help="Adam's")
    add('--jitter', type=_natural, help='largest shift in pixels, at full size (size / 8)')
    add('--no-flip', action='store_true')
    add('--seed', type=_natural, default=0)
    add('--format', default='folder', choices=FORMATS, help='image folder, or WebDataset shards')
    add('--resume', action='store_true', help='go on with the images in OUT')
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add('--amp', action='store_true', help="bfloat16 (float16 would lose the BatchNorm statistics' gradients)")
    add('--channels-last', action=argparse.BooleanOptionalAction, default=True)
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    return parser


def parse_classes(texts: Optional[Sequence[str]], num_classes: int) -> List[int]:
    """Class indices out of indices and ranges.

    Raises:
        ValueError: No index, or one that the CNN has not.
    """
    classes: List[int] = []
    for text in texts or [f'0-{num_classes - 1}']:
        first, _, last = text.partition('-')
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f'--classes has {text!r}, expected an index such as 3 or a range such as 0-9.')
        if int(last or first) < int(first):
            raise ValueError(f'--classes has {text!r}, whose end is before its beginning.')
        classes += range(int(first), int(last or first) + 1)
    outside = [index for index in classes if index >= num_classes]
    if outside:
        raise ValueError(f'--classes names class {outside[0]}, but the CNN has classes 0 to {num_classes - 1}.')
    return sorted(set(classes))


def read_class_names(path: Optional[str], model: torch.nn.Module) -> List[str]:
    """Names of all the CNN's classes: from a file, from what it was trained on, else their numbers.

    Raises:
        ValueError: A file with more or fewer names than the CNN has classes.
    """
    count: int = model.num_classes  # type: ignore[assignment]
    names = label_names(model) or []
    if path:
        with open(path, encoding='utf-8') as f:
            names = [line.strip() for line in f if line.strip()]
        if len(names) != count:
            raise ValueError(f'--class-names {path} has {len(names)} names, the CNN {count} classes.')
    if len(names) != count:
        names = [f'{index:0{len(str(count - 1))}d}' for index in range(count)]
    names = [folder_name(name, index) for index, name in enumerate(names)]
    if len(set(names)) < len(names):
        names = [f'{name} {index}' if names.count(name) > 1 else name for index, name in enumerate(names)]
    return names


def match_classes(model: Any, names: Sequence[str], role: str) -> List[int]:
    """The CNN's class for each class of another network: by name, where it has names of the CNN's, else by number.

    Args:
        model: The other network.
        names: Of the CNN's classes.
        role: What to call it.

    Raises:
        ValueError: A network of other classes.
    """
    own = [folder_name(name, i) for i, name in enumerate((model.pretrained_cfg or {}).get('label_names') or ())]
    if own and set(own) <= set(names):
        return [names.index(name) for name in own]
    if model.num_classes != len(names):
        raise ValueError(
            f'The {role} knows {model.num_classes} classes, the CNN {len(names)}, and their names do not say which'
            f' is which. Take a {role} that was trained on the same classes.')
    return list(range(len(names)))


def make_inverter(args, model, config: Dict[str, Any], names: Sequence[str], precision: Precision) -> Inverter:
    """The optimiser with the settings of the command."""
    size = args.img_size or config['input_size'][-1]
    resolutions = args.resolutions or [Resolution(size // 2, 2000, 0.5), Resolution(size, 2000, 0.01)]
    student, student_classes = None, None
    if args.student:
        student = create_teacher(args.student, args.student_checkpoint, device=precision.device)
        student_classes = match_classes(student, names, 'student')
    return Inverter(
        model,
        config['mean'],
        config['std'],
        resolutions,
        LossWeights(
            args.tv_weight, args.l2_weight, args.bn_weight, args.first_bn_weight, args.ep_weight, args.triplet_weight,
            args.margin, args.adi_weight, args.adi_temperature),
        bn_relative=args.bn_norm == 'relative',
        diversity=args.diversity,
        student=student,
        student_classes=student_classes,
        jitter=max(r.size for r in resolutions) // 8 if args.jitter is None else args.jitter,
        flip=not args.no_flip,
        betas=tuple(args.betas),
        autocast=precision.autocast,
        channels_last=args.channels_last,
        compile=args.torchcompile,
    )


class Judge:
    """Probabilities that CNNs give the targets of finished images, as they are stored.

    Args:
        model: The CNN that the images are made of.
        verifier: An independent one, which may have its classes in another order.
        names: Of the classes of `model`.
        config: timm's data configuration of `model`.
        min_prob: What the verifier has to give.

    Raises:
        ValueError: A verifier of other classes.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            verifier: Optional[torch.nn.Module],
            names: Sequence[str],
            config: Dict[str, Any],
            min_prob: float,
    ) -> None:
        self.mean, self.std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
        self.model = model
        self.verifier = None
        if verifier is not None:
            classes = match_classes(verifier, names, 'verifier')
            if len(classes) < len(names):
                raise ValueError(
                    f'The verifier knows {len(classes)} of the {len(names)} classes. Take one that was trained on all.')
            self.verifier = spectator(verifier, config['mean'], config['std'])
            self.verifier_classes = torch.tensor(classes).argsort()  # the verifier's for each of the CNN's
        self.min_prob = min_prob

    def check_size(self, size: int) -> None:
        """Show an image of that many pixels a side to the verifier, if there is one.

        Raises:
            ValueError: It does not take it.
        """
        if self.verifier is None:
            return
        pixels = torch.zeros(1, size, size, self.mean.shape[1], dtype=torch.uint8)
        try:
            self.records(pixels, torch.zeros(1, dtype=torch.long))
        except (RuntimeError, AssertionError) as e:
            raise ValueError(
                f'The verifier does not take images of {size} pixels ({first_line(e)}). Take another one.'
            ) from e

    def to_uint8(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) as pixels (B, H, W, C)."""
        pixels = (images.cpu() * self.std + self.mean) * 255
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def records(self, pixels: torch.Tensor, targets: torch.Tensor) -> List[Dict[str, Any]]:
        """What the manifest says of each image."""
        device = next(self.model.parameters()).device
        images = ((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(device)

        def probabilities(logits: torch.Tensor, classes: torch.Tensor) -> List[float]:
            return logits.float().softmax(1).gather(1, classes.to(device)[:, None])[:, 0].tolist()

        teacher = probabilities(self.model(images), targets)
        verifier: List[Optional[float]] = [None] * len(targets)
        if self.verifier is not None:
            logits, _ = self.verifier(images, with_features=False)
            verifier = list(probabilities(logits, self.verifier_classes[targets]))
        return [
            dict(target=target, teacher_prob=round(p, 4), verifier_prob=None if v is None else round(v, 4),
                 kept=v is None or v >= self.min_prob)
            for target, p, v in zip(targets.tolist(), teacher, verifier)
        ]


def make_batch(
        batch: int,
        targets: torch.Tensor,
        inverter: Inverter,
        seed: int,
        on_check: Callable[[int], None],
) -> Tuple[Any, List[Dict[str, float]]]:
    """The images of a batch and its losses by step. One that is lost is tried once more; then there are no images."""
    losses: List[Dict[str, float]] = []

    def check(step: int, values: Dict[str, float]) -> None:
        losses.append(dict(step=step, **values))
        on_check(step)

    for attempt in range(2):
        losses.clear()
        seeds = np.random.SeedSequence((seed, batch, attempt)).generate_state(1)
        images = inverter.run(targets, int(seeds[0]), check)
        if images is not None:
            return images, losses
        _logger.warning(f'Batch {batch}: the loss is not finite at step {losses[-1]["step"]}'
                        f' ({"trying another seed" if attempt == 0 else "it is left out"}).')
    return None, losses


def to_image(pixels: torch.Tensor) -> Image.Image:
    array = pixels.numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def run(args) -> None:
    """Make the images."""
    check_backend(args.torchcompile)
    device, ranks = select_device(args.device)
    precision = Precision(device, torch.bfloat16 if args.amp else None)
    model: Any = create_teacher(args.model, args.checkpoint, device=device)
    config = resolve_model_data_config(model)
    config['mean'], config['std'] = (values.tolist() for values in input_normalisation(model, model.in_chans))
    indices = parse_classes(args.classes, model.num_classes)
    names = read_class_names(args.class_names, model)
    if not 1 <= model.in_chans <= 4:
        raise ValueError(f'The CNN takes {model.in_chans} channels. Images can be made of 1 (grey) to 4 of them.')
    inverter = make_inverter(args, model, config, names, precision)
    inverter.check_sizes()
    verifier = None
    if args.verifier:
        verifier = create_teacher(args.verifier, args.verifier_checkpoint, device=device)
    judge = Judge(model, verifier, names, config, args.min_prob)
    judge.check_size(inverter.size)
    skipped = ('output', 'resume', 'device', 'format', 'classes', 'class_names', 'num_images')
    settings = {
        **{key: value for key, value in vars(args).items() if key not in skipped},
        'resolutions': [list(resolution) for resolution in inverter.resolutions],
        'betas': list(args.betas),
        'num_images': args.num_images,
        'weights': [weights_fingerprint(m) for m in (model, inverter.student, verifier) if m is not None],
        'versions': dict(timm_dearkd=timm_dearkd.__version__, torch=torch.__version__, timm=timm.__version__),
    }
    dataset = SyntheticSet(
        args.output, {index: names[index] for index in indices}, settings, args.format, args.resume)
    size = min(args.classes_per_batch, len(indices)) * args.images_per_class
    if args.num_images % size and ranks.is_primary:
        _logger.info(
            f'--num-images {args.num_images} is rounded up to {math.ceil(args.num_images / size) * size}, a multiple of'
            f' the batch: {size // args.images_per_class} classes with {args.images_per_class} images each. Set'
            ' --classes-per-batch or --images-per-class lower for a smaller one.')
    targets = batch_targets(
        math.ceil(args.num_images / size), indices, args.classes_per_batch, args.images_per_class, args.seed)
    todo = [batch for batch in range(len(targets)) if not dataset.is_done(batch)]
    if ranks.distributed:
        dist.barrier()  # all have looked before one writes
    if ranks.is_primary:
        dataset.start()
    make_images(dataset, targets, todo[ranks.rank::ranks.world_size], inverter, judge, args.seed, ranks)
    if ranks.is_primary:
        while not all(dataset.is_done(batch) for batch in todo):  # the other processes may take hours longer
            time.sleep(0.2)
        report(args, dataset, model)


def make_images(
        dataset: SyntheticSet,
        targets: Sequence[torch.Tensor],
        todo: Sequence[int],
        inverter: Inverter,
        judge: Judge,
        seed: int,
        ranks: Ranks,
) -> None:
    """Make the batches `todo` of all `targets`."""
    steps = sum(resolution.steps for resolution in inverter.resolutions)
    made = kept = 0
    disable = None if ranks.is_primary else True  # None shows it on a terminal alone
    with tqdm(total=len(todo) * steps, disable=disable, unit='step', dynamic_ncols=True) as bar:
        start = time.perf_counter()
        for number, batch in enumerate(todo):
            def progress(step: int, before: int = number * steps) -> None:
                bar.update(before + step - bar.n)

            began = time.perf_counter()
            images, losses = make_batch(batch, targets[batch], inverter, seed, progress)
            progress(steps)
            if images is None:
                dataset.write(batch, [], [], losses=[], failed=True)
                continue
            pixels = judge.to_uint8(images)
            records = judge.records(pixels, targets[batch])
            seconds = round(time.perf_counter() - began, 2)
            dataset.write(batch, [to_image(p) for p in pixels], records, losses=losses, seconds=seconds)
            made, kept = made + len(records), kept + sum(record['kept'] for record in records)
            bar.set_postfix_str(
                f'{made * ranks.world_size / (time.perf_counter() - start):.2f} img/s, {100 * kept / made:.0f} % kept')
            if ranks.is_primary:
                write_bytes(dataset.root / 'samples.png', contact_sheet(dataset.samples()))


def advice(args, losses: Sequence[Dict[str, Any]]) -> str:
    """Which loss kept the images from their classes, and what can be done.

    Args:
        args: The options.
        losses: Rows of the batches' losses, unweighted but for the diversity.
    """
    last_step = max(row['step'] for row in losses)
    last = [row for row in losses if row['step'] == last_step]
    mean = {name: sum(row[name] for row in last) / len(last) for name in last[0] if name not in ('batch', 'step')}
    scale = dict(bn=args.bn_weight, tv=args.tv_weight, l2=args.l2_weight,
                 diversity=args.adi_weight if args.diversity == 'adi' else 1.)
    terms = {name: abs(mean[name]) * weight for name, weight in scale.items() if name in mean}
    flags = dict(bn='--bn-weight (or try --bn-norm relative)', tv='--tv-weight', l2='--l2-weight',
                 diversity='--adi-weight' if args.diversity == 'adi' else '--ep-weight and --triplet-weight')
    largest = max(terms, key=terms.__getitem__)
    listed = ', '.join(f'{name} {value:.3g}' for name, value in terms.items())
    return (
        f'Most images are not of their class to the CNN: in the end the cross-entropy is {mean["ce"]:.2g} beside'
        f' {listed} (weighted). The weights are the network\'s own: lower {flags[largest]}, or take more steps.')


def report(args, dataset: SyntheticSet, model: Any) -> None:
    """What has been made, and how to train on it."""
    counts, class_map = dataset.finish()
    write_bytes(dataset.root / 'samples.png', contact_sheet(dataset.samples()))
    losses = [row for batch in dataset.batches() for row in batch.get('losses', ())]
    if losses:
        try:
            write_bytes(dataset.root / 'losses.png', loss_curves(losses))
        except ImportError:
            _logger.info('The curves of losses.csv are drawn when matplotlib is installed (pip install matplotlib).')
    failed = f', {counts["failed"]} batches failed' if counts['failed'] else ''
    asked = f' ({args.num_images} asked for, in whole batches)' if counts['made'] > args.num_images else ''
    print(f'{counts["kept"]} of {counts["made"]} images kept{asked}{failed}: {dataset.root}/train, manifest.json,'
          ' samples.png')
    if counts['made']:
        sure = f'{100 * counts["sure"] / counts["made"]:.0f} %'
        print(f'{args.model} gives {sure} of them more than half of its probability for their class.')
    if losses and counts['sure'] < counts['made'] / 2:
        _logger.warning(advice(args, losses))
    if not counts['kept']:
        return
    missing = len(dataset.classes) - len(class_map)
    if missing:
        _logger.warning(f'{missing} of {len(dataset.classes)} classes have no image that was kept.')
    root = shlex.quote(str(dataset.root))
    data = f'{root} --val-split ""' if args.format == 'folder' else (
        f'{root} --dataset wds/ --train-split train --val-split "" --num-classes {len(class_map)}')
    map_flag = '' if class_map == list(range(model.num_classes)) else f' --kd-class-map {root}/kd_class_map.txt'
    checkpoint = f' --kd-teacher-checkpoint {shlex.quote(args.checkpoint)}' if args.checkpoint else ''
    channels = {1: ' --in-chans 1', 2: ' --in-chans 2 --input-img-mode LA', 3: '',
                4: ' --in-chans 4 --input-img-mode RGBA'}[model.in_chans]
    print(f'Train on them: python train.py {data}{channels} --kd-model-name {shlex.quote(args.model)}{checkpoint}'
          f'{map_flag} ...')


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    setup_default_logging()
    try:
        with compile_errors():
            run(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    run_command(build_parser().prog, main, hint='With --resume the same command goes on.')
