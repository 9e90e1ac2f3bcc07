"""Command line of DF-DearKD: `python -m timm_dearkd.data_free OUT --model NAME`."""
import argparse
import logging
import math
import time
from dataclasses import replace
from typing import Any, Callable, Collection, Dict, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.data.model_config import resolve_input_data_config
from timm.utils import setup_default_logging
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import timm_dearkd
from distill_hooks import load_model
from distill_hooks.teacher import input_normalisation, weights_fingerprint
from timm_dearkd.commands import run_command
from timm_dearkd.engine.distillation import has_only_weights, set_normalisation
from timm_dearkd.engine.process import Precision, Ranks, check_backend, compile_errors, select_device
from timm_dearkd.files import write_bytes

from .classes import match_student, match_verifier, parse_classes, read_class_names
from .dataset import SyntheticSet, check_folder, read_settings
from .generator import BATCH_SIZE, GENERATOR_WEIGHTS, Choice, GeneratorInverter, run_pilot
from .inversion import Augmentation, Competitor, Execution, Inverter, LossWeights, Resolution, batch_targets
from .judge import Judge
from .look import contact_sheet, loss_curves
from .options import WEIGHTS, build_parser, fill_defaults
from .student import train_command

_logger = logging.getLogger(__name__)

MAX_GENERATED = 1920  # images of a generator, in a batch
LOG_INTERVAL = 60.  # seconds, where there is no terminal for a progress bar


