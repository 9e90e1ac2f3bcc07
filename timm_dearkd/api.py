"""From a folder of images to a trained student in one call."""
import argparse
import contextlib
import io
import logging
import os
import shlex
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from timm.models import get_model_input_config
from timm.task import ClassificationTask, TrainingTask

from distill_hooks import DearKDTask, Teacher, TwoStageSchedule, load_model
from distill_hooks.checkpoint import nearest_names
from distill_hooks.errors import one_line
from distill_hooks.task import has_content_tokens

from . import train
from .analysis.report import check_available as check_report
from .analysis.runs import Run, open_run
from .engine.checkpoints import changed_options
from .engine.optimizer import epochs_for
from .engine.options import find_config, given_options, options_to_argv, parse_args, resolve_args
from .engine.process import Interrupted, Precision, TrainingError, find_device
from .images import Images, look_at, prepare_splits
from .settings import choose_cnn, choose_student, choose_training, cnn_epochs, is_mirrored_alike

__all__ = ['distill']

_logger = logging.getLogger(__name__)

# Options of train.py that the CNN takes from the user, too
SHARED_OPTIONS = (
    'train_split', 'val_split', 'train_fraction', 'device', 'workers', 'seed', 'class_map', 'num_classes', 'input_key')
# Options that `distill` sets itself, and what to give instead
OWN_OPTIONS = dict(
    data='the folder', data_dir='the folder', dataset='a folder of images', model='student', kd_model_name='teacher',
    output='output', experiment='output', resume='the same call, which resumes', eval_only='timm-dearkd train',
    input_size='img_size')


@dataclass(frozen=True)
class Step:
    """A run of train.py that `distill` starts.

    Args:
        name: 'teacher' or 'student', the name of its folder.
        chosen: Names of the options that were chosen.
        argv: Arguments of train.py.
        args: The same, parsed.
    """
    name: str
    chosen: Sequence[str]
    argv: List[str]
    args: argparse.Namespace

    @property
    def folder(self) -> str:
        """Output folder of the run."""
        return os.path.join(self.args.output, self.args.experiment)

    def is_finished(self) -> bool:
        """Return whether the run has all its epochs.

        Raises:
            ValueError: If the folder has a run with other options.
        """
        if not os.path.exists(os.path.join(self.folder, 'args.yaml')):
            return False
        run = open_run(self.folder)
        changed = changed_options(run.args, vars(self.args))
        if changed:
            raise ValueError(
                f'{self.folder!r} has a run with other options: {changed}. Set another --output, or remove the folder.')
        return run.state == 'finished'

    def describe(self) -> str:
        """Return the chosen options and their values, in words."""
        texts = []
        for key in self.chosen:
            value = getattr(self.args, key)
            if isinstance(value, dict):
                value = ' '.join(f'{name}={item}' for name, item in value.items())
            elif isinstance(value, (list, tuple)):
                value = ' '.join(f'{item:.4g}' for item in value)
            texts.append(f'{key.replace("_", " ")} {value}')
        return ', '.join(texts)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse options of train.py.

    Raises:
        ValueError: If one of them is wrong.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse_args(train.parser, train.config_parser, argv)[0]
    except SystemExit:
        raise ValueError(errors.getvalue().rpartition('error: ')[2].strip()) from None


def read_options(config: str) -> Dict[str, Any]:
    """Return the options in a YAML file or a recipe."""
    return yaml.safe_load(find_config(config).read_text(encoding='utf-8')) or {}


