"""Define the cells of the reproduction: the command behind each figure, by scale and method."""
import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
# ImageNet weights of EfficientNet-Lite0, as in their package and under timm's names
LITE0, LITE0_TIMM = '{data}/efficientnet_lite0.pth', '{data}/efficientnet_lite0.safetensors'


@dataclass(frozen=True)
class Scale:
    """Size of the experiments.

    Args:
        name: 'smoke', 'small', 'cifar10' or 'imagenet'.
        data: Folder of the images below the driver's data folder, with `train` and `validation`.
        tuning_data: Folder for tuning, with training images only. If empty, nothing is tuned at this scale.
        num_train: Training images in `data`.
        num_eval: Validation images in `data`.
        recipe: YAML file of all students.
        student: Model of all students.
        cnn: Arguments for the architecture of the teacher; empty if timm has its weights.
        teacher: Further arguments of the run that trains the teacher.
        epochs: Epochs of all students.
        fractions: Shares of the training images in table 2.
        ablation_fraction: Share of the training images in the other tables.
        num_synthetic: Images of each data-free set.
        hooks: Student block and teacher stage of the hidden loss.
        diversity: Arguments of the measurement in table 6; LPIPS without `--model`.
        inversion: Arguments of data_free.
        adi: Further arguments of data_free for ADI.
        intra: Further arguments of data_free for intra-divergence.
        data_free: Further arguments of the students of table 5.
        synthetic: Arguments of the students of table 5 with the recipe `data_free`; empty if there are none.
        num_generated: Images of each set of a generator.
        teacher_name: timm's name of the teacher, if it is not trained.
        untaught: Arguments that turn the recipe's teacher off.
        tables: Names of its tables; empty if it has all that its other fields allow.
        photos: Name of the image folder of the table `photos`; empty if the scale has no such table.
    """
    name: str
    data: str
    tuning_data: str
    num_train: int
    num_eval: int
    recipe: str
    student: str
    cnn: Tuple[str, ...]
    teacher: Tuple[str, ...]
    epochs: int
    fractions: Tuple[float, ...]
    ablation_fraction: float
    num_synthetic: int
    hooks: Tuple[str, ...]
    diversity: Tuple[str, ...] = ()
    inversion: Tuple[str, ...] = ()
    adi: Tuple[str, ...] = ()
    intra: Tuple[str, ...] = ()
    data_free: Tuple[str, ...] = ()
    synthetic: Tuple[str, ...] = ()
    num_generated: int = 0
    teacher_name: str = ''
    untaught: Tuple[str, ...] = ()
    tables: Tuple[str, ...] = ()
    photos: str = ''


# Shared by all inversions. Defaults are written out, as in `hidden_loss` below.
DEEP_INVERSION = ('--l2-weight', '1e-5', '--first-bn-weight', '1', '--betas', '0.5', '0.9')


def adi_weights(weight: str) -> Tuple[str, ...]:
    """Return the arguments for the competition with the student."""
    return '--adi-weight', weight, '--adi-temperature', '3'


def intra_weights(ep: str) -> Tuple[str, ...]:
    """Return the arguments for the intra-divergence loss, with the paper's ratio of the two weights."""
    return '--ep-weight', ep, '--triplet-weight', f'{float(ep) / 100:g}', '--margin', '1'


