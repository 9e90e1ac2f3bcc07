"""Train a timm model on images, alone or taught by a CNN with DearKD.

A thin fork of timm's train.py: the same flags, files and habits.

    python train.py DIR --model dearkd_tiny_patch16_224 --kd-model-name regnety_160.deit_in1k
    python train.py IMAGENET --model dearkd_tiny_patch16_224 -c dearkd_300e
    torchrun --nproc_per_node=8 train.py IMAGENET --model dearkd_tiny_patch16_224 -c dearkd_300e --grad-accum-steps 1
"""
import gc
import importlib
import json
import logging
import shlex
import time
from functools import partial
from typing import Any, Callable, Dict, NoReturn, Optional, Sequence, cast

import torch
import torch.distributed as dist
from huggingface_hub.utils.logging import disable_propagation
from timm.layers import set_fast_norm
from timm.models import create_model
from timm.task import ClassificationTask, TrainingTask
from timm.utils import distribute_bn, random_seed, setup_default_logging
from timm.utils.log import FormatterNoInfo

from distill_hooks import DearKDTask
from distill_hooks.errors import first_line, one_line
from distill_hooks.task import keep_constants_local
from timm_dearkd.analysis.report import check_available as check_report
from timm_dearkd.analysis.report import write_report
from timm_dearkd.engine.checkpoints import Position, read_classes, restore_generators
from timm_dearkd.engine.data import UNKNOWN_CLASSES, build_datasets, class_names, classes_of
from timm_dearkd.engine.distillation import build_task, uses_ema
from timm_dearkd.engine.label_cache import build_label_cache
from timm_dearkd.engine.loader import (
    TrainLoader,
    build_distance_images,
    build_eval_loader,
    build_mixup,
    build_teacher_loader,
    build_train_loader,
)
from timm_dearkd.engine.loop import Stepper, Trainer, Validator, mean_lr
from timm_dearkd.engine.optimizer import build_optimizer
from timm_dearkd.engine.options import build_config_parser, build_parser, output_parent, parse_args, resolve_args
from timm_dearkd.engine.process import (
    CompileError,
    Interrupted,
    Precision,
    Ranks,
    StopRequest,
    TrainingError,
    command_line,
    compile_errors,
    images_per_update,
    on_primary,
    select_device,
    use_deterministic_kernels,
)
from timm_dearkd.engine.recorder import Recorder, build_recorder, describe_run, log_expected_end
from timm_dearkd.engine.run_folder import RunFolder, complete_export, export_model, record_results
from timm_dearkd.engine.schedule import choose_epochs, evaluated_epochs, schedule_run
from timm_dearkd.engine.student import build_evaluation, build_student, warn_of_new_weights
from timm_dearkd.engine.teacher_check import TeacherCheck

_logger = logging.getLogger('train')

config_parser = build_config_parser()
parser = build_parser()


def _parse_args(argv: Optional[Sequence[str]] = None):
    return parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    prepare(argv)()


def set_up_logging() -> None:
    """Set up timm's logging, once in a process."""
    if not any(isinstance(handler.formatter, FormatterNoInfo) for handler in logging.root.handlers):
        setup_default_logging()
    disable_propagation()  # huggingface_hub's logger has a handler of its own
    logging.getLogger('timm.data.dataset').setLevel(logging.ERROR)  # our data sets name what they skip


def prepare(argv: Optional[Sequence[str]] = None) -> Callable[[], None]:
    """Prepare everything up to the first step, and return a function that does the rest. Bad options end here."""
    set_up_logging()
    args, args_text = _parse_args(argv)
    for module in args.device_modules or ():
        importlib.import_module(module)
    args = resolve_args(args)
    if args.report:
        check_report()
    device, ranks = select_device(args.device)
    if args.deterministic:
        use_deterministic_kernels()
    if not ranks.is_primary:
        logging.getLogger().setLevel(logging.ERROR)  # until the run begins, all say the same
    random_seed(args.seed)  # the same weights in every process
    if args.fast_norm:
        set_fast_norm()
    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    if args.eval_only:
        return prepare_evaluation(args, precision, ranks)
    return prepare_training(args, args_text, command_line(argv, ranks), precision, ranks)


