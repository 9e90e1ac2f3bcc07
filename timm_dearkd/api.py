"""From a folder of images to a trained student in one call."""
import argparse
import contextlib
import io
import logging
import os
import shlex
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.task import ClassificationTask, TrainingTask

from distill_hooks import DearKDTask, Teacher, TwoStageSchedule, load_model
from distill_hooks.checkpoint import nearest_names
from distill_hooks.errors import one_line

from . import train
from .analysis.report import check_available as check_report
from .analysis.runs import Run, open_run
from .engine.data import build_datasets
from .engine.distillation import choose_distill_type, load_cnn
from .engine.loader import build_mixup, build_train_loader
from .engine.optimizer import build_optimizer
from .engine.options import given_options, options_to_argv, read_config, resolve_args
from .engine.process import SINGLE, Interrupted, Precision, TrainingError, default_workers, find_device
from .engine.student import build_student, create_student
from .images import Images, check_unchanged, inspect_images, prepare_splits, record_images
from .planning import Planner, Step, find_teacher, is_known, parse, quiet

_logger = logging.getLogger(__name__)

# Options that `distill` sets itself, and what to give instead
OWN_OPTIONS = dict(
    data='the folder first', data_dir='the folder first',
    dataset='a folder of images', model='student', kd_model_name='teacher',
    output='output', experiment='output', resume='the same call, which resumes', eval_only='timm-dearkd train',
    input_size='img_size')
RESUMES = 'The same call resumes.'
SLOW_READING = 10  # minutes, of which a log line tells


def build_task(step: Step, cnn: Any, device: torch.device) -> TrainingTask:
    """Build a run's task with new weights.

    Raises:
        ValueError: If model, teacher and options do not fit together.
    """
    if step.name == 'teacher':
        return ClassificationTask(cnn, device=device, verbose=False)
    args = step.args
    model = create_student(args, cnn.num_classes, timm.create_model)
    if choose_distill_type(args, model) != 'dearkd':
        return ClassificationTask(model, device=device, verbose=False)
    teacher = Teacher(cnn, in_chans=args.in_chans, img_size=args.kd_teacher_img_size)
    return DearKDTask(model, teacher, TwoStageSchedule(1), hooks=args.dearkd_hooks, device=device, verbose=False)


def estimate_minutes(step: Step, task: TrainingTask, images: Images, device: torch.device) -> float:
    """Estimate the minutes of a run, without its reading of images, by three training steps on noise.

    The faster of the last two counts.
    """
    args = step.args
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    x = torch.randn(args.batch_size, args.in_chans, args.img_size, args.img_size, device=device)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)
    task.to(device)
    task.train()
    times = []
    for _ in range(3):
        began = time.monotonic()
        with precision.autocast():
            loss = task(x, labels)['loss']
        loss.backward()
        if device.type != 'cpu':
            torch.accelerator.synchronize(device)
        times.append(time.monotonic() - began)
    num_evaluated = images.num_validation * args.epochs / args.val_interval
    return (args.epochs * images.epoch_length + num_evaluated / 3) * min(times[1:]) / len(x) / 60


def estimate_reading(step: Step, images: Images) -> float:
    """Estimate the minutes in which one process reads the images of a run."""
    num_read = step.args.epochs * (images.epoch_length + images.num_validation / step.args.val_interval)
    return num_read * images.read_seconds / 60


def check_student(step: Step, device: torch.device) -> None:
    """Build the data and the optimizer of a student, whose errors should come before its CNN is trained.

    Raises:
        ValueError: If the options do not allow the training.
    """
    args = argparse.Namespace(**{**vars(step.args), 'workers': 0})
    with quiet():  # `train.prepare` says it again
        train_set, _ = build_datasets(args)
        model, data_config = build_student(args, train_set, device, timm.create_model)
        build_train_loader(args, train_set, data_config, build_mixup(args, model.num_classes), device, SINGLE)
        build_optimizer(args, ClassificationTask(model, device=device, verbose=False), device, SINGLE)


