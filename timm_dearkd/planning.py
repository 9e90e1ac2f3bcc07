"""Plan of the runs of `distill`: the student, and its teacher if none is given."""
import argparse
import contextlib
import io
import logging
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
from timm.models import get_model_input_config

from distill_hooks.checkpoint import nearest_names, resolve_model, training_args
from distill_hooks.task import has_content_tokens
from distill_hooks.teacher import input_normalisation

from .analysis.runs import open_run
from .engine.checkpoints import EXPORT_NAME, changed_options
from .engine.data import image_mode
from .engine.options import build_config_parser, options_to_argv, parse_args, read_config
from .engine.process import default_workers
from .engine.run_folder import has_run
from .engine.schedule import epochs_for
from .engine.student import create_student
from .images import Images
from .settings import (
    choose_batch_size,
    choose_cnn,
    choose_labels,
    choose_student,
    choose_training,
    cnn_epochs,
    is_far,
    is_mirrored_alike,
)

_logger = logging.getLogger(__name__)

# Options of train.py that the CNN takes from the user, too
SHARED_OPTIONS = (
    'train_split', 'val_split', 'train_fraction', 'fraction_seed', 'fraction_keep', 'class_map', 'num_classes',
    'input_key', 'input_img_mode', 'in_chans', 'device', 'amp', 'amp_dtype', 'workers', 'seed', 'deterministic')
# Options of the student that the teacher decides
FROM_TEACHER = ('in_chans', 'mean', 'std', 'kd_teacher_img_size', 'hflip')


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
        if not has_run(self.folder):
            return False
        run = open_run(self.folder)
        known = str(run.args.get('data'))
        moved = {} if os.path.exists(known) else {'data': known}  # `check_unchanged` has compared the images
        changed = changed_options(run.args, {**vars(self.args), **moved})
        if changed:
            raise ValueError(
                f'{self.folder!r} has a run with other options: {changed}. Set another --output, or remove the folder.')
        if self.args.cooldown_epochs or self.args.warmup_prefix or self.args.lr_cycle_limit > 1:
            return False  # these add epochs, and train.py knows how many
        summary, last, export = (run.folder / name for name in ('summary.csv', 'last.pth.tar', EXPORT_NAME))
        # the row of an epoch is written before its checkpoint
        return (run.num_done >= (self.args.stop_epoch or self.args.epochs) and last.exists() and export.exists()
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Log nothing."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse options of train.py.

    Raises:
        ValueError: If one of them is wrong.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), quiet():  # `train.prepare` parses them again
            return parse_args(argv)[0]
    except SystemExit:
        raise ValueError(errors.getvalue().rpartition('error: ')[2].strip()) from None


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
        reports: Whether the student's folder gets a report.
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
            reports: bool = True,
    ) -> None:
        self.data, self.output, self.images, self.device = data, output, images, device
        self.reports = reports
        self.user, self.given, self.user_args = list(user), set(given), parse(user)
        self.batch_size: int = (
            self.user_args.batch_size if 'batch_size' in self.given else choose_batch_size(images.epoch_length))
        self.epochs = self.user_args.epochs
        if 'epochs' not in self.given:
            num_updates = images.epoch_length // (self.batch_size * self.user_args.grad_accum_steps)
            self.epochs = epochs_for(images.epoch_length, num_updates)
        self.sizes = choose_student(student, images, device)
        self.size: int = self.user_args.img_size or self.sizes['img_size']

    def _step(self, name: str, chosen: Dict[str, Any], user: Sequence[str], given: Sequence[str]) -> Step:
        fixed = dict(output=self.output, experiment=name, resume='auto', report=name == 'student' and self.reports)
        options = {key: value for key, value in {**fixed, **chosen}.items() if key not in given}
        config = ['-c', 'small_folder']
        if build_config_parser().parse_known_args(user)[0].config is not None:  # a file of the user takes its place
            recipe = {key: value for key, value in read_config('small_folder').items() if key not in given}
            recipe.pop('auto_epochs', None)
            options, config = {**recipe, **options, 'epochs': chosen['epochs']}, []
        argv = [self.data, *config, *options_to_argv(options), *user]
        return Step(name, [key for key in chosen if key not in given], argv, parse(argv))

    def teacher(self, name: Optional[str]) -> Step:
        """Plan the training of a CNN: one by its timm name, from its pretrained weights, or a small one.

        It sees no mirror images, so that its answers to them tell whether the student may.
        """
        in_chans = self.user_args.in_chans or (1 if self.images.is_grey else 3)
        training = choose_training(self.images, in_chans, self.device, cnn_epochs(self.epochs))
        shared = {key: getattr(self.user_args, key) for key in SHARED_OPTIONS if key in self.given}
        return self._step(
            'teacher', dict(choose_cnn(name, self.size), **training, hflip=0.), options_to_argv(shared), list(shared))

    def ask_teacher(self, cnn: Any, is_trained: bool = True) -> Dict[str, Any]:
        """Return the options of the student that its CNN decides. An untrained CNN does not decide on mirroring."""
        channels, size, _ = get_model_input_config(cnn)['input_size']
        in_chans = self.user_args.in_chans or (1 if self.images.is_grey or channels == 1 else 3)
        options: Dict[str, Any] = dict(in_chans=in_chans)
        if channels == in_chans:
            mean, std = input_normalisation(cnn, channels)
            options.update(mean=mean.tolist(), std=std.tolist())
        seen = self.user_args.kd_teacher_img_size
        if seen is None and is_far(size, self.size):
            seen = options['kd_teacher_img_size'] = size
            checkpoint = self.user_args.kd_teacher_checkpoint
            if checkpoint and not training_args(checkpoint):
                _logger.warning(
                    f'{checkpoint!r} does not tell at which size the teacher was trained. It sees {size} pixels, as is'
                    ' usual for its architecture. If it was trained at another size, set --kd-teacher-img-size.')
        if is_trained:
            mode = self.user_args.input_img_mode if channels == in_chans else None
            mode = image_mode(mode, channels)
            is_alike = is_mirrored_alike(cnn, self.images.samples, seen or self.size, mode)
            options['hflip'] = 0.5 if is_alike else 0.
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
        if not has_run(folder):
            return None
        args = open_run(folder).args
        return self.student(teacher, {key: args[key] for key in FROM_TEACHER if args.get(key) is not None}, is_own)