def prepare_training(args, args_text: str, command: str, precision: Precision, ranks: Ranks) -> Callable[[], None]:
    """Prepare a run whose folder is locked until the run, or its preparation, ends."""
    run_folder = RunFolder(output_parent(args), args.experiment)
    try:
        train = build_run_in(run_folder, args, args_text, command, precision, ranks)
    except BaseException:
        run_folder.discard()
        raise

    def run() -> None:
        with run_folder:
            train()

    return run


def build_run_in(
        run_folder: RunFolder,
        args,
        args_text: str,
        command: str,
        precision: Precision,
        ranks: Ranks,
) -> Callable[[], None]:
    """Build the data, the task, the schedules and the recorder of a run."""
    device = precision.device
    checkpoint = on_primary(ranks, partial(run_folder.find_start, args.resume))
    train_set, eval_set = build_datasets(args, read_classes(checkpoint))
    if not checkpoint:
        warn_of_new_weights(args)
    model, data_config = build_student(args, train_set, device, create_model)
    mixup = build_mixup(args, model.num_classes)
    loader_eval = build_eval_loader(args, eval_set, data_config, device, ranks)
    loader_teacher = build_teacher_loader(args, train_set, eval_set, model.num_classes, data_config, device, ranks)
    loader_train = build_train_loader(args, train_set, data_config, mixup, device, ranks)
    args = choose_epochs(args, len(loader_train), ranks)
    if not args.train_img_sizes:  # with several sizes, updates differ in their number of images
        _logger.info(
            f'An update has {images_per_update(args, ranks)} images: --batch-size {args.batch_size} x'
            f' --grad-accum-steps {args.grad_accum_steps} x {ranks.world_size} processes.')
    distance_images = build_distance_images(args, eval_set, data_config, model, device)

    names = class_names(train_set) or []
    task = build_task(args, model, data_config, device, soft_targets=mixup is not None, names=names)
    optimizer = build_optimizer(args, task, device, ranks)
    trainer = build_trainer(args, task, loader_train, optimizer, precision, ranks)
    validator = build_validator(args, task, loader_eval, precision, ranks)
    start, epochs = schedule_run(args, trainer, checkpoint)
    export = partial(export_model, model, data_config=data_config, label_names=names)
    if args.resume == 'auto' and start.epoch >= epochs.stop:
        _logger.info(f'{args.experiment} has its {start.epoch} epochs already. It is left as it is.')
        complete = partial(complete_run, args, run_folder.path, export, uses_ema(args, task), device)
        return complete if ranks.is_primary else lambda: None
    if start.epoch >= epochs.stop:
        raise ValueError(f'Nothing to train: the run ends after epoch {epochs.stop}, and {start.epoch} are done.')

    trainer.labels = build_label_cache(args, trainer, train_set, data_config)
    if trainer.labels is not None:
        trainer.labels.num_read, trainer.labels.num_computed = start.num_labels
    compile_and_distribute(args, task, device, ranks)
    run_info = describe_run(args, train_set, eval_set, model, precision, ranks)
    run_info.update(command=command, epochs=epochs.stop)
    recorder = build_recorder(
        args, args_text, run_folder, trainer, model, data_config, export, start, run_info,
        classes_of(train_set) if ranks.is_primary else UNKNOWN_CLASSES, distance_images)
    teacher_check = TeacherCheck(
        task, recorder.folder, validator, build_validator(args, task, loader_teacher, precision, ranks), names,
        args.kd_teacher_img_size, args.kd_class_map or '', ranks)
    return partial(fit, args, trainer, validator, recorder, start, epochs, teacher_check)