def log_step(step: Step, images: Images, cnn: Any, device: torch.device) -> None:
    """Log what was chosen for a run, and the expected time.

    Raises:
        ValueError: If model, teacher and options do not fit together.
    """
    _logger.info(f'{step.name.capitalize()}: {step.describe()}.')
    if step.args.dearkd_labels == 'teacher':
        _logger.info(
            "The student learns the teacher's answers. The classes of the training images only serve to check the order"
            " of the teacher's classes.")
    with quiet():  # `train.prepare` says it again
        task = build_task(step, cnn, device)
    num_workers, size = step.args.workers, 2 * step.args.img_size
    num_workers = default_workers() if num_workers is None else num_workers
    reading = estimate_reading(step, images) / max(1, num_workers)
    try:
        training = estimate_minutes(step, task, images, device)
        is_overlapped = num_workers > 0 and device.type != 'cpu'  # on a CPU, both need the cores
        total = max(training, reading) if is_overlapped else training + reading
        minutes = f'{max(1., total):.0f} min'
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        minutes = f'an unknown time ({one_line(e)[:80]})'
    _logger.info(f'Expected time of the {step.name} on {device}: about {minutes}.')
    if reading > SLOW_READING and images.side > size:
        _logger.info(
            f'Reading takes {1000 * images.read_seconds:.0f} ms per image, {reading:.0f} min in all. Copies with a'
            f' shorter side of {size} pixels are read faster.')


def run_step(step: Step, run: Callable[[], Any]) -> float:
    """Log the command of a run, and run it without its JSON on standard output. Return the minutes that it took.

    Raises:
        Interrupted: If a signal has come.
        TrainingError: If training cannot continue.
    """
    _logger.info(f'The same as: timm-dearkd train {shlex.join(step.argv)}')
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run()
    except Interrupted as e:
        raise Interrupted(e.signum, RESUMES) from None
    except TrainingError as e:
        raise TrainingError(e.problem, e.remedy and RESUMES) from e.__cause__
    return (time.monotonic() - began) / 60


def distill(
        data: Union[str, os.PathLike],
        teacher: Union[str, os.PathLike, None] = None,
        *,
        output: Union[str, os.PathLike, None] = None,
        student: Optional[str] = None,
        **train_options: Any,
) -> Run:
    """Train a vision transformer on a folder of images, with a CNN as the teacher.

    Everything that is chosen is logged before training. The same call resumes an interrupted run, and returns a
    finished one. The choices are ours, not the paper's.

    Args:
        data: Folder with one folder of images per class, or with such folders in `train` and `validation`. Without
            these two, a fifth of each class is for validation.
        teacher: Output folder of a run of train.py, one of its checkpoints, or an `hf-hub:` name. The student then
            learns its answers alone. A CNN given by its timm name is trained on the images first, from its pretrained
            weights. None trains a small CNN first.
        output: Folder for the runs, `teacher` and `student`. None is `output/distill/NAME` for the folder NAME.
        student: timm name of the student. None chooses one by the size of the images and the device.
        **train_options: Options of train.py, such as `epochs=100`. They replace those that are chosen.

    Returns:
        The student's run: `summary()` has the accuracies, `load_model()` the model.

    Raises:
        FileNotFoundError: If the folder does not exist.
        TypeError: If an argument is neither a path nor a name, or train.py has no such option.
        ValueError: If the images or the options do not allow the training.
        TrainingError: If the training cannot continue, or the teacher's classes seem to be in another order.

    Examples:

        ```python
        run = timm_dearkd.distill('photos', teacher='output/train/cnn')
        print(run.summary())
        ```
    """
    for name, value, expected in (
            ('data', data, 'a folder'), ('teacher', teacher, 'a folder or a name'), ('output', output, 'a folder'),
            ('student', student, 'a name of timm')):
        if not isinstance(value, (str, os.PathLike)) and (name == 'data' or value is not None):
            is_cnn = name == 'teacher' and isinstance(value, torch.nn.Module)
            remedy = ' Save it with timm.models.save_for_hf(model, FOLDER), and give FOLDER.' if is_cnn else ''
            raise TypeError(f'distill() got {name} of type {type(value).__name__}, expected {expected}.{remedy}')
    known = {action.dest for action in train.parser._actions} | {'config'}
    for name in train_options:
        if name not in known:
            raise TypeError(f'distill() got an unexpected option {name!r}. docs/options.md lists the options.')
    config = train_options.pop('config', None)
    argv = [*(['-c', str(config)] if config else []), *options_to_argv(train_options)]
    return prepare_distillation(
        str(data), None if teacher is None else str(teacher), None if output is None else str(output), student, argv,
        list(train_options))()