def is_known(name: str) -> bool:
    """Return whether timm has a model of this name, and its weights if the name has a tag."""
    try:
        return timm.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # an unknown tag
        return False


def find_teacher(planner: Planner, name: Optional[str], checkpoint: Optional[str]) -> Tuple[str, Optional[Step]]:
    """Return the name or the folder of the teacher, and the run that trains it; None for a trained one.

    Raises:
        ValueError: If the name is neither of a trained model nor of one that timm can train, or options are given that
            only a trained teacher takes.
    """
    if name is None and checkpoint:
        raise ValueError('--kd-teacher-checkpoint has weights alone. Name their architecture with --teacher.')
    if name is not None and os.path.exists(name):
        resolve_model(name, checkpoint, '--kd-teacher-checkpoint')  # raises for a file or a folder that is no model
        return os.path.abspath(name), None
    if name is not None and (':' in name or checkpoint):
        return name, None
    if name is not None and not is_known(name):
        nearest = '' if os.path.dirname(name) else f' The nearest names: {nearest_names(name)}.'
        raise ValueError(
            f'No folder and no timm model {name!r}. Give --teacher a run folder, hf-hub:ORG/NAME, or a name of timm.'
            f'{nearest}')
    if planner.user_args.kd_teacher_mean or planner.user_args.kd_teacher_std:
        raise ValueError(
            '--kd-teacher-mean and --kd-teacher-std are for a trained CNN, and distill trains this one. Give --teacher'
            ' and its file, or remove them.')
    step = planner.teacher(name)
    return step.folder, step