def _images_per_class(args: argparse.Namespace, num_classes: int, saved: Dict[str, Any]) -> int:
    """Return --images-per-class.

    The default for a generator is that of the `saved` settings, else batches of equal size with up to 1,920 images, and
    enough of them for all classes.
    """
    if args.images_per_class is not None:
        return args.images_per_class
    if not args.generator:
        return 7
    classes = min(args.classes_per_batch, num_classes)
    needed = math.ceil(args.num_images / classes)
    fewest = math.ceil(num_classes / classes)
    per_class = math.ceil(needed / max(math.ceil(needed / max(1, MAX_GENERATED // classes)), fewest))
    if math.ceil(needed / per_class) < fewest:
        per_class = max(1, needed // fewest)
    return saved.get('images_per_class', per_class)


def build_inverter(args: argparse.Namespace, model: Any, names: Sequence[str], precision: Precision) -> Inverter:
    """Build the optimiser of the images from the options of the command.

    Args:
        args: Options.
        model: The CNN.
        names: Class names of the CNN.
        precision: Device and autocast type.
    """
    size = args.img_size or resolve_input_data_config(model)['input_size'][-1]
    phases = [Resolution(size // 2, 2000, 0.5), Resolution(size, 2000, 0.01)]
    resolutions = args.resolutions or ([Resolution(size, 400, 0.005)] if args.generator else phases)
    competitor = None
    if args.student:
        student = load_model(args.student, args.student_checkpoint, device=precision.device)
        _log_assumed_normalisation(args.student, args.student_checkpoint, student)
        competitor = Competitor(student, match_student(student, names))
    mean, std = _normalisation(model)
    jitter = max(r.size for r in resolutions) // 8 if args.jitter is None else args.jitter
    return (GeneratorInverter if args.generator else Inverter)(
        model, mean, std, resolutions,
        LossWeights(
            **{name: getattr(args, f'{name}_weight') for name in WEIGHTS}, margin=args.margin,
            adi_temperature=args.adi_temperature, bn_norm=args.bn_norm,
            smoothing=GENERATOR_WEIGHTS.smoothing if args.generator else 0.,
            normalized_latent=args.latent == 'normalized'),
        args.diversity, competitor, Augmentation(jitter, flip=not args.no_flip), tuple(args.betas),
        Execution(precision.autocast, args.channels_last, args.torchcompile))


def _normalisation(model: Any) -> Tuple[List[float], List[float]]:
    """Return the mean and the deviation per channel of a model's normalisation."""
    mean, std = input_normalisation(model, model.in_chans)
    return mean.tolist(), std.tolist()


def _log_assumed_normalisation(
        name: str,
        checkpoint: Optional[str],
        model: Any,
        remedy: str = 'If it was trained with others, give its run folder instead.',
) -> None:
    """Log the normalisation of a network whose file does not tell it."""
    if has_only_weights(name, checkpoint):
        mean, std = ([round(value, 3) for value in values] for values in _normalisation(model))
        _logger.info(
            f'{checkpoint!r} does not tell how its images were normalised. The network gets images with the mean {mean}'
            f' and the deviation {std}. {remedy}')


def make_batch(
        batch: int,
        targets: torch.Tensor,
        inverter: Inverter,
        seed: int,
        on_check: Callable[[int], None],
) -> Tuple[Optional[torch.Tensor], List[Dict[str, float]]]:
    """Make a batch of images, with a second seed if the loss is not finite.

    Args:
        batch: Number of the batch.
        targets: Classes (B,).
        inverter: Makes the images.
        seed: Random seed of the data set.
        on_check: Called with the number of steps so far.

    Returns:
        Normalised images, or None if both attempts failed; and the losses at the checked steps.
    """
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
        _logger.warning(f'Batch {batch}: the loss is not finite at step {losses[-1]["step"]}.'
                        f' {"Trying another seed." if attempt == 0 else "Skipping the batch."}')
    return None, losses


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_backend(args.torchcompile)
    check_folder(args.output, args.resume)
    given = [name for name in WEIGHTS if getattr(args, f'{name}_weight') is not None]
    args = fill_defaults(args)
    saved = read_settings(args.output)
    device, ranks = select_device(args.device)
    if not ranks.is_primary:
        logging.getLogger().setLevel(logging.WARNING)
    precision = Precision(device, torch.bfloat16 if args.amp else None)
    model: Any = load_model(args.model, args.checkpoint, device=device)
    set_normalisation(model, args.mean, args.std, '--')
    if not (args.mean and args.std):
        _log_assumed_normalisation(
            args.model, args.checkpoint, model, 'If the CNN was trained with others, set --mean and --std.')
    indices = parse_classes(args.classes, model.num_classes)
    per_class = _images_per_class(args, len(indices), saved)
    names = read_class_names(args.class_names, model)
    if not 1 <= model.in_chans <= 4:
        raise ValueError(f'--model takes {model.in_chans} channels, expected 1 (grey) to 4. Choose another CNN.')
    inverter = build_inverter(args, model, names, precision)
    inverter.check_sizes()
    verifier = None
    if args.verifier:
        verifier = load_model(args.verifier, args.verifier_checkpoint, device=device)
        _log_assumed_normalisation(args.verifier, args.verifier_checkpoint, verifier)
    classes = match_verifier(verifier, model, names) if verifier is not None else ()
    judge = Judge(model, verifier, classes, *_normalisation(model), args.min_prob)
    judge.check_size(inverter.size)
    choice = Choice(inverter.weights, not args.no_flip)
    if isinstance(inverter, GeneratorInverter):
        classes_per_batch = min(args.classes_per_batch, len(indices))
        per_pilot = max(per_class, math.ceil(BATCH_SIZE / classes_per_batch))
        pilot_targets, = batch_targets(1, indices, classes_per_batch, per_pilot, args.seed)
        choice = choose_by_pilot(inverter, pilot_targets, args.seed, choice, given, saved, ranks)
    networks = [m for m in (model, inverter.student, verifier) if m is not None]
    dataset = SyntheticSet(
        args.output, {index: names[index] for index in indices},
        _settings(args, per_class, choice, inverter, networks), args.format, args.resume)
    num_batches = _count_batches(args, len(indices), per_class, ranks)
    targets = batch_targets(num_batches, indices, args.classes_per_batch, per_class, args.seed)
    todo = [batch for batch in range(num_batches) if not dataset.is_done(batch)]
    if ranks.distributed:
        dist.barrier()  # all processes read the folder before one writes
    if ranks.is_primary:
        dataset.start()
    make_images(dataset, targets, todo[ranks.rank::ranks.world_size], inverter, judge, args.seed, ranks)
    if ranks.is_primary:
        while not all(dataset.is_done(batch) for batch in todo):  # the other processes may take hours longer
            time.sleep(0.2)
        report(args, dataset, inverter, choice)


def choose_by_pilot(
        inverter: GeneratorInverter,
        targets: torch.Tensor,
        seed: int,
        options: Choice,
        kept: Collection[str],
        saved: Dict[str, Any],
        ranks: Ranks,
) -> Choice:
    """Choose the weights and the mirroring of a generator by a short pilot, and set them; a resumed run keeps them.

    Args:
        inverter: Trains the generators.
        targets: Classes (B,) of the pilot's images.
        seed: Random seed.
        options: Weights and mirroring of the command's options.
        kept: Weights that were given.
        saved: Settings of the run to resume; {} for a new run.
        ranks: This process among all. All run the pilot, because a process that waits for
            another times out. The first one decides.
    """
    choice = [options]
    if 'mirror' in saved:
        chosen = {name: saved[f'{name}_weight'] for name in WEIGHTS if name not in kept}
        choice = [Choice(replace(options.weights, **chosen), saved['mirror'])]
    else:
        choice = [run_pilot(inverter, targets, seed, kept, options.mirror)]
    if ranks.distributed:
        dist.broadcast_object_list(choice)
    inverter.set_choices(*choice[0])
    return choice[0]


def _settings(
        args: argparse.Namespace,
        per_class: int,
        choice: Choice,
        inverter: Inverter,
        networks: Sequence[torch.nn.Module],
) -> Dict[str, Any]:
    """Return what the images depend on, for `settings.json` and the manifest."""
    skipped = ('output', 'resume', 'device', 'format', 'classes', 'class_names', 'num_images', 'mean', 'std')
    return {
        **{key: value for key, value in vars(args).items() if key not in skipped},
        'images_per_class': per_class,
        **{f'{name}_weight': getattr(choice.weights, name) for name in WEIGHTS},
        'mirror': choice.mirror,
        'resolutions': [list(resolution) for resolution in inverter.resolutions],
        'betas': list(args.betas),
        'num_images': args.num_images,
        'weights': [weights_fingerprint(network) for network in networks],
        'normalisation': list(_normalisation(inverter.model)),
        'versions': dict(timm_dearkd=timm_dearkd.__version__, torch=torch.__version__, timm=timm.__version__),
    }


def _count_batches(args: argparse.Namespace, num_classes: int, per_class: int, ranks: Ranks) -> int:
    """Return the number of batches with at least --num-images images."""
    classes = min(args.classes_per_batch, num_classes)
    size = classes * per_class
    count = math.ceil(args.num_images / size)
    if args.num_images % size and ranks.is_primary:
        _logger.info(
            f'--num-images {args.num_images} is rounded up to {count * size}: {count} batches of {classes} classes with'
            f' {per_class} images each. For smaller batches, lower --classes-per-batch or'
            ' --images-per-class.')
    if count * classes < num_classes and ranks.is_primary:
        _logger.warning(
            f'{num_classes - count * classes} of {num_classes} classes get no image. Set --num-images'
            f' {math.ceil(num_classes / classes) * size} or more, or name some --classes.')
    return count


def make_images(
        dataset: SyntheticSet,
        targets: Sequence[torch.Tensor],
        todo: Sequence[int],
        inverter: Inverter,
        judge: Judge,
        seed: int,
        ranks: Ranks,
) -> None:
    """Make batches of images and write them.

    Args:
        dataset: Where to write them.
        targets: Classes (B,) of every batch.
        todo: Numbers of the batches to make.
        inverter: Makes the images.
        judge: Decides which images are kept.
        seed: Random seed of the data set.
        ranks: This process among all.
    """
    steps = sum(resolution.steps for resolution in inverter.resolutions)
    made = kept = 0
    disable = None if ranks.is_primary else True  # None shows the bar on a terminal only
    with tqdm(
            total=len(todo) * steps, disable=disable, unit='step', dynamic_ncols=True) as bar, logging_redirect_tqdm():
        start = logged = time.perf_counter()
        for number, batch in enumerate(todo):
            def progress(step: int, before: int = number * steps) -> None:
                nonlocal logged
                bar.update(before + step - bar.n)
                if bar.disable and ranks.is_primary and time.perf_counter() - logged > LOG_INTERVAL:
                    logged = time.perf_counter()
                    _logger.info(f'{before + step} of {len(todo) * steps} steps.')

            began = time.perf_counter()
            images, losses = make_batch(batch, targets[batch], inverter, seed, progress)
            progress(steps)
            if images is None:
                dataset.write(batch, [], [], losses=[], failed=True)
                continue
            pixels = judge.to_uint8(images)
            records = judge.records(pixels, targets[batch])
            seconds = round(time.perf_counter() - began, 2)
            dataset.write(batch, [to_pil_image(p.numpy()) for p in pixels], records, losses=losses, seconds=seconds)
            made, kept = made + len(records), kept + sum(record['kept'] for record in records)
            bar.set_postfix_str(
                f'{made * ranks.world_size / (time.perf_counter() - start):.2f} img/s, {100 * kept / made:.0f} % kept')
            if ranks.is_primary:
                write_bytes(dataset.root / 'samples.png', contact_sheet(dataset.samples()))


def advise(inverter: Inverter, losses: Sequence[Dict[str, Any]]) -> str:
    """Name the largest loss besides the cross-entropy, and what may help.

    Args:
        inverter: Made the images.
        losses: Rows of the batches' losses; all but the diversity of 'intra' are unweighted.
    """
    weights = inverter.weights
    last_step = max(row['step'] for row in losses)
    last = [row for row in losses if row['step'] == last_step]
    mean = {name: sum(row[name] for row in last) / len(last) for name in last[0] if name not in ('batch', 'step')}
    is_adi = inverter.diversity == 'adi'
    scale = dict(bn=weights.bn, tv=weights.tv, l2=weights.l2, diversity=weights.adi if is_adi else 1.)
    terms = {name: abs(mean[name]) * weight for name, weight in scale.items() if name in mean}
    relative = ' (or try --bn-norm relative)' if weights.bn_norm == 'absolute' else ''
    flags = dict(bn=f'--bn-weight{relative}', tv='--tv-weight', l2='--l2-weight',
                 diversity='--adi-weight' if is_adi else '--ep-weight and --triplet-weight')
    largest = max(terms, key=terms.__getitem__)
    tips = [f'lower {flags[largest]}'] if terms[largest] else []
    is_generator = isinstance(inverter, GeneratorInverter)  # more steps do not help it
    tips += ['omit --generator and set --bn-norm relative' if is_generator else 'take more steps']
    tips[0] = tips[0].capitalize()
    listed = ', '.join(f'{name} {value:.3g}' for name, value in terms.items())
    return (
        f'The CNN does not recognise most images. The final cross-entropy is {mean["ce"]:.2g}, the other weighted'
        f' losses are: {listed}. Good weights differ between CNNs. {", or ".join(tips)}.')


def report(args: argparse.Namespace, dataset: SyntheticSet, inverter: Inverter, choice: Choice) -> None:
    """Finish the data set; print the result and the command that trains on it."""
    counts, class_map = dataset.finish()
    write_bytes(dataset.root / 'samples.png', contact_sheet(dataset.samples()))
    losses = [row for batch in dataset.batches() for row in batch.get('losses', ())]
    if losses:
        try:
            write_bytes(dataset.root / 'losses.png', loss_curves(losses))
        except ValueError as e:
            _logger.info(f'losses.png was not drawn. {e}')
    failed = f', {counts["failed"]} batches failed' if counts['failed'] else ''
    asked = f' ({args.num_images} requested, in whole batches)' if counts['made'] > args.num_images else ''
    print(f'{counts["kept"]} of {counts["made"]} images kept{asked}{failed}: {dataset.root}/train, manifest.json,'
          ' samples.png')
    if counts['made']:
        sure = f'{100 * counts["sure"] / counts["made"]:.0f} %'
        print(f'{args.model} gives {sure} of the images a probability above 0.5 for their class.')
    if losses and counts['sure'] < counts['made'] / 2:
        _logger.warning(advise(inverter, losses))
    if counts['kept'] < 2:
        if args.verifier and counts['made']:
            _logger.warning(f'--min-prob {args.min_prob:g} leaves too few images for a student. Lower it.')
        return
    missing = len(dataset.classes) - counts['classes']
    if missing:
        _logger.warning(f'{missing} of {len(dataset.classes)} classes have no image.')
    command = train_command(
        args, str(dataset.root), counts['kept'], class_map, inverter.model, inverter.size, choice.mirror)
    print(f'Train on them: {command}')


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


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; an error is one line and status 2."""
    run_command(build_parser().prog, main, argv, hint='Add --resume to the same command to continue.')


if __name__ == '__main__':
    run_script()