SCALES = {scale.name: scale for scale in (
    Scale(
        'smoke', 'digits', '', 1257, 540, 'reproduction/small.yaml', 'dearkd_nano_patch4_32',
        ('--model', 'test_resnet'), ('--epochs', '2', '--warmup-epochs', '0'), 6, (0.05, 0.1), 0.05, 60,
        ('4:2',), ('--model', '{teacher}'),
        ('--resolutions', '32:4:0.3', '--classes-per-batch', '10', '--images-per-class', '3', '--jitter', '4',
         '--bn-norm', 'absolute', '--bn-weight', '0.05', '--tv-weight', '1e-4', *DEEP_INVERSION),
        adi_weights('10'), intra_weights('50'),
        synthetic=('--in-chans', '1', '--epochs', '2', '--train-batches-per-epoch', '4', '--workers', '0'),
        num_generated=60),
    Scale(
        'small', 'fashion_mnist', 'fashion_mnist/tuning', 60000, 10000, 'reproduction/small.yaml',
        'dearkd_nano_patch4_32',
        ('--model', 'resnet18', '--model-kwargs', 'channels=(32,64,128,256)'),
        ('--epochs', '15', '--batch-size', '64', '--warmup-epochs', '1', '--reprob', '0'),
        40, (0.01, 0.025, 0.05, 0.1), 0.025, 1500, ('4:2',),
        # an ImageNet CNN from a package, which differs from the CNN that the images are synthesised from
        ('--model', 'efficientnet_lite0', '--checkpoint', LITE0),
        ('--resolutions', '32:200:0.2', '--classes-per-batch', '10', '--images-per-class', '6', '--jitter', '2',
         '--bn-norm', 'relative', '--bn-weight', '0.05', '--tv-weight', '0.003', *DEEP_INVERSION),
        adi_weights('30'), intra_weights('0.1'),  # see `inversion` in data_free.py
        synthetic=('--in-chans', '1', '--model-kwargs', 'patch_size=8', '--epochs', '80', '--train-batches-per-epoch',
                   '32', '--workers', '0'),
        num_generated=8640, photos='stamps'),
    Scale(
        'imagenet', 'imagenet', '', 1281167, 50000, 'recipes/dearkd_300e.yaml', 'dearkd_tiny_patch16_224', (), (), 300,
        (0.1, 0.25, 0.5, 1.0), 1.0, 600_000, ('4:2',),
        diversity=('--pairs-per-class', '4'),
        inversion=(
            '--resolutions', '112:2000:0.5', '224:2000:0.01', '--classes-per-batch', '6', '--images-per-class', '7',
            '--jitter', '28', '--bn-norm', 'absolute', '--bn-weight', '0.05', '--tv-weight', '1e-4', *DEEP_INVERSION,
            '--verifier', 'resnet101.tv_in1k', '--min-prob', '0.1'),
        adi=adi_weights('0.2'), intra=intra_weights('50'),
        data_free=('--kd-model-name', 'resnet101.tv_in1k', '--epochs', '1000', '--dearkd-stage1-epochs', '800',
                   '--dearkd-stage2', 'ce', '--batch-size', '128', '--val-interval', '1000'),
        teacher_name='regnety_160.deit_in1k', untaught=('--kd-model-name', '')),
)}
# Colour images, for which nothing was tuned
SCALES['cifar10'] = replace(
    SCALES['small'], name='cifar10', data='cifar10', tuning_data='', num_train=50000,
    recipe='reproduction/cifar10.yaml', tables=('table1', 'table2'), photos='')


@dataclass(frozen=True)
class Cell:
    """One command.

    Args:
        name: Name of its output folder and of its result.
        data: Folder of the images below the driver's data folder; with a '/' in front, below that of the runs.
        argv: Arguments of the command without those of the output. '{runs}' and '{data}' are the folders of the
            driver, '{teacher}' is the teacher.
        cost: Estimate of the time, in training images of a plain ViT over all epochs.
        seed: Seed of the run.
        needs: Cells to run first.
        program: 'train', 'distill', 'data_free', 'merge' or 'diversity'.
    """
    name: str
    data: str
    argv: Tuple[str, ...]
    cost: float
    seed: int = 0
    needs: Tuple['Cell', ...] = ()
    program: str = 'train'


class CellError(Exception):
    """Reason why a cell has no result."""


# Arguments of train.py that change neither the images nor the teacher's labels, besides those of DearKD
STUDENT_FLAGS = {'--model', '--model-kwargs', '--epochs', '--lr', '--val-interval', '--track-attention-distance'}


