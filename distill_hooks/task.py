"""DearKD as a timm training task."""
import logging
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Set, Tuple, Union, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import VisionTransformer, group_parameters
from timm.task import TrainingTask
from timm.task.classification import resolve_classification_loss
from timm.utils import unwrap_model

from .aligner import Aligner
from .answers import agreement
from .losses import dearkd_loss, hard_label_loss, hard_labels, hidden_loss, soft_label_loss
from .schedule import TwoStageSchedule
from .teacher import FeatureSpec, Teacher, require_same_teacher, resolve_layer

_logger = logging.getLogger(__name__)

DEFAULT_HOOKS = ('4',)
LABELS = ('dataset', 'teacher')
# A standard deviation from fewer images is a poor estimate; our choice
MIN_IMAGES_FOR_STD = 16


class Hook(NamedTuple):
    """A student block and the teacher layer that it learns from."""
    block: int  # from 1
    layer: Optional[str]  # None: the default stage


def parse_hook(spec: str) -> Hook:
    """Parse 'BLOCK', 'BLOCK:STAGE' or 'BLOCK:MODULE'.

    Raises:
        ValueError: If `spec` has another form.
    """
    block, _, layer = spec.partition(':')
    if not block.isdigit() or int(block) < 1 or spec.endswith(':'):
        raise ValueError(
            f'Hook {spec!r} is not BLOCK, BLOCK:STAGE or BLOCK:MODULE, such as 4, 4:2 or 4:s2.b4'
            ' (student blocks and teacher stages are counted from 1).')
    return Hook(int(block), layer or None)


def has_content_tokens(model: nn.Module) -> bool:
    """Return whether a model is a timm transformer with (B, T, D) tokens."""
    return (
        hasattr(model, 'forward_intermediates') and hasattr(model, 'num_prefix_tokens')
        and isinstance(getattr(model, 'blocks', None), (nn.Sequential, nn.ModuleList)) and hasattr(model, 'patch_embed')
    )


def _check_student(student: nn.Module, hooks: Sequence[Hook]) -> None:
    name = type(student).__name__
    if not has_content_tokens(student):
        raise ValueError(
            f'Student {name} has no content tokens (B, T, D) to distill into.'
            ' Choose a ViT (dearkd_*, vit_*, deit*), or distill its logits with --kd-distill-type logit.')
    depth = len(cast(VisionTransformer, student).blocks)
    for hook in hooks:
        if hook.block > depth:
            raise ValueError(
                f'Hook {hook.block} is not a block of {name}. Choose a block from 1 to {depth}.')
    if hooks and not isinstance(getattr(student, 'patch_drop', None) or nn.Identity(), nn.Identity):
        raise ValueError(
            f'Student {name} drops patches, so its tokens do not form a map to align. Set patch_drop_rate to 0.')
    if hooks and not hasattr(student.patch_embed, 'dynamic_feat_size'):
        raise ValueError(
            f'Student {name} does not report the grid of its tokens, which the hidden loss needs. Choose another ViT'
            ' (dearkd_*, vit_*, deit*), or train without the hidden loss (--dearkd-beta 0).')


def keep_constants_local(module: nn.Module) -> None:
    """Exclude non-persistent buffers of a module from DDP's broadcasts.

    The constants of the token grid differ in size between processes if the images do.
    """
    state = module.state_dict()
    constants = [name for name, _ in module.named_buffers() if name not in state]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constants)


def _set_teacher_layers(teacher: Teacher, student: VisionTransformer, hooks: Sequence[Hook]) -> None:
    """Set the layers of the hooks, unless the teacher has layers of its own."""
    if not teacher.has_own_layers:
        max_stride = max(8, min(to_2tuple(student.patch_embed.patch_size)) / 2)
        teacher.set_layers([resolve_layer(teacher.model, hook.layer, max_stride=max_stride) for hook in hooks])
    elif hooks and len(teacher.layers) != len(hooks):
        raise ValueError(
            f'The Teacher has {len(teacher.layers)} layer(s) for {len(hooks)} hook(s).'
            ' Create it without layers, or with one per hook.')