def check_options(user: Sequence[str], given: Sequence[str], student: Optional[str]) -> List[str]:
    """Return the names of the options that the user sets, on the command line, in a file or by name.

    Raises:
        ValueError: If `distill` sets one of them itself, or timm does not know the student.
    """
    config, flags = train.config_parser.parse_known_args(user)
    in_file = read_config(config.config) if config.config else {}
    given = sorted({*given, *given_options(flags), *(str(name).replace('-', '_') for name in in_file)})
    word = train.parser.parse_args(flags).data
    if word is not None:
        raise ValueError(
            f'Unexpected argument {word!r}. Give one folder, first, and in quotes if its name has spaces.')
    for name in sorted({*given} & OWN_OPTIONS.keys()):
        raise ValueError(f'distill does not take {name!r}. Give {OWN_OPTIONS[name]}.')
    if student and not is_known(student):
        raise ValueError(f'Unknown student {student!r}. The nearest names: {nearest_names(student)}.')
    return given


def open_images(data: str, output: str, args: argparse.Namespace, has_own_splits: bool) -> Tuple[str, Images]:
    """Return the folder with splits and its images, which are those of earlier runs in OUTPUT.

    Args:
        data: See `distill`.
        output: See `distill`.
        args: The user's options of train.py.
        has_own_splits: Whether the user names the splits.

    Raises:
        FileNotFoundError: If a folder or the class map does not exist.
        ValueError: If the images do not allow the training, or have changed since a run.
    """
    root = os.path.abspath(data if has_own_splits else prepare_splits(data, output, args.class_map, args.input_key))
    images = inspect_images(
        root, args.train_split, args.val_split, args.train_fraction, args.class_map,
        keep_length=args.fraction_keep == 'steps', input_key=args.input_key,
        input_img_mode=args.input_img_mode or 'RGB')
    check_unchanged(images, output)
    return root, images


def prepare_distillation(
        data: str,
        teacher: Optional[str],
        output: Optional[str],
        student: Optional[str],
        user: Sequence[str],
        given: Sequence[str] = (),
) -> Callable[[], Run]:
    """Prepare `distill` up to the first training step, and return a function that does the rest.

    Args:
        data: See `distill`.
        teacher: See `distill`.
        output: See `distill`.
        student: See `distill`.
        user: Arguments of train.py.
        given: Names of the options that were given by keyword.
    """
    train.set_up_logging()
    data = os.path.expanduser(data)
    teacher, output = (path and os.path.expanduser(path) for path in (teacher, output))
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ValueError('distill runs in one process. Give torchrun the timm-dearkd train command that it logs.')
    args, given = parse(user), check_options(user, given, student)
    device = find_device(args.device)
    output = os.path.abspath(output or os.path.join('output', 'distill', os.path.basename(os.path.realpath(data))))
    root, images = open_images(data, output, args, has_own_splits=bool({'train_split', 'val_split'} & set(given)))
    reports = True
    try:
        check_report()
    except ValueError as e:
        reports = False
        _logger.warning(f'No report.html: {e}')
    planner = Planner(root, output, images, student, device, user, given, reports)
    name, first = find_teacher(planner, teacher, args.kd_teacher_checkpoint)
    step = planner.student_in_folder(name, is_own=first is not None)
    if step is not None and step.is_finished():
        _logger.info(f'The student is trained already, in {step.folder!r}.')
        return partial(finish, step, first, images, {})
    _logger.info(
        f'Images: {images.num_train} for training and {images.num_validation} for validation in {root!r},'
        f' {images.num_classes} classes, {images.side} pixels, {"grey" if images.is_grey else "colour"}.')
    if first is not None and not first.is_finished():
        resolve_args(first.args)
        cnn = create_cnn(first, images)
        step = planner.student(name, planner.ask_teacher(cnn, is_trained=False), is_own=True)
        resolve_args(step.args)
        log_step(first, images, cnn, device)
        log_step(step, images, cnn, device)
        check_student(step, device)
        _logger.info('The trained teacher decides whether the student sees mirror images.')
        train_cnn = train.prepare(first.argv)
        record_images(images, output)
        return partial(run_both, planner, first, train_cnn, images)
    cnn = load_cnn({**vars(args), 'kd_model_name': name}).eval()
    step = step or planner.student(name, planner.ask_teacher(cnn), is_own=first is not None)
    resolve_args(step.args)
    log_step(step, images, cnn, device)
    train_student = train.prepare(step.argv)
    record_images(images, output)
    return partial(run_student, step, train_student, first, images, {})