def image_arguments(argv: Sequence[str]) -> List[str]:
    """Return the arguments of a run that may change its images or its teacher."""
    kept: List[str] = []
    is_kept = True
    for arg in argv:
        if arg.startswith('-'):
            is_kept = arg not in STUDENT_FLAGS and 'dearkd-' not in arg
        kept += [arg] if is_kept else []
    return kept


@functools.lru_cache(maxsize=None)
def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file."""
    return yaml.safe_load(path.read_text())


def read_recipe(cell: Cell) -> Optional[Dict[str, Any]]:
    """Return the options in the recipe of a cell; None if it has no recipe."""
    if '-c' in cell.argv:
        name = cell.argv[cell.argv.index('-c') + 1]
    elif cell.program == 'distill':
        name = 'recipes/small_folder.yaml'
    else:
        return None
    return read_yaml(ROOT / name if (ROOT / name).exists() else ROOT / 'timm_dearkd' / name)  # as train.py finds it


def definition(cell: Cell) -> str:
    """Return a hash of a cell's inputs: arguments, options that they leave to the recipe, and dependencies."""
    recipe = {key: value for key, value in (read_recipe(cell) or {}).items()
              if f'--{key.replace("_", "-")}' not in cell.argv}
    parts = [cell.program, cell.data, cell.argv, cell.seed, recipe, [definition(need) for need in cell.needs]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# Arguments of each method, besides the shared recipe. Defaults are written out, so that a result keeps its meaning
# when a default of train.py changes.
PLAIN = ('--model-kwargs', 'num_mhca_blocks=0')
TEACHER = '{teacher}'  # its path, which the driver fills in
WITH_TEACHER = ('--kd-model-name', TEACHER)
TAUGHT = (*WITH_TEACHER, '--dearkd-alpha', '0.5')
NO_HIDDEN = ('--dearkd-beta', '0')
RPE_DROP = ('--dearkd-rpe-drop', '0.1', '--dearkd-rpe-drop-mode', 'element')  # the paper's dropout, at our rate
STAGE1 = 5 / 6  # share of the epochs in the paper's recipe of 300
SOFT = ('--kd-temperature', '4')
TIMM_WEIGHTS = ('--distill-loss-weight', '1', '--task-loss-weight', '1')
SOFT_LABELS = (*WITH_TEACHER, '--kd-distill-type', 'logit', *SOFT, *TIMM_WEIGHTS)
METHODS = {'vit': 'ViT', 'hard': 'ViT, hard-label distillation', 'dearkd': 'DearKD'}
TABLE2 = {
    'vit': METHODS['vit'], 'hard': METHODS['hard'], 'soft': 'ViT, soft-label distillation',
    'feature': 'ViT, feature distillation', 'dearkd': METHODS['dearkd'], 'dearkd_soft': 'DearKD with soft labels'}
# Two end stage I at half of the epochs, because the learning rate is small in the last sixth
FIGURE4 = {
    **METHODS, 'mhca': 'MHCA without a teacher', 'mhca_hidden': 'DearKD in one stage',
    'stage50_ce': 'DearKD, stage I of 50 %, then `ce`',
    'stage50_ce_rpe_drop': 'DearKD, stage I of 50 %, then `ce`, RPE dropout 0.1',
    'longer_pupil_mhca_hidden': 'DearKD in one stage, longer', 'longer_pupil_dearkd': 'DearKD, longer',
    'longer_pupil_stage50_anneal': 'DearKD, stage I of 50 %, longer'}


def hidden_loss(hooks: Sequence[str], beta: str = '10', normalize: bool = True) -> Tuple[str, ...]:
    """Return the arguments for the loss on the CNN's features."""
    return ('--dearkd-hooks', *hooks, '--dearkd-beta', beta,
            '--dearkd-normalize-features' if normalize else '--no-dearkd-normalize-features')


def stages(scale: Scale, share: float, kind: str = 'anneal') -> Tuple[str, ...]:
    """Return the arguments for a stage I of this share of the epochs."""
    return ('--dearkd-stage1-epochs', str(round(share * scale.epochs)), '--dearkd-stage2', kind)


def two_stages(scale: Scale, share: float, kind: str) -> Tuple[str, ...]:
    """Return the arguments for DearKD with another length or kind of the stages."""
    return TAUGHT + hidden_loss(scale.hooks) + stages(scale, share, kind)


def methods(scale: Scale) -> Dict[str, Tuple[str, ...]]:
    """Return the arguments of the rows of tables 1 and 2."""
    one_stage, hidden = stages(scale, 1.), hidden_loss(scale.hooks)
    dearkd = TAUGHT + hidden + stages(scale, STAGE1)
    return {
        'vit': PLAIN + scale.untaught,
        'mhca': scale.untaught,
        'hard': PLAIN + TAUGHT + NO_HIDDEN + one_stage,
        'mhca_hard': TAUGHT + NO_HIDDEN + one_stage,
        'hidden': PLAIN + TAUGHT + hidden + one_stage,
        'mhca_hidden': TAUGHT + hidden + one_stage,
        'dearkd': dearkd,
        'dearkd_soft': (*dearkd, '--dearkd-soft-labels', *SOFT),
        # timm's own tasks
        'soft': PLAIN + SOFT_LABELS,
        'feature': (*PLAIN, *WITH_TEACHER, '--kd-distill-type', 'feature', *TIMM_WEIGHTS),
    }


def teacher_cell(scale: Scale) -> Optional[Cell]:
    """Return the CNN, trained once on all training images; None if it needs no training."""
    if not scale.cnn:
        return None
    argv = ('-c', scale.recipe, *scale.cnn, *scale.teacher, '--val-interval', '1000')
    epochs = int(scale.teacher[scale.teacher.index('--epochs') + 1])
    return Cell('teacher', scale.data, argv, cost=scale.num_train * epochs / 3)


def cnn_cell(scale: Scale, seed: int, name: str = 'cnn', *more: str) -> Cell:
    """Return the teacher's architecture, trained on a student's images with the student's recipe and more options."""
    argv = ('-c', scale.recipe, *scale.cnn, '--epochs', str(scale.epochs), '--val-interval', str(scale.epochs),
            '--train-fraction', str(scale.ablation_fraction), '--fraction-seed', str(seed), *more)
    cost = scale.num_train * scale.ablation_fraction * scale.epochs / 3
    return Cell(f'{name}-{scale.ablation_fraction:g}-seed{seed}', scale.data, argv, cost, seed)


def training_cost(scale: Scale, num_images: float, argv: Sequence[str], num_evaluations: int) -> float:
    """Return the rough cost of a training run, see `Cell`."""
    return num_images * scale.epochs * (1.3 if TEACHER in argv else 1.) + num_evaluations * scale.num_eval / 3


def student_cell(
        scale: Scale,
        name: str,
        argv: Tuple[str, ...],
        fraction: float,
        seed: int,
        tuning: bool = False,
) -> Cell:
    """Return a student. On the tuning images, only the last epoch is evaluated."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs),
            '--train-fraction', str(fraction), '--fraction-seed', str(seed), *argv)
    if tuning:
        argv += ('--val-interval', str(scale.epochs))
    elif fraction == scale.ablation_fraction and name in FIGURE4:
        argv += ('--track-attention-distance',)  # does not change the training
    teacher = teacher_cell(scale)
    return Cell(
        f'{"tuning-" if tuning else ""}{name}-{fraction:g}-seed{seed}',
        scale.tuning_data if tuning else scale.data,
        argv,
        training_cost(scale, scale.num_train * fraction, argv, 1 if tuning else scale.epochs // 5),
        seed,
        (teacher,) if teacher is not None and TEACHER in argv else (),
    )


def students(
        scale: Scale,
        name: str,
        argv: Tuple[str, ...],
        fraction: float,
        seeds: Sequence[int],
        tuning: bool = False,
) -> Tuple[Cell, ...]:
    """Return the same student for several seeds."""
    return tuple(student_cell(scale, name, argv, fraction, seed, tuning) for seed in seeds)
