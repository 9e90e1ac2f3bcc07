"""From a folder of images to a trained student in one call."""
import argparse
import contextlib
import io
import logging
import os
import shlex
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
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
from .engine.checkpoints import EXPORT_NAME, changed_options
from .engine.optimizer import epochs_for
from .engine.options import check_distillation, find_config, given_options, options_to_argv, parse_args, resolve_args
from .engine.process import Interrupted, Precision, TrainingError, default_workers, find_device
from .engine.student import create_student
from .images import Images, look_at, prepare_splits
from .settings import (
    choose_batch_size,
    choose_cnn,
    choose_labels,
    choose_student,
    choose_training,
    cnn_epochs,
    is_mirrored_alike,
)

__all__ = ['distill']

_logger = logging.getLogger(__name__)

# Options of train.py that the CNN takes from the user, too
SHARED_OPTIONS = (
    'train_split', 'val_split', 'train_fraction', 'fraction_seed', 'fraction_keep', 'class_map', 'num_classes',
    'input_key', 'in_chans', 'device', 'amp', 'amp_dtype', 'workers', 'seed', 'deterministic')
# Options of the student that the teacher decides
FROM_TEACHER = ('in_chans', 'mean', 'std', 'kd_teacher_img_size', 'hflip')
# Options that `distill` sets itself, and what to give instead
OWN_OPTIONS = dict(
    data='one folder, first, and in quotes if its name has spaces', data_dir='the folder first',
    dataset='a folder of images', model='student', kd_model_name='teacher',
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
        """Return whether the run has all its epochs, and the files of the last one.

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
        summary, last, export = (run.folder / name for name in ('summary.csv', 'last.pth.tar', EXPORT_NAME))
        done = int(run.rows[-1]['epoch']) + 1 if run.rows else 0
        # the row of an epoch is written before its checkpoint
        return (done >= (self.args.stop_epoch or self.args.epochs) and last.exists() and export.exists()
                and last.stat().st_mtime >= summary.stat().st_mtime)

    def describe(self) -> str:
        """Return the chosen options and their values, in words, with those of the recipe that matter most."""
        texts = []
        for key in dict.fromkeys([*self.chosen, 'opt', 'lr', 'weight_decay', 'workers']):
            value = getattr(self.args, key)
            if key == 'workers' and value is None:
                value = default_workers()
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
        self.batch_size: int = (
            self.user_args.batch_size if 'batch_size' in self.given else choose_batch_size(images.num_train))
        self.epochs = self.user_args.epochs
        if 'epochs' not in self.given:
            num_updates = images.num_train // (self.batch_size * self.user_args.grad_accum_steps)
            self.epochs = epochs_for(images.num_train, num_updates)
        self.sizes = choose_student(student, images, device)
        self.size: int = self.user_args.img_size or self.sizes['img_size']
        self.reports = True

    def _step(self, name: str, chosen: Dict[str, Any], user: Sequence[str], given: Sequence[str]) -> Step:
        fixed = dict(output=self.output, experiment=name, resume='auto', report=name == 'student' and self.reports)
        options = {key: value for key, value in {**fixed, **chosen}.items() if key not in given}
        config = ['-c', 'small_folder']
        if train.config_parser.parse_known_args(user)[0].config is not None:  # a file of the user takes its place
            recipe = {key: value for key, value in read_options('small_folder').items() if key not in given}
            recipe.pop('auto_epochs', None)
            options, config = {**recipe, **options, 'epochs': chosen['epochs']}, []
        argv = [self.data, *config, *options_to_argv(options, train.parser), *user]
        return Step(name, [key for key in chosen if key not in given], argv, parse(argv))

    def teacher(self, name: Optional[str]) -> Step:
        """Plan the training of a CNN: one by its timm name, from its pretrained weights, or a small one.

        It sees no mirror images, so that its answers to them tell whether the student may.
        """
        in_chans = self.user_args.in_chans or (1 if self.images.is_grey else 3)
        training = choose_training(self.images, in_chans, self.device, cnn_epochs(self.epochs))
        shared = {key: getattr(self.user_args, key) for key in SHARED_OPTIONS if key in self.given}
        return self._step(
            'teacher', dict(choose_cnn(name, self.size), **training, hflip=0.), options_to_argv(shared, train.parser),
            list(shared))

    def ask_teacher(self, cnn: Any, is_trained: bool = True) -> Dict[str, Any]:
        """Return the options of the student that its CNN decides. An untrained one does not decide on mirroring."""
        channels, size, _ = get_model_input_config(cnn)['input_size']
        in_chans = self.user_args.in_chans or (1 if self.images.is_grey or channels == 1 else 3)
        options: Dict[str, Any] = dict(in_chans=in_chans)
        if channels == in_chans:
            options.update({key: list(cnn.pretrained_cfg[key]) for key in ('mean', 'std')})
        if max(size, self.size) > 1.5 * min(size, self.size):  # far from its training size, it gives wrong labels
            options['kd_teacher_img_size'] = size
        if is_trained:
            options['hflip'] = 0.5 if is_mirrored_alike(cnn, self.images.samples) else 0.
        return options

    def student(self, teacher: str, from_teacher: Dict[str, Any], is_own: bool) -> Step:
        """Plan the distillation.

        Args:
            teacher: Name or run folder of the CNN.
            from_teacher: See `ask_teacher`.
            is_own: Whether `distill` trains the CNN. Such a CNN has seen no other images than the student, and teaches
                hard labels.

        Raises:
            ValueError: If the student cannot be created.
        """
        training = choose_training(self.images, from_teacher['in_chans'], self.device, self.epochs)
        chosen = {**self.sizes, 'kd_model_name': teacher, **training, **from_teacher}
        labels = {} if is_own else choose_labels(self.user_args, self.given, self.batch_size)
        if labels and self._learns_by_dearkd():
            chosen.update(labels)
        return self._step('student', chosen, self.user, sorted(self.given))

    def _learns_by_dearkd(self) -> bool:
        """Return whether the student is a ViT, built without the weights that it starts from."""
        sizes = {key: value for key, value in self.sizes.items() if key not in self.given}
        weights = dict(pretrained=False, pretrained_path=None, initial_checkpoint='')
        args = argparse.Namespace(**{**vars(self.user_args), **sizes, **weights})
        return has_content_tokens(create_student(args, self.images.num_classes, timm.create_model))

    def student_in_folder(self, teacher: str, is_own: bool) -> Optional[Step]:
        """Return the student of an earlier call, as this call would train it; None if there is none."""
        folder = os.path.join(self.output, 'student')
        if not os.path.exists(os.path.join(folder, 'args.yaml')):
            return None
        args = open_run(folder).args
        return self.student(teacher, {key: args[key] for key in FROM_TEACHER if args.get(key) is not None}, is_own)


def build_task(step: Step, cnn: Any, device: torch.device) -> TrainingTask:
    """Build a run's task with new weights.

    Raises:
        ValueError: If model, teacher and options do not fit together.
    """
    if step.name == 'teacher':
        return ClassificationTask(cnn, device=device, verbose=False)
    args = step.args
    model = create_student(args, cnn.num_classes, timm.create_model)
    kind = args.kd_distill_type or ('dearkd' if has_content_tokens(model) else 'logit')
    check_distillation(args, kind)
    if kind != 'dearkd':
        return ClassificationTask(model, device=device, verbose=False)
    teacher = Teacher(cnn, in_chans=args.in_chans, img_size=args.kd_teacher_img_size)
    return DearKDTask(model, teacher, TwoStageSchedule(1), hooks=args.dearkd_hooks, device=device, verbose=False)


def estimate_minutes(step: Step, task: TrainingTask, images: Images, device: torch.device) -> float:
    """Return the expected minutes of a run: the faster of the second and the third of three steps on noise counts."""
    args = step.args
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    x = torch.randn(args.batch_size, args.in_chans, args.img_size, args.img_size, device=device)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)
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
    return (args.epochs * images.num_train + num_evaluated / 3) * min(times[1:]) / len(x) / 60


def log_step(step: Step, images: Images, cnn: Any, device: torch.device) -> None:
    """Log what was chosen for a run, and the expected time.

    Raises:
        ValueError: If model, teacher and options do not fit together.
    """
    _logger.info(f'{step.name.capitalize()}: {step.describe()}.')
    if step.args.dearkd_labels == 'teacher':
        _logger.info("The student learns the teacher's answers. The classes of the training images have no effect.")
    task = build_task(step, cnn, device)
    try:
        minutes = f'{max(1., estimate_minutes(step, task, images, device)):.0f} min'
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
    finished one. The choices are ours, not the paper's.

    Args:
        data: Folder with one folder of images per class, or with such folders in `train` and `validation`. Without
            these two, a fifth of each class is for validation.
        teacher: Output folder of a run of train.py, one of its checkpoints, or an `hf-hub:` name. The student then
            learns its answers, and the classes of the training images have no effect. A CNN given by its timm name is
            trained on the images first, from its pretrained weights. None trains a small CNN first.
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
    if student and not is_known(student):
        raise ValueError(f'Unknown student {student!r}. The nearest names: {nearest_names(student)}.')
    return given


def is_known(name: str) -> bool:
    """Return whether timm has a model of this name, and its weights if the name has a tag."""
    try:
        return timm.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # an unknown tag
        return False


def find_teacher(planner: Planner, name: Optional[str], checkpoint: Optional[str]) -> Tuple[str, Optional[Step]]:
    """Return the name or the folder of the teacher, and the run that trains it; None for a trained one.

    Raises:
        ValueError: If the name is neither of a trained model nor of one that timm can train.
    """
    if name is None and checkpoint:
        raise ValueError('--kd-teacher-checkpoint has weights alone. Name their architecture with --teacher.')
    if name is not None and os.path.exists(name):
        return os.path.abspath(name), None
    if name is not None and (':' in name or checkpoint):
        return name, None
    if name is not None and not is_known(name):
        nearest = '' if os.path.dirname(name) else f' The nearest names: {nearest_names(name)}.'
        raise ValueError(
            f'No folder and no timm model {name!r}. Give --teacher a run folder, hf-hub:ORG/NAME, or a name of timm.'
            f'{nearest}')
    step = planner.teacher(name)
    return step.folder, step


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
    images = look_at(
        root, args.train_split, args.val_split, args.train_fraction, args.class_map, input_key=args.input_key,
        input_img_mode=args.input_img_mode or 'RGB')
    planner = Planner(root, output, images, student, device, user, given)
    try:
        check_report()
    except ValueError as e:
        planner.reports = False
        _logger.warning(f'No report.html: {e}')
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
        resolve_args(step.args)  # its errors come before the CNN is trained
        log_step(first, images, cnn, device)
        log_step(step, images, cnn, device)
        _logger.info('The trained teacher decides whether the student sees mirror images.')
        return partial(run_both, planner, first, train.prepare(first.argv), images)
    cnn = load_model(name, args.kd_teacher_checkpoint).eval()
    step = step or planner.student(name, planner.ask_teacher(cnn), is_own=first is not None)
    resolve_args(step.args)
    log_step(step, images, cnn, device)
    return partial(run_student, step, train.prepare(step.argv), first, images, {})


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