class Planner:
    """Plans the runs.

    Args:
        data: Folder with the splits.
        output: Parent of the runs' folders.
        images: The images.
        student: timm name of the student; None chooses one.
        device: Device of the runs.
        user: The user's arguments of train.py.
        given: Names of the options that the user sets.
    """

    def __init__(
            self,
            data: str,
            output: str,
            images: Images,
            student: Optional[str],
            device: torch.device,
            user: Sequence[str],
            given: Sequence[str],
    ) -> None:
        self.data, self.output, self.images, self.device = data, output, images, device
        self.user, self.given, self.user_args = list(user), set(given), parse(user)
        self.epochs = self.user_args.epochs if 'epochs' in self.given else epochs_for(images.num_train)
        self.sizes = choose_student(student, images, device)
        self.size: int = self.user_args.img_size or self.sizes['img_size']
        self.reports = True

    def _step(self, name: str, chosen: Dict[str, Any], user: Sequence[str], given: Sequence[str]) -> Step:
        chosen = {key: value for key, value in chosen.items() if key not in given}
        fixed = dict(output=self.output, experiment=name, resume='auto', report=name == 'student' and self.reports)
        fixed = {key: value for key, value in fixed.items() if key not in given}
        has_file = train.config_parser.parse_known_args(user)[0].config is not None
        recipe = {key: value for key, value in read_options('small_folder').items() if key not in given}
        options = {**(recipe if has_file else {}), **fixed, **chosen}  # the user's file takes the place of -c
        argv = [
            self.data, *([] if has_file else ['-c', 'small_folder']), *options_to_argv(options, train.parser), *user]
        return Step(name, list(chosen), argv, parse(argv))

    def teacher(self, name: Optional[str]) -> Step:
        """Plan the training of a CNN: one by its timm name, from its pretrained weights, or a small one.

        It sees no mirror images, so that its answers to them tell whether the student may.
        """
        training = choose_training(self.images, 1 if self.images.is_grey else 3, self.device, cnn_epochs(self.epochs))
        shared = {key: getattr(self.user_args, key) for key in SHARED_OPTIONS if key in self.given}
        return self._step(
            'teacher', dict(choose_cnn(name, self.size), **training, hflip=0.), options_to_argv(shared, train.parser),
            list(shared))

    def student(self, teacher: str, cnn: Any, is_trained: bool) -> Step:
        """Plan the distillation.

        Args:
            teacher: Name or run folder of the CNN.
            cnn: The CNN.
            is_trained: Whether the CNN is trained already.
        """
        channels, size, _ = get_model_input_config(cnn)['input_size']
        in_chans = self.user_args.in_chans or (1 if self.images.is_grey or channels == 1 else 3)
        chosen = dict(self.sizes, kd_model_name=teacher, **choose_training(
            self.images, in_chans, self.device, self.epochs))
        if channels == in_chans:
            chosen.update({key: list(cnn.pretrained_cfg[key]) for key in ('mean', 'std')})
        if max(size, self.size) > 1.5 * min(size, self.size):  # far from its training size, it gives wrong labels
            chosen['kd_teacher_img_size'] = size
        if is_trained:
            chosen['hflip'] = 0.5 if is_mirrored_alike(cnn, self.images.samples) else 0.
        return self._step('student', chosen, self.user, sorted(self.given))