class DearKDTrainable(nn.Module):
    """The modules that stage I trains: student, `head_dist` and aligners.

    They are one module, because DDP wraps only one. `head_dist` computes logits from the mean of the content tokens
    after the final norm. It belongs to the task, not to the model, so that the exported model is a plain ViT (our
    choice).

    Args:
        student: A timm ViT.
        blocks: Student blocks counted from 1, one per feature map.
        specs: The teacher's feature maps.
    """

    def __init__(
            self,
            student: VisionTransformer,
            blocks: Sequence[int] = (),
            specs: Sequence[FeatureSpec] = (),
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        self.student = student
        self.indices = sorted({block - 1 for block in blocks})
        self.sources = [self.indices.index(block - 1) for block in blocks]  # per aligner
        grid = getattr(student.patch_embed, 'grid_size', None)
        self.aligners = nn.ModuleList(
            Aligner(student.embed_dim, spec.num_chs, spec.non_negative, grid, spec.size, **dd) for spec in specs)
        self.head_dist = nn.Linear(student.embed_dim, student.num_classes, **dd)
        self.uses_head_dist = True
        self.uses_aligners = bool(specs)

    def set_branches(self, head_dist: bool, aligners: bool) -> bool:
        """Switch branches on or off (frozen). Return whether a switch changed."""
        aligners = aligners and len(self.aligners) > 0
        changed = (head_dist, aligners) != (self.uses_head_dist, self.uses_aligners)
        self.uses_head_dist, self.uses_aligners = head_dist, aligners
        self.head_dist.requires_grad_(head_dist)
        self.aligners.requires_grad_(aligners)
        return changed

    def no_weight_decay(self) -> Set[str]:
        """Return the names of the student's parameters without weight decay."""
        names = self.student.no_weight_decay() if hasattr(self.student, 'no_weight_decay') else ()
        return {f'student.{name}' for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the groups for layer decay, with the branches in the last one."""
        groups = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)
        last = max(groups.values(), default=0)
        return lambda name: groups.get(name[len('student.'):], last) if name.startswith('student.') else last

    def forward(
            self,
            x: torch.Tensor,
            sizes: Sequence[Tuple[int, int]] = (),
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], List[torch.Tensor]]:
        """Compute the outputs of the student and of the branches that are on.

        Args:
            x: Images (B, C, H, W).
            sizes: Height and width of the teacher's feature maps.

        Returns:
            Logits (B, classes), logits of `head_dist` or None, and aligned feature maps (B, C, h, w).
        """
        if not self.uses_head_dist and not self.uses_aligners:
            return self.student(x), None, []
        maps: List[torch.Tensor] = []
        tokens: Any
        if self.uses_aligners:
            intermediates: Any = self.student.forward_intermediates(x, indices=self.indices, output_fmt='NLC')
            tokens, maps = intermediates
            grid = self.student.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            maps = [content.unflatten(1, grid).permute(0, 3, 1, 2) for content in maps]  # timm's NCHW is a copy
        else:
            tokens = self.student.forward_features(x)
        logits = self.student.forward_head(tokens)
        dist_logits = None
        if self.uses_head_dist:
            content = tokens[:, self.student.num_prefix_tokens:].mean(dim=1)
            if hasattr(self.student, 'fc_norm'):
                content = self.student.fc_norm(content)
            dist_logits = self.head_dist(content)
        aligned = []
        if self.uses_aligners:
            aligned = [aligner(maps[i], size) for aligner, i, size in zip(self.aligners, self.sources, sizes)]
        return logits, dist_logits, aligned


class LabelStore(Protocol):
    """Known labels of the teacher, for the attribute `label_store` of a `DearKDTask`.

    The task calls `take` for every batch whose labels it needs, in the order of the batches. Where the labels are
    known, the teacher computes its feature maps alone, or does not run at all. Soft labels are not stored.
    """

    def take(self, batch_size: int) -> Optional[torch.Tensor]:
        """Return the labels (B,) of the next batch on the device, or None to run the teacher."""

    def put(self, logits: torch.Tensor) -> None:
        """Take the teacher's logits (B, classes) of the batch for which `take` returned None."""


class DearKDTask(TrainingTask):
    """Early knowledge distillation of a CNN into any timm ViT (Eq. 4 to 7).

    Call `set_epoch` at the start of every epoch. The training loop needs no other change. Create the optimizer before
    `compile`, which renames the parameters that timm excludes from weight decay. Save and load the task with timm's
    `get_checkpoint_state` and `load_checkpoint_state`: `state_dict` lacks the deviations of `normalize_features`.

    Our choices, where the paper is silent: block 4 of the student learns from the teacher stage with the largest stride
    up to half the patch size, or up to 8 for patches below 16. In RESULTS.md, this stage is better than the next one,
    and inconclusive against the previous one. `TwoStageSchedule` has the choices of alpha, beta and the stage lengths.

    Args:
        student_model: The timm ViT to train.
        teacher_model: A `Teacher` (see `Teacher.for_student` for its weights, image size, classes and normalisation),
            or a name or module to create one from. The module is frozen, moved to `device` and converted to `dtype` in
            place.
        schedule: The two stages.
        criterion: Loss on the student's logits; None creates it from `criterion_kwargs`.
        criterion_kwargs: Arguments of timm's `create_classification_loss`.
        hooks: 'BLOCK', 'BLOCK:STAGE' or 'BLOCK:MODULE', one or several; see `parse_hook`. A `Teacher` with layers of
            its own keeps these, in the order of the hooks.
        normalize_features: Divide the teacher's maps by their standard deviation per channel. The first batch sets it,
            with a tenth of the mean deviation as the minimum. Our choice: beta then means the same for all teachers.
        labels: Labels of `head`: 'dataset', or 'teacher' for the teacher's answers in both stages (our option). With
            'teacher', both heads have one loss, and `criterion` and the labels of the data set have no effect.
        soft_temperature: Learn soft labels of this temperature from the teacher, see `soft_label_loss`. None learns its
            hard labels, as in the paper.
        device: Device of the task.
        dtype: Dtype of the teacher and of the task's own layers.
        verbose: Log the hooks and the schedule.

    Raises:
        ValueError: If the student has no content tokens, class counts differ, a hook does not exist, a teacher layer is
            not a 4-D map, or the teacher does not take the image size. The message names the remedy.

    Examples:

        ```python
        task = DearKDTask(student, 'regnety_160.deit_in1k', TwoStageSchedule(epochs=300), device=device)
        optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=5e-4, weight_decay=0.05)
        for epoch in range(300):
            task.set_epoch(epoch)
            for images, labels in loader:
                task(images, labels)['loss'].backward()
                ...
        ```
    """

    def __init__(
            self,
            student_model: nn.Module,
            teacher_model: Union[str, nn.Module],
            schedule: TwoStageSchedule,
            criterion: Optional[nn.Module] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            hooks: Sequence[str] = DEFAULT_HOOKS,
            normalize_features: bool = True,
            labels: str = 'dataset',
            soft_temperature: Optional[float] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if labels not in LABELS:
            raise ValueError(f'Unknown labels {labels!r}, expected one of {", ".join(LABELS)}.')
        self.labels, self.soft_temperature = labels, soft_temperature
        student = cast(VisionTransformer, unwrap_model(student_model))
        self.schedule = schedule
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        parsed = [parse_hook(spec) for spec in ([hooks] if isinstance(hooks, str) else hooks)]
        if not schedule.uses_features:
            parsed = []
        _check_student(student, parsed)
        if not isinstance(teacher_model, Teacher):
            teacher_model = Teacher.for_student(student, teacher_model)
        self.teacher = teacher_model
        _set_teacher_layers(self.teacher, student, parsed)
        self._fingerprint, specs = self.teacher.prepare(
            student, with_features=bool(parsed), device=self.device, dtype=self.dtype)
        self._blocks = [hook.block for hook in parsed]
        self.trainable_module: nn.Module = DearKDTrainable(
            cast(VisionTransformer, student_model),
            self._blocks,
            specs,
            device=self.device,
            dtype=self.dtype,
        )
        self.label_store: Optional[LabelStore] = None
        self.feature_std: Optional[List[torch.Tensor]] = None
        self.normalize_features = normalize_features
        self._ddp_kwargs: Optional[Dict[str, Any]] = None
        self._hidden_loss = hidden_loss
        self.set_epoch(0)
        if verbose:
            for hook, spec in zip(parsed, specs):
                height, width = spec.size
                _logger.info(
                    f'DearKD: block {hook.block} of {type(student).__name__} learns from teacher layer {spec.layer}'
                    f' ({spec.num_chs} x {height} x {width})')
            _logger.info(f'DearKD: {schedule}')

    @property
    def log_names(self) -> List[str]:
        """Names of the losses and shares that at least one stage computes."""
        stage1 = self.schedule.stage1_epochs > 0
        names = ['loss', 'ce_loss']
        if self.schedule.alpha < 1. and (stage1 or self.schedule.stage2 == 'anneal'):
            names.append('logit_loss')
        if self.schedule.uses_features:
            names.append('hidden_loss')
        has_labels = 'logit_loss' in names or self.labels == 'teacher'
        return names + (['teacher_agreement'] if has_labels else [])

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> 'DearKDTask':
        result = super()._apply(fn, *args, **kwargs)
        if self.feature_std is not None:  # float32 for every dtype of the task
            self.feature_std = [std.to(self.device) for std in self.feature_std]
        return result

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, counted from 0: select the losses and branches of its stage.

        A stage freezes the branches that it does not train. Create the optimizer before the first call, so that its
        groups hold all parameters.
        """
        self.weights = self.schedule(epoch)
        trainable = unwrap_model(self.trainable_module)
        changed = trainable.set_branches(head_dist=self.weights.uses_labels, aligners=self.weights.uses_features)
        if changed and self._ddp_kwargs is not None:
            # DDP waits for the gradient of every parameter that it was created with
            self.trainable_module = self._wrap_distributed(cast(nn.Module, self.trainable_module.module))

    def _wrap_distributed(self, module: nn.Module) -> nn.Module:
        keep_constants_local(module)
        return nn.parallel.DistributedDataParallel(module, **(self._ddp_kwargs or {}))

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'DearKDTask':
        """Wrap the trainable module in DDP, without the teacher. Takes DDP's arguments."""
        self._ddp_kwargs = dict(device_ids=device_ids, **ddp_kwargs)
        self.trainable_module = self._wrap_distributed(self.trainable_module)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the student, its branches, the hidden loss and the teacher, after the optimizer was created."""
        kwargs = dict(backend=backend, mode=mode, **compile_kwargs)
        self.eval_model = cast(nn.Module, torch.compile(unwrap_model(self.trainable_module).student, **kwargs))
        self.trainable_module = cast(nn.Module, torch.compile(self.trainable_module, **kwargs))
        self._hidden_loss = cast(Any, torch.compile(hidden_loss, **kwargs))
        self.teacher.compile(**kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the student without the branches."""
        resolved = super().get_eval_model(module=module, ema=ema)
        unwrapped = unwrap_model(resolved) if resolved is not None else None
        return unwrapped.student if isinstance(unwrapped, DearKDTrainable) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        """Return the parameters to clip, without classifiers if `exclude_head`."""
        trainable = unwrap_model(self.trainable_module)
        classifier = trainable.student.get_classifier()
        heads = [*(classifier if isinstance(classifier, tuple) else (classifier,)), trainable.head_dist]
        excluded = {id(p) for head in heads for p in head.parameters()} if exclude_head else set()
        return [p for p in trainable.parameters() if id(p) not in excluded]

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """Return the branches, feature deviations, teacher fingerprint and blocks."""
        trainable = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))
        state: Dict[str, Any] = {
            'aligners': trainable.aligners.state_dict(),
            'head_dist': trainable.head_dist.state_dict(),
            'teacher': self._fingerprint,
            'blocks': self._blocks,
        }
        if self.feature_std is not None:
            state['feature_std'] = list(self.feature_std)
        return state

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Load the state from `get_task_state`.

        Raises:
            ValueError: If the state is of another teacher, class map or hooks, or if it is empty, `strict` is set and
                the schedule needs a teacher.
        """
        if not state:
            if strict and self.log_names != ['loss', 'ce_loss']:
                raise ValueError(
                    'The checkpoint has no aligner and no head_dist, because it was trained without DearKD.'
                    ' To start from its weights, use --initial-checkpoint instead of --resume.')
            return
        saved = (state.get('teacher', self._fingerprint), state.get('blocks', self._blocks))
        require_same_teacher(saved, (self._fingerprint, self._blocks), 'other hooks', '--dearkd-hooks')
        trainable = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema))
        try:
            trainable.aligners.load_state_dict(state['aligners'], strict=strict)
            trainable.head_dist.load_state_dict(state['head_dist'], strict=strict)
        except (KeyError, RuntimeError) as e:
            raise ValueError(
                'The aligner of the checkpoint does not fit, because it was trained with other hooks.'
                ' Resume with the same --dearkd-hooks.') from e
        if self.normalize_features and 'feature_std' in state:
            self.feature_std = [std.to(self.device) for std in state['feature_std']]

    def _label_loss(self, logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits with the teacher's hard or soft labels."""
        if self.soft_temperature is None:
            return hard_label_loss(logits, teacher_logits)
        return soft_label_loss(logits, teacher_logits, self.soft_temperature)

    def _fix_feature_std(self, features: List[torch.Tensor]) -> None:
        """Set the standard deviation per channel (C,) from the first batch, unless it is not finite.

        After `prepare_distributed`, it is that of all processes.
        """
        stds = []
        is_distributed = self._ddp_kwargs is not None
        group = (self._ddp_kwargs or {}).get('process_group')
        num_images = len(features[0]) * (dist.get_world_size(group) if is_distributed else 1)
        if not is_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _logger.warning(
                'The deviation of the feature maps is that of this process alone. If all processes train this student,'
                ' call prepare_distributed() on the task.')
        if num_images < MIN_IMAGES_FOR_STD:
            _logger.warning(
                f'The first batch has {num_images} images, few for the standard deviation of the feature maps. If'
                ' hidden_loss is far from 1, use larger batches or --no-dearkd-normalize-features.')
        for feature in features:
            axes = (0, 2, 3)
            total = feature.sum(dim=axes, dtype=torch.float32)  # per channel, without a copy of the map
            squares = torch.linalg.vector_norm(feature, dim=axes, dtype=torch.float32).square()
            count = torch.full_like(total, feature.numel() / feature.shape[1])
            moments = torch.stack([count, total, squares])
            if is_distributed:
                dist.all_reduce(moments, group=group)
            count, total, squares = moments
            variance = (squares - total.square() / count) / (count - 1).clamp(min=1)
            std = variance.clamp(min=0).sqrt()
            # a channel may be constant in one batch, and one value per channel has no deviation
            std = torch.maximum(std, std.mean() / 10)
            stds.append(std)
        if torch.cat(stds).isfinite().all():  # else the loss is not finite, either, and the next batch sets them
            self.feature_std = [torch.where(std > 0, std, torch.ones_like(std)) for std in stds]

    def _ask_teacher(self, input: torch.Tensor) -> Tuple[Optional[torch.Tensor], List[torch.Tensor]]:
        """Return the teacher's answers and feature maps of a batch: None and [] where the stage needs none.

        The answers are labels (B,), see `hard_labels`, or logits (B, classes) for soft labels. The teacher runs only as
        far as necessary. See `LabelStore` for labels that are known.
        """
        uses_labels = self.weights.uses_labels or self.labels == 'teacher'
        store = self.label_store if uses_labels and self.soft_temperature is None else None
        answers = store.take(len(input)) if store is not None else None
        with_logits, with_features = uses_labels and answers is None, self.weights.uses_features
        if not with_logits and not with_features:
            return answers, []
        logits, features = self.teacher(input, with_features=with_features, with_logits=with_logits)
        if with_logits:
            answers = hard_labels(logits) if self.soft_temperature is None else logits
            if store is not None:
                store.put(logits)
        return answers, features

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            input: Images (B, C, H, W), normalised for the student.
            target: Target of the criterion: class indices (B,) or soft labels (B, classes).

        Returns:
            'loss' (Eq. 6 or 7), 'output' (the student's logits) and the losses of the stage: 'ce_loss', 'logit_loss',
            'hidden_loss'. With labels of the teacher, 'ce_loss' is the loss of `head` with them. While its labels are
            used, 'teacher_agreement' is the share of the images whose label (the larger one, after Mixup) is the
            teacher's answer.
        """
        alpha, beta = self.weights.alpha, self.weights.beta
        answers, features = self._ask_teacher(input)
        logits, dist_logits, aligned = self.trainable_module(input, [f.shape[-2:] for f in features])

        losses: Dict[str, Any] = {}
        if self.labels == 'teacher' and answers is not None:
            losses['ce_loss'] = self._label_loss(logits, answers)
        else:
            losses['ce_loss'] = self.criterion(logits, target)
        if dist_logits is not None and answers is not None:
            losses['logit_loss'] = self._label_loss(dist_logits, answers)
        if features:
            if self.normalize_features and self.feature_std is None:
                self._fix_feature_std(features)
            stds: Sequence[Optional[torch.Tensor]] = self.feature_std or [None] * len(features)
            losses['hidden_loss'] = sum(
                self._hidden_loss(a, f, std) for a, f, std in zip(aligned, features, stds)) / len(features)
        loss = dearkd_loss(
            losses['ce_loss'], losses.get('logit_loss', 0.), losses.get('hidden_loss', 0.), alpha, beta)
        if answers is not None:
            losses['teacher_agreement'] = agreement(answers, target)
        return {'loss': loss, 'output': logits, **losses}