def compile_and_distribute(args, task: TrainingTask, device: torch.device, ranks: Ranks) -> None:
    """Compile the task and wrap it for several processes, as the options ask for."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    if ranks.distributed:
        keep_constants_local(cast(torch.nn.Module, task.trainable_module))
        task.prepare_distributed(
            device_ids=[device] if device.type != 'cpu' else None,
            gradient_as_bucket_view=True,  # no copy of the gradients
            **(dict(broadcast_buffers=False) if args.no_ddp_bb else {}))


def build_trainer(
        args,
        task: TrainingTask,
        loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        ranks: Ranks,
) -> Trainer:
    """Build the trainer."""
    power = dict(none=0., sqrt=0.5, linear=1.)[args.variable_batch_loss_scale]
    return Trainer(
        task,
        loader,
        Stepper(task, optimizer, precision.scaler, args.clip_grad, args.clip_mode),
        precision,
        ranks,
        grad_accum_steps=args.grad_accum_steps,
        channels_last=args.channels_last,
        log_interval=args.log_interval,
        skip_nan_steps=args.skip_nan_steps,
        loss_scale=(lambda batch_size: (batch_size / args.batch_size) ** power) if power else None,
        synchronize=args.synchronize_step,
    )


def build_validator(args, task: TrainingTask, loader, precision: Precision, ranks: Ranks) -> Optional[Validator]:
    """Build the validator; None without images."""
    if loader is None:
        return None
    return Validator(
        task, loader, precision, ranks,
        channels_last=args.channels_last,
        tta=args.tta,
        log_interval=args.log_interval,
    )


def complete_run(args, folder: str, export: Callable[..., Any], use_ema: bool, device: torch.device) -> None:
    """Write the exported student if it is missing, and the report."""
    complete_export(folder, export, use_ema)
    if args.report:
        report(folder, device)


def fit(
        args,
        trainer: Trainer,
        validator: Optional[Validator],
        recorder: Recorder,
        start: Position,
        epochs: range,
        teacher_check: Optional[TeacherCheck] = None,
) -> None:
    """Train and evaluate the epochs, with a checkpoint after each.

    Args:
        args: The options.
        trainer: Trains an epoch.
        validator: Evaluates an epoch; None without validation images.
        recorder: Writes results and checkpoints.
        start: Where the run starts.
        epochs: The epochs.
        teacher_check: Evaluates the teacher; None does not.

    Raises:
        Interrupted: If a signal has come. There is a checkpoint to resume from.
        TrainingError: If training cannot continue.
    """
    ranks = trainer.ranks
    _logger.info(f'Training for {len(epochs)} epochs, up to {epochs.stop}. Output: {recorder.folder}')
    if not ranks.is_primary:
        logging.getLogger().setLevel(logging.WARNING)
    if recorder.saver is not None:  # after a kill between checkpoint and export
        complete_export(recorder.folder, recorder.export, recorder.export_ema)
    restore_generators(start, args.seed, trainer.task, trainer.precision.device, ranks)
    evaluated = evaluated_epochs(args, epochs)
    with recorder.tracker, StopRequest(ranks) as stop:
        if teacher_check is not None:
            teacher_check.evaluate(start, stop)
            recorder.teacher_top1 = teacher_check.top1
        trainer.on_log, trainer.on_update = recorder.on_log, partial(recorder.on_update, stop)
        if validator is not None and validator.in_step:  # else the next update asks
            validator.on_batch = partial(recorder.on_eval_batch, stop)
        for epoch in epochs:
            began = time.monotonic()
            eval_seconds = run_epoch(
                args, trainer, validator, recorder, teacher_check, start, epoch, epoch in evaluated)
            if epoch == start.epoch + bool(start.update):  # the first whole one
                timed = evaluated if validator is not None else []
                log_expected_end(epoch, epochs, timed, time.monotonic() - began, eval_seconds)
    if recorder.saver is not None:
        complete_run(args, recorder.folder, recorder.export, recorder.export_ema, trainer.precision.device)
        if trainer.labels is not None:
            _logger.info(trainer.labels.describe())
            record_results(
                recorder.folder, labels_read=trainer.labels.num_read, labels_computed=trainer.labels.num_computed)
        recorder.log_results(args.eval_metric)


def run_epoch(
        args,
        trainer: Trainer,
        validator: Optional[Validator],
        recorder: Recorder,
        teacher_check: Optional[TeacherCheck],
        start: Position,
        epoch: int,
        is_evaluated: bool,
) -> float:
    """Train an epoch, evaluate it if asked for, and record it. Return the seconds of the evaluation."""
    task = trainer.task
    if isinstance(task, DearKDTask):
        task.set_epoch(epoch)
        if validator is None and recorder.saver is not None and task.weights != task.schedule(epoch - 1):
            recorder.saver.restart_ranking()  # a loss of other weights is no better or worse
    if epoch == start.epoch:
        losses = trainer.train_epoch(epoch, start.update, start.meter)
    else:
        losses = trainer.train_epoch(epoch)
    lr = mean_lr(trainer.step.optimizer)  # the epoch's own, before the scheduler moves on
    trained = time.monotonic()
    metrics = evaluate_epoch(args, trainer, validator, f'Test: {epoch}') if is_evaluated else {}
    eval_seconds = time.monotonic() - trained
    metric = metrics.get(args.eval_metric) if validator is not None else losses['loss']
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.step(epoch + 1, metric)
    if teacher_check is not None:
        teacher_check.after_epoch(epoch, losses)
    recorder.on_epoch(epoch, losses, metrics, metric, lr, epoch + 1 in args.save_epochs)
    return eval_seconds


def report(folder: str, device: torch.device) -> None:
    """Write the report of a finished run. Errors only give a warning."""
    try:
        _logger.info(f'*** Report: {write_report(folder, device=str(device))}')
    except Exception as e:
        _logger.warning(
            f'The report could not be written ({type(e).__name__}: {one_line(e)}). The run is complete.'
            f' Once that is fixed: timm-dearkd report {shlex.quote(folder)}')


def evaluate_epoch(args, trainer: Trainer, validator: Optional[Validator], label: str) -> Dict[str, float]:
    """Return the metrics of the weights, or of their average if there is one; {} without a validation set."""
    task: Any = trainer.task
    ranks = trainer.ranks
    metrics: Dict[str, float] = {}
    for ema in (False, True) if uses_ema(args, task) else (False,):
        model = task.get_eval_model(ema=ema)
        if ranks.distributed and args.dist_bn:
            distribute_bn(model, ranks.world_size, args.dist_bn == 'reduce')
        if validator is not None:
            metrics = validator(model, label + (' (EMA)' if ema else ''))
    return metrics


def prepare_evaluation(args, precision: Precision, ranks: Ranks) -> Callable[[], None]:
    """Prepare `--eval-only`: metrics of a model on the validation split, as JSON on standard output."""
    model, data_config, eval_set = build_evaluation(args, precision.device, create_model)
    loader = build_eval_loader(args, eval_set, data_config, precision.device, ranks)
    task = ClassificationTask(model, device=precision.device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    validator: Any = build_validator(args, task, loader, precision, ranks)

    def evaluate() -> None:
        metrics = validator(task.get_eval_model())
        if ranks.is_primary:
            print(json.dumps(dict(model=args.model, num_images=len(eval_set), **metrics), indent=4))

    return evaluate


def run_script(
        argv: Optional[Sequence[str]] = None,
        prepare_run: Optional[Callable[[Optional[Sequence[str]]], Callable[[], Any]]] = None,
        prog: str = parser.prog,
) -> None:
    """Run a command that trains. An error is one line on standard error and a status other than 0.

    Args:
        argv: Arguments; None takes those of the process.
        prepare_run: Takes the arguments, and returns a function that trains. None is `prepare`.
        prog: Name of the command.
    """
    def fail(message: str) -> NoReturn:
        parser.exit(2, f'{prog}: error: {message}\n')

    try:
        run = (prepare_run or prepare)(argv)
    except (ImportError, OSError, ValueError) as e:
        fail(one_line(e, limit=None))
    except KeyboardInterrupt:
        parser.exit(130, f'{prog}: Interrupted before the first step.\n')
    status, message = 0, None
    try:
        with compile_errors():
            run()
    except (OSError, TrainingError, CompileError) as e:
        fail((str(e).strip().splitlines() or [type(e).__name__])[-1])
    except RuntimeError as e:
        if not torch.are_deterministic_algorithms_enabled() or 'determinis' not in str(e):
            raise
        fail(f'--deterministic: {first_line(e)} Remove the flag.')
    except ValueError as e:
        if not str(e).startswith('Expected more than 1 value per channel'):
            raise
        fail('BatchNorm cannot be trained on one value per channel. Set a --batch-size above 1.')
    except Interrupted as e:
        status, message = 128 + e.signum, f'{prog}: {e}\n'
    except KeyboardInterrupt:  # of --eval-only, or the second one in training
        parser.exit(130, f'{prog}: Interrupted.\n')
    if dist.is_initialized():  # after an error some may wait for others, but not here
        dist.barrier()  # a process that leaves while others still talk to it may be torn down with them
        del run  # the task holds the group, whose threads would abort at the end of the interpreter
        gc.collect()
        dist.destroy_process_group()
    if status:
        parser.exit(status, message)


if __name__ == '__main__':
    run_script()
