"""The task that trains the student, and its teacher."""
import logging
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config
from timm.task import ClassificationTask, TrainingTask
from timm.utils import set_jit_fuser, unwrap_model

from distill_hooks import (
    DearKDTask,
    FeatureTask,
    LogitTask,
    Teacher,
    TokenTask,
    TwoStageSchedule,
    has_content_tokens,
    load_class_map,
    load_model,
)
from distill_hooks.checkpoint import training_args
from distill_hooks.errors import one_line

from ..attention import ConvAttention
from .checkpoints import Position
from .image_folder import UNUSED_CLASS, first_names, normal_name
from .options import check_distillation
from .process import model_dtype

_logger = logging.getLogger(__name__)


def build_schedule(args, num_epochs: int) -> TwoStageSchedule:
    """Build DearKD's stages of a run. Epochs that the learning-rate schedule appends belong to stage II."""
    epochs = min(args.epochs, num_epochs)
    return TwoStageSchedule(
        epochs,
        args.dearkd_stage1_epochs,
        stage2=args.dearkd_stage2,
        alpha=args.dearkd_alpha,
        beta=args.dearkd_beta,
        cooldown_epochs=num_epochs - epochs,
    )


def build_task(
        args,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        soft_targets: bool,
        names: Sequence[str] = (),
) -> TrainingTask:
    """Build timm's classification or distillation task, or DearKD's, with the average of weights.

    Args:
        args: The options.
        model: The student.
        data_config: timm's preprocessing configuration.
        device: Device of the task.
        soft_targets: Whether the loader yields soft labels.
        names: Class names, to which those of a teacher are matched.

    Raises:
        ValueError: If the options do not go together, or the teacher does not fit.
    """
    bce = dict(
        bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    common: Dict[str, Any] = dict(
        criterion_kwargs=dict(
            loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
            smoothing=args.smoothing,
            soft_targets=soft_targets,
            jsd_splits=args.aug_splits,
            **(bce if args.bce_loss else {}),
        ),
        device=device,
        dtype=model_dtype(args),
    )
    distill_type = choose_distill_type(args, model) if args.kd_model_name else ''
    is_dearkd = distill_type == 'dearkd'
    model = _convert_norms(args, model, is_dearkd)
    task: Any
    if not args.kd_model_name:
        task = ClassificationTask(model, **common)
    else:
        task = _build_distillation(args, distill_type, model, data_config, names, common)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    return task


def _convert_norms(args, model: nn.Module, is_dearkd: bool) -> nn.Module:
    """Convert the model to --split-bn, --sync-bn and --torchscript."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.sync_bn and torch.distributed.is_initialized():
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        if is_dearkd:
            raise ValueError(
                '--torchscript does not go with DearKD, which reads tokens from the middle of the model.'
                ' Use --torchcompile.')
        if any(isinstance(module, ConvAttention) for module in model.modules()):
            raise ValueError(
                '--torchscript trains CNNs and plain ViTs, not models with MHCA blocks, which TorchScript only runs.'
                ' Use --torchcompile.')
        if args.fuser:
            set_jit_fuser(args.fuser)
        cfg = getattr(model, 'pretrained_cfg', None)
        try:
            model = torch.jit.script(model)
        except Exception as e:  # the compiler raises what it likes
            raise ValueError(f'--torchscript cannot compile {args.model}: {one_line(e)}. Use --torchcompile.') from e
        cast(Any, model).pretrained_cfg = cfg  # timm's distillation tasks look for it
    return model


def _match_classes(teacher: Any, names: Sequence[str], num_classes: int) -> Optional[List[int]]:
    """Return the teacher's class for each of the student's, by name; None if they are the same or have no names.

    Warns if the names differ: they may be other names of the same classes.

    Raises:
        ValueError: If the teacher lacks a class, and it has more classes, or shared names are at other indices.
    """
    known = saved_names(teacher)
    names = [name for name in names if not name.startswith(UNUSED_CLASS)]
    if not names or not num_classes <= len(known) == teacher.num_classes:
        return None
    unknown = [name for name in names if name not in known]
    if not unknown:
        indices = [known.index(name) for name in names]
        others = [index for index in range(len(known)) if index not in indices]
        indices += others[:num_classes - len(names)]  # --num-classes may ask for unused outputs
        if indices == list(range(len(known))):
            return None
        _logger.info("The teacher has more classes, or another order. They are matched by name.")
        return indices
    has_moved = any(name in known and known.index(name) != index for index, name in enumerate(names))
    if len(known) > num_classes or has_moved:
        raise ValueError(
            f'The teacher knows no class {unknown[0]!r}. It knows {first_names(known)}. Rename the folder, or map the'
            ' student\'s classes to the teacher\'s with --kd-class-map FILE.')
    _logger.warning(
        f'The teacher knows no class {unknown[0]!r}. Classes are matched by their index, so {unknown[0]!r} is the'
        f" teacher's {known[names.index(unknown[0])]!r}. If these differ, set --kd-class-map FILE.")
    return None


def load_cnn(options: Mapping[str, Any]) -> nn.Module:
    """Load the teacher's model, with the normalisation of --kd-teacher-mean and --kd-teacher-std.

    Args:
        options: Options of a run.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the model does not load, or has another number of channels.
    """
    model = load_model(options['kd_model_name'], options.get('kd_teacher_checkpoint'))
    set_normalisation(model, options.get('kd_teacher_mean'), options.get('kd_teacher_std'), '--kd-teacher-')
    return model


def set_normalisation(
        model: Any,
        mean: Optional[Sequence[float]],
        std: Optional[Sequence[float]],
        prefix: str,
) -> None:
    """Set the normalisation of a model's input; None keeps the model's own.

    Args:
        model: The model, with its `pretrained_cfg`.
        mean: Mean per channel, or one for all.
        std: Standard deviation per channel, or one for all.
        prefix: Start of the two flags, for the message.

    Raises:
        ValueError: If the model has another number of channels.
    """
    channels = get_model_input_config(model)['input_size'][0]
    given = {key: values for key, values in (('mean', mean), ('std', std)) if values}
    for key, values in given.items():
        if len(values) not in (1, channels):
            raise ValueError(f'{prefix}{key} has {len(values)} values, expected 1, or {channels} for its channels.')
    model.pretrained_cfg = {**model.pretrained_cfg, **given}


def has_only_weights(name: str, checkpoint: Optional[str]) -> bool:
    """Return whether a teacher comes from a file of weights, without the options of its training."""
    if not checkpoint or os.path.isdir(name) or ':' in name:
        return False
    return not training_args(checkpoint)


def load_teacher(
        student: nn.Module,
        data_config: Dict[str, Any],
        options: Mapping[str, Any],
        names: Sequence[str] = (),
) -> Teacher:
    """Load the teacher of a student, with its classes in the student's order.

    Args:
        student: The student.
        data_config: timm's preprocessing configuration of the student.
        options: Options of the student's run. Those of the teacher begin with `kd_`.
        names: Names of the student's classes; () keeps the teacher's classes.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the teacher does not load or does not fit the student.
    """
    model, class_map = load_cnn(options), options.get('kd_class_map')
    indices = load_class_map(class_map) if class_map else _match_classes(model, names, cast(Any, student).num_classes)
    return Teacher.for_student(
        student,
        model,
        img_size=options.get('kd_teacher_img_size'),
        class_map=indices,
        mean=data_config['mean'],
        std=data_config['std'],
        input_size=data_config['input_size'],
    )


def _build_distillation(
        args,
        distill_type: str,
        model: nn.Module,
        data_config: Dict[str, Any],
        names: Sequence[str],
        common: Dict[str, Any],
) -> TrainingTask:
    """Build DearKD's task or one of timm's distillation tasks, all with the same `Teacher`.

    Raises:
        ValueError: If the teacher, the student and the options do not fit together.
    """
    teacher = load_teacher(model, data_config, vars(args), names if distill_type != 'feature' else ())
    task: TrainingTask
    if distill_type == 'dearkd':
        task = DearKDTask(
            model,
            teacher,
            build_schedule(args, args.epochs),
            hooks=args.dearkd_hooks,
            normalize_features=args.dearkd_normalize_features,
            labels=args.dearkd_labels,
            soft_temperature=args.kd_temperature if args.dearkd_soft_labels else None,
            **common,
        )
    else:
        try:
            task = _build_timm_task(args, distill_type, model, teacher, common)
        except (AssertionError, KeyError, RuntimeError, TypeError) as e:
            raise ValueError(f'--kd-distill-type {distill_type} with {args.kd_model_name}: {one_line(e)}') from e
    if args.kd_teacher_img_size is None:
        for size in args.train_img_sizes or ():
            teacher.probe((data_config['input_size'][0], size, size))
    _log_teacher_input(args, teacher.model, data_config['input_size'])
    teacher.fold_batchnorm(data_config['input_size'])
    if common['device'].type == 'cpu':  # faster for most CNNs, a little slower for ConvNeXt
        teacher.model.to(memory_format=torch.channels_last)
    if args.amp:
        teacher.store_weights(getattr(torch, args.amp_dtype))
    return task


def _build_timm_task(args, distill_type: str, model: nn.Module, teacher: nn.Module, common: Dict[str, Any]):
    common = dict(
        common,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if distill_type == 'logit':
        return LogitTask(
            model, teacher, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if distill_type == 'feature':
        return FeatureTask(
            model,
            teacher,
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    return TokenTask(
        model, teacher, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)


def _log_teacher_input(args, teacher: Any, input_size: Tuple[int, int, int]) -> None:
    """Log a normalisation that is assumed, or an image size that is not the one of the teacher's training."""
    given = args.kd_teacher_img_size
    if has_only_weights(args.kd_model_name, args.kd_teacher_checkpoint):  # its size is not known either
        if not (args.kd_teacher_mean and args.kd_teacher_std):
            mean, std = (tuple(round(value, 3) for value in teacher.pretrained_cfg[key]) for key in ('mean', 'std'))
            _logger.info(
                f'{args.kd_teacher_checkpoint!r} does not tell how its images were normalised. The teacher gets the'
                f' mean {mean} and the deviation {std}. If it was trained with others, set --kd-teacher-mean and'
                ' --kd-teacher-std.')
        return
    trained = tuple(get_model_input_config(teacher)['input_size'][1:])
    seen = tuple(input_size[1:]) if given is None else (given, given)
    if trained == seen:
        return
    ratio = max(max(a / b, b / a) for a, b in zip(trained, seen))
    remedy = f' --kd-teacher-img-size {trained[-1]} resizes its images.' if given is None else ''
    # CNNs do well at somewhat larger sizes: timm evaluates at up to 1.4 times the size of training
    level = logging.WARNING if given is None and ratio > 1.5 else logging.INFO
    _logger.log(
        level,
        f'The teacher was trained at {trained[0]}x{trained[1]} pixels and sees {seen[0]}x{seen[1]}, where its answers'
        f' may be worse.{remedy}')


def log_changed_stages(args, stage1_epochs: int, resumed: Position, first_epoch: int) -> None:
    """Warn if a resumed run goes back from stage II to stage I, and log any other change of the stages.

    Args:
        args: The options.
        stage1_epochs: Epochs of stage I.
        resumed: Position of the checkpoint.
        first_epoch: First epoch that is trained now, counted from 0.
    """
    before = resumed.options or {}
    if not before.get('kd_model_name') or 'dearkd_stage1_epochs' not in before:
        return
    old_epochs = TwoStageSchedule(before['epochs'], before['dearkd_stage1_epochs']).stage1_epochs
    if old_epochs == stage1_epochs:
        return
    flag = 'epochs' if args.dearkd_stage1_epochs is None else 'dearkd-stage1-epochs'
    change = f'With --{flag} {getattr(args, flag.replace("-", "_"))}, stage I lasts {stage1_epochs} epochs'
    keep = f' To keep the stages, set --dearkd-stage1-epochs {old_epochs}.' if old_epochs <= args.epochs else ''
    last_epoch = resumed.epoch if resumed.update else resumed.epoch - 1
    if old_epochs <= last_epoch and first_epoch < stage1_epochs:
        _logger.warning(
            f'The run was in stage II at epoch {last_epoch}. {change} (was {old_epochs}), so epochs {first_epoch} to'
            f' {stage1_epochs - 1} are in stage I again.{keep}')
    else:
        _logger.info(f'{change} (was {old_epochs}).{keep}')


def uses_ema(args, task: TrainingTask) -> bool:
    """Return whether the average of weights is evaluated and exported; on the CPU, it is only kept."""
    return task.has_ema() and not args.model_ema_force_cpu


def count_outputs(task: Any) -> int:
    """Return the number of classes of the model that a task trains."""
    return unwrap_model(task.get_eval_model()).num_classes  # timm's tasks may wrap it for DDP


def choose_distill_type(args, student: nn.Module) -> str:
    """Return the kind of distillation: --kd-distill-type, or the one for this student.

    Raises:
        ValueError: See `check_distillation`.
    """
    kind = args.kd_distill_type or ('dearkd' if has_content_tokens(student) else 'logit')
    check_distillation(args, kind)
    return kind


def saved_names(model: Any) -> List[str]:
    """Return the class names of a model in the order of its classifier, see `normal_name`; [] if it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return [normal_name(str(name)) for name in names] if isinstance(names, (list, tuple)) else []