def seconds_per_image(
        model: nn.Module,
        teacher: Optional[Teacher],
        shape: Tuple[int, int, int, int],
        precision: Precision,
) -> float:
    """Time training steps on noise of a shape (B, C, H, W): the faster of the second and the third of three."""
    device = precision.device
    x, labels = torch.randn(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    task: TrainingTask = ClassificationTask(model, device=device, verbose=False)
    if teacher is not None and has_content_tokens(model):
        task = DearKDTask(model, teacher, TwoStageSchedule(1), device=device, verbose=False)
    task.train()
    times = []
    for _ in range(3):
        began = time.monotonic()
        with precision.autocast():
            loss = task(x, labels)['loss']
        loss.backward()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return min(times[1:]) / shape[0]


def estimate_minutes(step: Step, images: Images, cnn: Any, device: torch.device) -> float:
    """Return the expected minutes of a run, from three training steps on noise."""
    args = step.args
    size = args.img_size or get_model_input_config(timm.create_model(args.model))['input_size'][1]
    kwargs = dict(args.model_kwargs, in_chans=args.in_chans, num_classes=cnn.num_classes)
    if step.name == 'student':
        kwargs['img_size'] = size
    model, teacher = timm.create_model(args.model, **kwargs), None
    if step.name == 'student':
        teacher = Teacher(cnn, in_chans=args.in_chans, img_size=args.kd_teacher_img_size)
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    seconds = seconds_per_image(model, teacher, (args.batch_size, args.in_chans, size, size), precision)
    num_evaluated = images.num_validation * args.epochs / args.val_interval
    return (args.epochs * images.num_train + num_evaluated / 3) * seconds / 60


def log_step(step: Step, images: Images, cnn: Any, device: torch.device) -> None:
    """Log what was chosen for a run, and the expected time."""
    _logger.info(f'{step.name.capitalize()}: {step.describe()}.')
    try:
        minutes = f'{max(1., estimate_minutes(step, images, cnn, device)):.0f} minutes'
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        minutes = f'an unknown time ({one_line(e)[:80]})'
    _logger.info(f'Expected time of the {step.name} on {device}: about {minutes}.')


def run_step(step: Step, run: Callable[[], Any]) -> float:
    """Log the command of a run, and run it without its JSON on standard output. Return the minutes that it took.

    Raises:
        Interrupted: If a signal has come.
    """
    _logger.info(f'The same as: timm-dearkd train {shlex.join(step.argv)}')
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run()
    except Interrupted as e:
        e.args = (f'{str(e).partition(".")[0]}. The same call resumes.',)
        raise
    return (time.monotonic() - began) / 60


def distill(
        data: str,
        teacher: Optional[str] = None,
        *,
        output: Optional[str] = None,
        student: Optional[str] = None,
        **train_options: Any,
) -> Run:
    """Train a vision transformer on a folder of images, with a CNN as the teacher.

    Everything that is chosen is logged before training. The same call resumes an interrupted run, and returns a
    finished one. What is chosen, and by which rules, is ours and not the paper's.

    Args:
        data: Folder with one folder of images per class, or with such folders in `train` and `validation`. Without
            these two, a fifth of each class is for validation.
        teacher: Output folder of a run of train.py, or an `hf-hub:` name. A CNN given by its timm name is trained on
            the images first, from its pretrained weights. None trains a small CNN first.
        output: Folder for the runs, `teacher` and `student`. None is `output/distill/NAME` for the folder NAME.
        student: timm name of the student. None chooses one by the size of the images and the device.
        **train_options: Options of train.py, such as `epochs=100`. They replace those that are chosen.

    Returns:
        The student's run: `summary()` has the accuracies, `load_model()` the model.

    Raises:
        FileNotFoundError: If the folder does not exist.
        TypeError: If train.py has no such option.
        ValueError: If the images or the options do not allow the training.

    Examples:

        ```python
        run = timm_dearkd.distill('photos', teacher='output/train/cnn')
        print(run.summary())
        ```
    """
    known = {action.dest for action in train.parser._actions} | {'config'}
    for name in train_options:
        if name not in known:
            raise TypeError(f'distill() got an unexpected option {name!r}. docs/options.md lists the options.')
    config = train_options.pop('config', None)
    argv = [*(['-c', str(config)] if config else []), *options_to_argv(train_options, train.parser)]
    return prepare_distillation(
        str(data), teacher and str(teacher), output and str(output), student, argv, list(train_options))()


def check_options(user: Sequence[str], given: Sequence[str], student: Optional[str]) -> List[str]:
    """Return the names of the options that the user sets, on the command line, in a file or by name.

    Raises:
        ValueError: If `distill` sets one of them itself, or timm does not know the student.
    """
    config, flags = train.config_parser.parse_known_args(user)
    in_file = read_options(config.config) if config.config else {}
    given = sorted({*given, *given_options(train.parser, flags), *(name.replace('-', '_') for name in in_file)})
    for name in sorted({*given} & OWN_OPTIONS.keys()):
        raise ValueError(f'distill does not take {name!r}. Give {OWN_OPTIONS[name]}.')
    if student and not timm.is_model(student.split('.')[0]):
        raise ValueError(f'Unknown student {student!r}. The nearest names: {nearest_names(student)}.')
    return given


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
        given: Names of the options among them, apart from those that the arguments tell.
    """
    train.set_up_logging()
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ValueError('distill runs in one process. Give torchrun the timm-dearkd train command that it logs.')
    args, given = parse(user), check_options(user, given, student)
    device = find_device(args.device)
    output = os.path.abspath(output or os.path.join('output', 'distill', os.path.basename(os.path.realpath(data))))
    has_own_splits = {'train_split', 'val_split'} & set(given)
    root = os.path.abspath(data if has_own_splits else prepare_splits(data, output))
    images = look_at(root, args.train_split, args.val_split, args.train_fraction)
    planner = Planner(root, output, images, student, device, user, given)
    try:
        check_report()
    except ValueError as e:
        planner.reports = False
        _logger.warning(f'No report.html: {e}')
    first = None
    if teacher is None or not (os.path.exists(teacher) or ':' in teacher or args.kd_teacher_checkpoint):
        first = planner.teacher(teacher)
        resolve_args(first.args)
        teacher = first.folder
    elif os.path.exists(teacher):
        teacher = os.path.abspath(teacher)
    to_train = first if first is not None and not first.is_finished() else None
    cnn = load_model(teacher, args.kd_teacher_checkpoint).eval() if to_train is None else create_cnn(to_train, images)
    step = planner.student(teacher, cnn, is_trained=to_train is None)
    resolve_args(step.args)  # its errors come before the CNN is trained
    _logger.info(
        f'Images: {images.num_train} for training and {images.num_validation} for validation in {root!r},'
        f' {images.num_classes} classes, {images.side} pixels, {"grey" if images.is_grey else "colour"}.')
    if to_train is not None:
        log_step(to_train, images, cnn, device)
        log_step(step, images, cnn, device)
        _logger.info('The trained teacher decides whether the student sees mirror images.')
        train_cnn = train.prepare(to_train.argv)
        return lambda: run_both(planner, to_train, train_cnn, images)
    if step.is_finished():
        _logger.info(f'The student is trained already, in {step.folder!r}.')
        return lambda: finish(step, images, {})
    log_step(step, images, cnn, device)
    train_student = train.prepare(step.argv)
    return lambda: finish(step, images, {'student': run_step(step, train_student)})


def run_both(planner: Planner, first: Step, train_cnn: Callable[[], Any], images: Images) -> Run:
    """Train the CNN, and then the student."""
    minutes = {'teacher': run_step(first, train_cnn)}
    step = planner.student(first.folder, load_model(first.folder).eval(), is_trained=True)
    try:
        train_student = train.prepare(step.argv)
    except ValueError as e:
        raise TrainingError(str(e)) from e
    minutes['student'] = run_step(step, train_student)
    return finish(step, images, minutes)


def create_cnn(step: Step, images: Images) -> Any:
    """Return the untrained CNN of a run."""
    args = step.args
    model: Any = timm.create_model(
        args.model, num_classes=args.num_classes or images.num_classes, in_chans=args.in_chans, **args.model_kwargs)
    model.pretrained_cfg['input_size'] = (args.in_chans, args.img_size, args.img_size)
    model.pretrained_cfg.update({key: value for key in ('mean', 'std') if (value := getattr(args, key)) is not None})
    return model.eval()


def finish(step: Step, images: Images, minutes: Dict[str, float]) -> Run:
    """Print the accuracies and the next commands, and return the student's run."""
    run = open_run(step.folder)
    print('| model | training images | top-1 | minutes |\n| --- | --- | --- | --- |')
    for name, top1 in run.summary().items():
        count = images.num_train if name == 'student' or name in minutes else ''
        print(f'| {name} | {count} | {top1:.1f} % | {f"{minutes[name]:.1f}" if name in minutes else ""} |')
    folder = os.path.relpath(step.folder)
    if os.path.exists(os.path.join(folder, 'report.html')):
        print(f'\nReport:   {os.path.join(folder, "report.html")}')
    print(f"""Load:     import timm, timm_dearkd; timm.create_model('local-dir:{folder}', pretrained=True)
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
    add('--teacher', metavar='NAME', help='run folder, hf-hub: name, or timm name of a CNN to train first'
        ' (default: train a small CNN first)')
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
