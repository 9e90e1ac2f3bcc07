"""From a folder of images to a trained student in one call."""
import argparse
import contextlib
import io
import logging
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.models import get_model_input_config
from timm.task import ClassificationTask, TrainingTask

from distill_hooks import DearKDTask, Teacher, TwoStageSchedule, load_model
from distill_hooks.task import has_content_tokens

from . import train
from .analysis.runs import Run, open_run
from .engine.optimizer import epochs_for
from .engine.options import options_to_argv, parse_args, resolve_args
from .engine.process import TrainingError, find_device
from .images import Images, is_mirrored_alike, look_at, prepare_splits
from .settings import choose_cnn, choose_sizes, choose_training, cnn_epochs

__all__ = ['distill']

_logger = logging.getLogger(__name__)

# The user's options that a CNN is trained with, too
SHARED_OPTIONS = ('train_split', 'val_split', 'device', 'workers', 'seed', 'class_map', 'input_key')


@dataclass(frozen=True)
class Step:
    """A run of train.py that `distill` starts.

    Args:
        name: 'teacher' or 'student', the name of its folder.
        chosen: Options that were chosen, by their names in args.yaml.
        argv: Arguments of train.py: the chosen options, and then the user's, which win.
    """
    name: str
    chosen: Dict[str, Any]
    argv: List[str]

    @property
    def args(self) -> argparse.Namespace:
        """The parsed options."""
        return parse_args(train.parser, train.config_parser, self.argv)[0]

    @property
    def folder(self) -> str:
        """Output folder of the run."""
        return os.path.join(self.args.output, self.args.experiment)

    def is_finished(self) -> bool:
        """Return whether the run has all its epochs."""
        if not os.path.exists(os.path.join(self.folder, 'args.yaml')):
            return False
        run = open_run(self.folder)
        return run.state == 'finished' and run.num_epochs >= self.args.epochs

    def describe(self) -> str:
        """Return the chosen options and their values, in words."""
        args, texts = self.args, []
        for key in self.chosen:
            value = getattr(args, key)
            if isinstance(value, dict):
                value = ' '.join(f'{name}={item}' for name, item in value.items())
            elif isinstance(value, (list, tuple)):
                value = ' '.join(f'{item:.4g}' for item in value)
            texts.append(f'{key.replace("_", " ")} {value}')
        return ', '.join(texts)


class Planner:
    """Plans the runs.

    Args:
        data: Folder with the splits.
        output: Parent of the runs' folders.
        images: The images.
        device: Device of the runs.
        user: The user's arguments of train.py.
    """

    def __init__(self, data: str, output: Path, images: Images, device: torch.device, user: Sequence[str]) -> None:
        self.data, self.output, self.images, self.device, self.user = data, output, images, device, list(user)
        given = train.parser.parse_args(self.user, argparse.Namespace(epochs=None)).epochs
        self.epochs = given or epochs_for(images.num_train)

    def _step(self, name: str, chosen: Dict[str, Any], user: Sequence[str]) -> Step:
        fixed = dict(output=str(self.output), experiment=name, resume='auto', report=name == 'student')
        recipe = [] if '-c' in user or '--config' in user else ['-c', 'small_folder']
        return Step(name, chosen, [
            self.data, *recipe, *options_to_argv({**fixed, **chosen}, train.parser), *user])

    def teacher(self, name: Optional[str]) -> Step:
        """Plan the training of a CNN: one by its timm name, from its pretrained weights, or a small one."""
        in_chans = 1 if self.images.is_grey else 3
        chosen = dict(choose_cnn(name, self.images, self.device), **choose_training(
            self.images, in_chans, self.device, cnn_epochs(self.epochs), hflip=0.))
        given = vars(parse_args(train.parser, train.config_parser, self.user)[0])
        shared = {key: given[key] for key in SHARED_OPTIONS if given[key] != train.parser.get_default(key)}
        return self._step('teacher', chosen, options_to_argv(shared, train.parser))

    def student(self, name: Optional[str], teacher: str, cnn: Any, is_trained: bool) -> Step:
        """Plan the distillation.

        Args:
            name: timm name of the student; None chooses one.
            teacher: Name or run folder of the CNN.
            cnn: The CNN.
            is_trained: Whether the CNN is trained already.
        """
        channels, size, _ = get_model_input_config(cnn)['input_size']
        sizes: Dict[str, Any] = dict(model=name) if name else choose_sizes(self.images, self.device)
        own_size = get_model_input_config(timm.create_model(sizes['model']))['input_size'][1]
        in_chans = 1 if self.images.is_grey or channels == 1 else 3
        chosen = dict(sizes, kd_model_name=teacher, **choose_training(self.images, in_chans, self.device, self.epochs))
        if channels == in_chans:
            chosen.update({key: list(cnn.pretrained_cfg[key]) for key in ('mean', 'std')})
        if size > 1.5 * sizes.get('img_size', own_size):  # such small images would get wrong labels
            chosen['kd_teacher_img_size'] = size
        if is_trained:
            chosen['hflip'] = 0.5 if is_mirrored_alike(cnn, self.images.samples) else 0.
        return self._step('student', chosen, self.user)