def run_both(planner: Planner, first: Step, train_cnn: Callable[[], Any], images: Images) -> Run:
    """Train the CNN, and then the student."""
    minutes = {'teacher': run_step(first, train_cnn)}
    step = planner.student(first.folder, planner.ask_teacher(load_model(first.folder).eval()), is_own=True)
    try:
        train_student = train.prepare(step.argv)
    except ValueError as e:
        raise TrainingError(str(e)) from e
    return run_student(step, train_student, first, images, minutes)


def run_student(
        step: Step,
        train_student: Callable[[], Any],
        first: Optional[Step],
        images: Images,
        minutes: Dict[str, float],
) -> Run:
    """Train the student, and finish."""
    return finish(step, first, images, {**minutes, 'student': run_step(step, train_student)})


def create_cnn(step: Step, images: Images) -> Any:
    """Return the untrained CNN of a run."""
    args = step.args
    model: Any = timm.create_model(
        args.model, num_classes=args.num_classes or images.num_classes, in_chans=args.in_chans, **args.model_kwargs)
    model.pretrained_cfg['input_size'] = (args.in_chans, args.img_size, args.img_size)
    model.pretrained_cfg.update({key: value for key in ('mean', 'std') if (value := getattr(args, key)) is not None})
    return model.eval()


def finish(step: Step, first: Optional[Step], images: Images, minutes: Dict[str, float]) -> Run:
    """Print the accuracies and the next commands, and return the student's run.

    Args:
        step: The student.
        first: Its teacher, if `distill` trained it.
        images: The images.
        minutes: Minutes of what this call trained.
    """
    run = open_run(step.folder)
    print('| model | training images | top-1 | minutes of this call |\n| --- | --- | --- | --- |')
    summary: Dict[str, Optional[float]] = {**run.summary()}
    for name, top1 in {**summary, 'student': summary.get('student')}.items():
        count = images.num_train if name == 'student' or first is not None else ''
        accuracy = 'no validation images' if top1 is None else f'{top1:.1f} %'
        print(f'| {name} | {count} | {accuracy} | {f"{minutes[name]:.1f}" if name in minutes else ""} |')
    print()
    folder = step.folder
    if folder.startswith(os.path.join(os.getcwd(), '')):
        folder = os.path.relpath(folder)
    if os.path.exists(os.path.join(folder, 'report.html')):
        print(f'Report:   {os.path.join(folder, "report.html")}')
    print(f"""Load:     import timm, timm_dearkd; timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)
Try:      timm-dearkd app {shlex.quote(folder)}
Predict:  timm-dearkd predict PHOTO_OR_FOLDER --model {shlex.quote(folder)}
Push:     timm-dearkd push {shlex.quote(folder)} --repo ORG/NAME""")
    return run


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog='timm-dearkd distill', usage='%(prog)s DATA [--teacher NAME] [--student NAME] [--output DIR] [FLAG ...]',
        description='Train a vision transformer on a folder of images, with a CNN as the teacher',
        epilog='Any FLAG of timm-dearkd train can be added, such as --epochs 100. It replaces what is chosen.')
    add = parser.add_argument
    add('data', metavar='DATA', help='folder with one folder of images per class')
    add('--teacher', metavar='NAME', help='run folder or checkpoint, hf-hub: name, or timm name of a CNN to train first'
        ' (default: train a small CNN first). With --kd-teacher-checkpoint FILE: timm name of a trained CNN')
    add('--student', metavar='NAME', help='timm name of the student (default: by image size and device)')
    add('--output', metavar='DIR', help='folder of the runs (default: output/distill/NAME)')
    return parser


def prepare(argv: Optional[Sequence[str]] = None) -> Callable[[], Run]:
    """Parse the command line, and prepare the distillation."""
    parser = build_parser()
    args, user = parser.parse_known_args(argv)
    if argv and not {args.data, '-h', '--help'} & {argv[0]}:
        raise ValueError(f'Give the folder first: timm-dearkd distill DATA {shlex.join(argv)}')
    return prepare_distillation(args.data, args.teacher, args.output, args.student, user)


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; None takes the arguments of the process."""
    train.run_script(argv, prepare, 'timm-dearkd distill')


if __name__ == '__main__':
    run_script()
