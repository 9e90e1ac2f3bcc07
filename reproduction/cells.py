"""The cells of every table: which command each figure of the reproduction comes from."""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

__all__ = ['SCALES', 'TABLES', 'Cell', 'Entry', 'Scale', 'Table', 'teacher_cell']


@dataclass(frozen=True)
class Scale:
    """A size at which the experiments are run.

    Args:
        name: 'smoke', 'small' or 'imagenet'.
        data: Folder of the images below the driver's data folder, with `train` and `validation`.
        tuning_data: The same for choices: training images alone.
        recipe: YAML file of all students.
        student: Model of all students.
        teacher: Arguments of the run that trains the teacher; empty where timm has its weights.
        teacher_name: timm's name of it then.
        epochs: Of all students.
        fractions: Shares of the training images of table 2.
        ablation_fraction: The one of everything else.
        num_synthetic: Images of each data-free set; their student is trained for as many epochs.
        inversion: Arguments of data_free.
    """
    name: str
    data: str
    tuning_data: str
    recipe: str
    student: str
    teacher: Tuple[str, ...]
    epochs: int
    fractions: Tuple[float, ...]
    ablation_fraction: float
    num_synthetic: int
    inversion: Tuple[str, ...] = ()
    teacher_name: str = ''


SCALES = {scale.name: scale for scale in (
    Scale(
        'smoke', 'digits', 'digits', 'reproduction/small.yaml', 'dearkd_nano_patch4_32',
        ('--model', 'test_resnet', '--epochs', '2', '--warmup-epochs', '0'), 2, (0.05, 0.1), 0.05, 60,
        ('--resolutions', '32:4:0.3', '--classes-per-batch', '10', '--images-per-class', '3')),
    Scale(
        'small', 'fashion_mnist', 'fashion_mnist/tuning', 'reproduction/small.yaml', 'dearkd_nano_patch4_32',
        ('--model', 'resnet18', '--model-kwargs', 'channels=(32,64,128,256)', '--epochs', '15', '--batch-size', '64',
         '--warmup-epochs', '1', '--reprob', '0'),
        40, (0.01, 0.025, 0.05, 0.1), 0.025, 1500,
        # found by the CNN's own confidence: ep as large as leaves 95 % of the images with over half of it
        ('--resolutions', '32:200:0.2', '--classes-per-batch', '10', '--images-per-class', '6', '--jitter', '2',
         '--bn-norm', 'relative', '--bn-weight', '0.05', '--tv-weight', '0.003', '--ep-weight', '0.5',
         '--triplet-weight', '0.5')),
    Scale(
        'imagenet', 'imagenet', 'imagenet', 'recipes/dearkd_300e.yaml', 'dearkd_tiny_patch16_224', (), 300,
        (0.1, 0.25, 0.5, 1.0), 1.0, 600_000, teacher_name='regnety_160.deit_in1k'),
)}