def seconds_per_image(
        model: nn.Module,
        teacher: Optional[nn.Module],
        shape: Tuple[int, int, int, int],
        device: torch.device,
) -> float:
    """Time training steps on noise of a shape (B, C, H, W): the faster of the second and the third of three."""
    x, labels = torch.randn(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    task: TrainingTask = ClassificationTask(model, device=device, verbose=False)
    if teacher is not None and has_content_tokens(model):
        task = DearKDTask(model, Teacher(teacher, in_chans=shape[1]), TwoStageSchedule(1), device=device, verbose=False)
    task.train()
    times = []
    for _ in range(3):
        began = time.monotonic()
        task(x, labels)['loss'].backward()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return min(times[1:]) / shape[0]


def estimate_minutes(step: Step, images: Images, teacher: Optional[nn.Module], device: torch.device) -> float:
    """Return the expected minutes of a run, from three training steps."""
    args = step.args
    size = {} if step.name == 'teacher' or not args.img_size else {'img_size': args.img_size}
    model = timm.create_model(
        args.model, num_classes=images.num_classes, in_chans=args.in_chans, **size, **args.model_kwargs)
    side = args.img_size or get_model_input_config(model)['input_size'][1]
    seconds = seconds_per_image(model, teacher, (args.batch_size, args.in_chans, side, side), device)
    num_evaluated = images.num_validation * args.epochs / args.val_interval
    return (args.epochs * images.num_train + num_evaluated / 3) * seconds / 60


def log_plan(steps: Sequence[Step], images: Images, data: str, cnn: nn.Module, device: torch.device) -> None:
    """Log the images, what was chosen, the expected time, and the commands."""
    _logger.info(
        f'Images: {images.num_train} for training and {images.num_validation} for validation in {data!r},'
        f' {images.num_classes} classes, {images.side} pixels, {"grey" if images.is_grey else "colour"}.')
    for step in steps:
        title = step.name.capitalize()
        if step.is_finished():
            _logger.info(f'{title}: trained already, in {step.folder!r}.')
            continue
        minutes = estimate_minutes(step, images, cnn if step.name == 'student' else None, device)
        _logger.info(f'{title}: {step.describe()}.')
        _logger.info(f'{title}: about {max(1, round(minutes))} minutes on {device}, with the command')
        _logger.info(f'timm-dearkd train {shlex.join(step.argv)}')


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
    finished one. The choices are ours.

    Args:
        data: Folder with one folder of images per class, or with such folders in `train` and `validation`. Without
            these two, a fifth of each class is for validation.
        teacher: Output folder of a run of train.py, or an `hf-hub:` name. A CNN given by its timm name is trained on
            the images first, from its pretrained weights. None trains a small CNN first.
        output: Folder for the runs, `teacher` and `student`. None is `output/distill/NAME` for the folder NAME.
        student: timm name of the student. None chooses one by the size of the images and the device.
        **train_options: Options of train.py, such as `epochs=100`. They win over those that are chosen.

    Returns:
        The student's run: `summary()` has the accuracies, `load_model()` the model.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the images or the options do not allow the training.

    Examples:

        ```python
        run = timm_dearkd.distill('photos', teacher='output/train/cnn')
        print(run.summary())
        ```
    """
    return prepare_distillation(
        str(data), teacher and str(teacher), output and str(output), student,
        options_to_argv(train_options, train.parser))()


def prepare_distillation(
        data: str,
        teacher: Optional[str],
        output: Optional[str],
        student: Optional[str],
        user: Sequence[str],
) -> Callable[[], Run]:
    """Prepare `distill` up to the first training step, and return a function that does the rest.

    Args:
        data: See `distill`.
        teacher: See `distill`.
        output: See `distill`.
        student: See `distill`.
        user: Arguments of train.py.
    """
    train.set_up_logging()
    args = parse_args(train.parser, train.config_parser, user)[0]
    device = find_device(args.device)
    folder = Path(output or os.path.join('output', 'distill', os.path.basename(os.path.realpath(data))))
    root = prepare_splits(data, folder, args.train_split, args.val_split)
    images = look_at(root, args.train_split, args.val_split, args.train_fraction)
    planner = Planner(root, folder, images, device, user)
    first = None
    if teacher is None or not (os.path.exists(teacher) or ':' in teacher or args.kd_teacher_checkpoint):
        first = planner.teacher(teacher)
        teacher = first.folder
    to_train = first if first is not None and not first.is_finished() else None
    is_trained = to_train is None
    if to_train:
        resolve_args(to_train.args)
    cnn = create_cnn(to_train, images) if to_train else load_model(teacher, args.kd_teacher_checkpoint)
    step = planner.student(student, teacher, cnn.eval(), is_trained)
    resolve_args(step.args)  # its errors come before the CNN is trained
    log_plan([first, step] if first else [step], images, root, cnn, device)
    train_cnn = train.prepare(to_train.argv) if to_train else None
    train_student = train.prepare(step.argv) if is_trained and not step.is_finished() else None

    def run() -> Run:
        minutes, student_run = {}, train_student
        if train_cnn is not None:
            minutes['teacher'] = timed(train_cnn)
            try:
                student_run = train.prepare(planner.student(student, teacher, load_model(teacher).eval(), True).argv)
            except ValueError as e:
                raise TrainingError(str(e)) from e
        if student_run is not None:
            minutes['student'] = timed(student_run)
        result = open_run(step.folder)
        print_summary(result, images, minutes)
        return result

    return run


def create_cnn(step: Step, images: Images) -> Any:
    """Return the untrained CNN of a run."""
    args = step.args
    model: Any = timm.create_model(
        args.model, num_classes=images.num_classes, in_chans=args.in_chans, **args.model_kwargs)
    model.pretrained_cfg['input_size'] = (args.in_chans, args.img_size, args.img_size)
    return model


def timed(run: Callable[[], Any]) -> float:
    """Call a run of train.py without its JSON on standard output, and return the minutes that it took."""
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    return (time.monotonic() - began) / 60


def print_summary(run: Run, images: Images, minutes: Dict[str, float]) -> None:
    """Print the accuracies, and the next commands."""
    print('| model | training images | top-1 | minutes |\n| --- | --- | --- | --- |')
    for name, top1 in run.summary().items():
        count = images.num_train if name == 'student' or name in minutes else ''
        print(f'| {name} | {count} | {top1:.1f} % | {f"{minutes[name]:.1f}" if name in minutes else ""} |')
    folder = shlex.quote(str(run.folder))
    print(f"""
Report:   {run.folder / 'report.html'}
Load:     import timm, timm_dearkd; timm.create_model('local-dir:{run.folder}', pretrained=True)
Predict:  timm-dearkd predict PHOTO_OR_FOLDER --model {folder}
Push:     timm-dearkd push {folder} --repo ORG/NAME""")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog='timm-dearkd distill', description='Train a vision transformer on a folder of images, with a CNN as the'
        ' teacher', epilog='Any flag of timm-dearkd train can be added, and wins over what is chosen: --epochs 100.')
    add = parser.add_argument
    add('data', metavar='DATA', help='folder with one folder of images per class')
    add('--teacher', metavar='NAME', help='run folder, hf-hub: name, or timm name of a CNN to train first'
        ' (default: train a small CNN first)')
    add('--student', metavar='NAME', help='timm name of the student (default: by image size and device)')
    add('--output', metavar='DIR', help='folder of the runs (default: output/distill/NAME)')
    return parser


def prepare(argv: Optional[Sequence[str]] = None) -> Callable[[], Run]:
    """Parse the command line, and prepare the distillation."""
    args, user = build_parser().parse_known_args(argv)
    return prepare_distillation(args.data, args.teacher, args.output, args.student, user)


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; None takes the arguments of the process."""
    train.run_script(argv, prepare)


if __name__ == '__main__':
    run_script()