@dataclass(frozen=True)
class Cell:
    """One command and its figures.

    Args:
        name: Of its output folder and of its result.
        data: Folder of the images below the driver's data folder; with a '/' in front, below that of the runs.
        argv: Arguments of the command, without those of the output. '{runs}' is the folder of the runs, '{teacher}'
            the teacher.
        images: Images trained on, all epochs together, for the estimate of the time.
        seed: Of the run.
        needs: Cells that come first.
        program: 'train' or 'data_free'.
    """
    name: str
    data: str
    argv: Tuple[str, ...]
    seed: int = 0
    images: float = 0.
    needs: Tuple[str, ...] = ()
    program: str = 'train'


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the mean over the seeds of its cells."""
    row: str
    column: str
    cells: Tuple[Cell, ...]
    paper: Optional[float] = None


@dataclass(frozen=True)
class Table:
    title: str
    entries: List[Entry] = field(default_factory=list)


TEACHER = 'teacher'
# What makes each method, beside the recipe that all share
PLAIN = ('--model-kwargs', 'num_mhca_blocks=0')
TAUGHT = ('--kd-model-name', '{teacher}')
NO_HIDDEN = ('--dearkd-beta', '0')


def one_stage(scale: Scale) -> Tuple[str, ...]:
    return ('--dearkd-stage1-epochs', str(scale.epochs))


def methods(scale: Scale) -> Dict[str, Tuple[str, ...]]:
    """Arguments of the rows of table 1; 'vit', 'hard' and 'dearkd' are the methods of table 2."""
    return {
        'vit': PLAIN,
        'mhca': (),
        'hard': PLAIN + TAUGHT + NO_HIDDEN + one_stage(scale),
        'hidden': PLAIN + TAUGHT + one_stage(scale),
        'mhca_hidden': TAUGHT + one_stage(scale),
        'dearkd': TAUGHT,
    }


def teacher_cell(scale: Scale) -> Optional[Cell]:
    """The CNN, trained once on all training images; None where it needs no training."""
    if not scale.teacher:
        return None
    argv = ('-c', scale.recipe, *scale.teacher, '--val-interval', '1000')
    return Cell(TEACHER, scale.data, argv, images=60000 * 5)  # about a third of a student's cost per image


def student_cell(
        scale: Scale,
        name: str,
        argv: Tuple[str, ...],
        fraction: float,
        seed: int,
        tuning: bool = False,
) -> Cell:
    """A student; on the tuning images only the last epoch is evaluated, as nothing else is looked at."""
    data = scale.tuning_data if tuning else scale.data
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs),
            '--train-fraction', str(fraction), '--fraction-seed', str(seed), *argv)
    if tuning:
        argv += ('--val-interval', str(scale.epochs))
    elif seed == 0 and fraction == scale.ablation_fraction:
        argv += ('--track-attention-distance',)  # for figure 4; changes nothing else
    needs = (TEACHER,) if scale.teacher and '{teacher}' in argv else ()
    prefix = 'tuning-' if tuning else ''
    return Cell(f'{prefix}{name}-{fraction:g}-seed{seed}', data, argv, seed, 60000 * fraction * scale.epochs, needs)


def students(scale, name, argv, fraction, seeds, tuning=False) -> Tuple[Cell, ...]:
    return tuple(student_cell(scale, name, argv, fraction, seed, tuning) for seed in seeds)


def table1(scale: Scale, seeds: Sequence[int]) -> Table:
    """The ablation."""
    labels = {
        'vit': 'ViT', 'mhca': '+ MHCA', 'hard': '+ hard labels, pooled tokens',
        'hidden': '+ hard labels + hidden loss', 'mhca_hidden': '+ hard labels + hidden loss + MHCA',
        'dearkd': 'all, in two stages (DearKD)'}
    paper = dict(zip(labels, (72.3, 72.5, 74.3, 74.1, 74.6, 74.8)))
    return Table('Ablation (table 1)', [
        Entry(labels[name], 'top-1', students(scale, name, argv, scale.ablation_fraction, seeds), paper[name])
        for name, argv in methods(scale).items()])


def table2(scale: Scale, seeds: Sequence[int]) -> Table:
    """Three methods at four sizes of the training set; the largest with two seeds at the most."""
    labels = {'vit': 'ViT', 'hard': 'ViT, hard-label distillation', 'dearkd': 'DearKD'}
    paper = {
        'vit': (40.5, 61.1, 68.3, 72.2), 'hard': (50.3, 64.3, 71.6, 74.5), 'dearkd': (54.3, 67.1, 72.3, 74.8)}
    return Table('Data efficiency (table 2)', [
        Entry(label, f'{100 * fraction:g} %', students(
            scale, name, methods(scale)[name], fraction, seeds[:2] if i == 3 else seeds), paper[name][i])
        for name, label in labels.items() for i, fraction in enumerate(scale.fractions)])


def table7(scale: Scale, seeds: Sequence[int]) -> Table:
    """The length of stage I, and both kinds of stage II."""
    paper = {2 / 3: 74.3, 5 / 6: 74.8, 1.: 74.6}
    entries = []
    for share in (0., 1 / 2, 2 / 3, 5 / 6, 1.):
        epochs = round(share * scale.epochs)
        for kind in ('anneal', 'ce'):
            name, argv = f'stage{epochs}_{kind}', TAUGHT + (
                '--dearkd-stage1-epochs', str(epochs), '--dearkd-stage2', kind)
            if share == 1.:
                name, argv = 'mhca_hidden', methods(scale)['mhca_hidden']  # there is no stage II
            elif share == 5 / 6 and kind == 'anneal':
                name, argv = 'dearkd', methods(scale)['dearkd']
            entries.append(Entry(
                f'{100 * share:.0f} %', kind, students(scale, name, argv, scale.ablation_fraction, seeds[:2]),
                paper.get(share) if kind == 'anneal' else None))
    return Table('Length of stage I (table 7)', entries)


# Recipes tried, one change each: learning rates and stronger augmentation for all methods, weaker for the ViT alone
ALL_METHODS, BASELINE = ('vit', 'hard', 'dearkd'), ('vit',)
RECIPES: Dict[str, Tuple[Tuple[str, ...], Tuple[str, ...]]] = {
    'as the file': ((), ALL_METHODS),
    'lr 1e-3': (('--lr', '1e-3'), ALL_METHODS),
    'lr 4e-3': (('--lr', '4e-3'), ALL_METHODS),
    'Mixup, CutMix': (('--mixup', '0.8', '--cutmix', '1.0', '--mixup-prob', '0.5'), ALL_METHODS),
    'RandAugment': (('--aa', 'rand-m9-mstd0.5-inc1'), ALL_METHODS),
    'crops from 0.35': (('--scale', '0.35', '1.0'), BASELINE),
    'no random erasing': (('--reprob', '0'), BASELINE),
}
DEFAULT = 'default'
# One change each from the default
CHOICES: Dict[str, Tuple[str, ...]] = {
    DEFAULT: (),
    'RPE dropout 0.1, of single scores': ('--dearkd-rpe-drop', '0.1'),
    'RPE dropout 0.3, of single scores': ('--dearkd-rpe-drop', '0.3'),
    'RPE dropout 0.1, by query': ('--dearkd-rpe-drop', '0.1', '--model-kwargs', 'rpe_drop_mode=query'),
    'RPE alpha from 0.1': ('--model-kwargs', 'rpe_alpha=0.1'),
    'RPE alpha from 0.3': ('--model-kwargs', 'rpe_alpha=0.3'),
    'RPE alpha from 3': ('--model-kwargs', 'rpe_alpha=3.'),
    'RPE delta from 0': ('--model-kwargs', 'rpe_delta=zero'),
    'RPE delta from N(0, 1)': ('--model-kwargs', 'rpe_delta=normal'),
    'hidden loss on block 2, CNN stage 1': ('--dearkd-hooks', '2:1'),
    'hidden loss on block 4, CNN stage 2': ('--dearkd-hooks', '4:2'),
    'hidden loss on block 6, CNN stage 2': ('--dearkd-hooks', '6:2'),
    'hidden loss on blocks 2 and 4, CNN stages 1 and 2': ('--dearkd-hooks', '2:1', '4:2'),
    'beta 0.1': ('--dearkd-beta', '0.1'),
    'beta 0.3': ('--dearkd-beta', '0.3'),
    'beta 3': ('--dearkd-beta', '3'),
    'beta 10': ('--dearkd-beta', '10'),
    'normalised features': ('--dearkd-normalize-features',),
    'alpha 0.25': ('--dearkd-alpha', '0.25'),
    'alpha 0.75': ('--dearkd-alpha', '0.75'),
}


def _slug(label: str) -> str:
    return ''.join(c if c.isalnum() or c == '.' else '_' for c in label).replace('__', '_').strip('_')


def recipes(scale: Scale, seeds: Sequence[int]) -> Table:
    """The recipe of all students, on training images set aside."""
    def cells(label: str, name: str) -> Tuple[Cell, ...]:
        argv, _ = RECIPES[label]
        is_default = name == 'dearkd' and not argv
        return students(
            scale, f'choice-{DEFAULT}' if is_default else f'recipe-{_slug(label)}-{name}',
            methods(scale)[name] + argv, scale.ablation_fraction, seeds[:1], tuning=True)

    return Table('Recipe, on training images set aside', [
        Entry(label, name, cells(label, name)) for label, (_, names) in RECIPES.items() for name in names])


def choices(scale: Scale, seeds: Sequence[int]) -> Table:
    """What the paper leaves open, on training images set aside."""
    return Table('Settled choices, on training images set aside', [
        Entry(label, 'top-1', students(
            scale, f'choice-{_slug(label)}', TAUGHT + argv, scale.ablation_fraction, seeds[:2], tuning=True))
        for label, argv in CHOICES.items()])


MODES: Dict[str, Tuple[str, Tuple[str, ...], Optional[float], Optional[float]]] = {
    # label, arguments, the paper's top-1 (table 5) and LPIPS (table 6)
    'none': ('DeepInversion', ('--diversity', 'none'), 62.7, 0.657),
    'adi': ('ADI', ('--diversity', 'adi', '--student', '{runs}/synthetic_student-none-seed{seed}'), 70.1, 0.683),
    'intra': ('DF-DearKD (intra-divergence)', ('--diversity', 'intra'), 71.2, 0.692),
}


def image_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """A set of images made out of the teacher, and how far apart those of a class are."""
    argv = tuple(arg.replace('{seed}', str(seed)) for arg in MODES[mode][1])
    needs = ((TEACHER,) if scale.teacher else ()) + ((f'synthetic_student-none-seed{seed}',) if mode == 'adi' else ())
    return Cell(
        f'images-{mode}-seed{seed}', scale.data, (
            '--model', '{teacher}', '--num-images', str(scale.num_synthetic), *scale.inversion, *argv),
        seed, scale.num_synthetic * 100., needs, 'data_free')


def synthetic_student_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """The DearKD student of table 2 on a set of images; it is evaluated on the real ones."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs), *TAUGHT)
    images = image_cell(scale, mode, seed)
    return Cell(
        f'synthetic_student-{mode}-seed{seed}', f'/{images.name}', argv, seed, scale.num_synthetic * scale.epochs,
        (images.name,))


def table5(scale: Scale, seeds: Sequence[int]) -> Table:
    """Students without real images, and one with as many real ones."""
    entries = [
        Entry(label, 'top-1', tuple(synthetic_student_cell(scale, mode, seed) for seed in seeds[:2]), paper)
        for mode, (label, _, paper, _) in MODES.items()]
    real = students(scale, 'dearkd', TAUGHT, scale.ablation_fraction, seeds[:2])
    return Table('Data-free (table 5)', [*entries, Entry('as many real images', 'top-1', real, 72.2)])


def figure4(scale: Scale, seeds: Sequence[int]) -> Table:
    """The runs of table 2 that record the attention distance."""
    return Table('Attention distance over the epochs (figure 4)', [
        Entry(name, 'top-1', students(scale, name, methods(scale)[name], scale.ablation_fraction, (0,)))
        for name in ('vit', 'hard', 'dearkd')])


def table6(scale: Scale, seeds: Sequence[int]) -> Table:
    """How far apart the synthetic images of a class are."""
    return Table('Diversity (table 6)', [
        Entry(label, 'distance', tuple(image_cell(scale, mode, seed) for seed in seeds[:2]), paper)
        for mode, (label, _, _, paper) in MODES.items()])


TABLES = {
    'recipes': recipes, 'choices': choices, 'table2': table2, 'table1': table1, 'table7': table7, 'table5': table5,
    'table6': table6, 'figure4': figure4}
