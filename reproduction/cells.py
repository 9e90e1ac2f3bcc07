"""The cells of every table: which command each figure of the reproduction comes from."""
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

__all__ = ['METHODS', 'SCALES', 'TABLES', 'Cell', 'Claim', 'Entry', 'Scale', 'Table', 'tables_of', 'teacher_cell']


@dataclass(frozen=True)
class Scale:
    """A size at which the experiments are run.

    Args:
        name: 'smoke', 'small' or 'imagenet'.
        data: Folder of the images below the driver's data folder, with `train` and `validation`.
        tuning_data: The same for choices: training images alone. Without it, nothing is chosen at this scale.
        num_train: Training images in `data`.
        num_eval: Validation images in `data`.
        recipe: YAML file of all students.
        student: Model of all students.
        teacher: Arguments of the run that trains the teacher; empty where timm has its weights.
        teacher_name: timm's name of it then.
        epochs: Of all students.
        fractions: Shares of the training images of table 2.
        ablation_fraction: The one of everything else.
        num_synthetic: Images of each data-free set; their student is trained for as many epochs.
        inversion: Arguments of data_free.
        untaught: Arguments that turn the recipe's teacher off.
    """
    name: str
    data: str
    tuning_data: str
    num_train: int
    num_eval: int
    recipe: str
    student: str
    teacher: Tuple[str, ...]
    epochs: int
    fractions: Tuple[float, ...]
    ablation_fraction: float
    num_synthetic: int
    inversion: Tuple[str, ...] = ()
    teacher_name: str = ''
    untaught: Tuple[str, ...] = ()


SCALES = {scale.name: scale for scale in (
    Scale(
        'smoke', 'digits', '', 1257, 540, 'reproduction/small.yaml', 'dearkd_nano_patch4_32',
        ('--model', 'test_resnet', '--epochs', '2', '--warmup-epochs', '0'), 2, (0.05, 0.1), 0.05, 60,
        ('--resolutions', '32:4:0.3', '--classes-per-batch', '10', '--images-per-class', '3')),
    Scale(
        'small', 'fashion_mnist', 'fashion_mnist/tuning', 60000, 10000, 'reproduction/small.yaml',
        'dearkd_nano_patch4_32',
        ('--model', 'resnet18', '--model-kwargs', 'channels=(32,64,128,256)', '--epochs', '15', '--batch-size', '64',
         '--warmup-epochs', '1', '--reprob', '0'),
        40, (0.01, 0.025, 0.05, 0.1), 0.025, 1500,
        # found by the CNN's own confidence: ep as large as leaves 95 % of the images with over half of it
        ('--resolutions', '32:200:0.2', '--classes-per-batch', '10', '--images-per-class', '6', '--jitter', '2',
         '--bn-norm', 'relative', '--bn-weight', '0.05', '--tv-weight', '0.003', '--ep-weight', '0.5',
         '--triplet-weight', '0.5', '--adi-weight', '1')),
    Scale(
        'imagenet', 'imagenet', '', 1281167, 50000, 'recipes/dearkd_300e.yaml', 'dearkd_tiny_patch16_224', (), 300,
        (0.1, 0.25, 0.5, 1.0), 1.0, 600_000, ('--verifier', 'resnet101', '--min-prob', '0.1'),
        teacher_name='regnety_160.deit_in1k', untaught=('--kd-model-name', '')),
)}


@dataclass(frozen=True)
class Cell:
    """One command and its figures.

    Args:
        name: Of its output folder and of its result.
        data: Folder of the images below the driver's data folder; with a '/' in front, below that of the runs.
        argv: Arguments of the command, without those of the output. '{runs}' is the folder of the runs, '{teacher}'
            the teacher.
        cost: For the estimate of the time: images trained on, in all epochs, of a ViT alone.
        seed: Of the run.
        needs: Cells that come first.
        program: 'train' or 'data_free'.
    """
    name: str
    data: str
    argv: Tuple[str, ...]
    cost: float
    seed: int = 0
    needs: Tuple['Cell', ...] = ()
    program: str = 'train'


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the mean over the seeds of its cells.

    Args:
        row: Label.
        column: Label; 'distance' is read from the sets of images, anything else is top-1.
        cells: One for each seed.
        paper: The paper's figure, on ImageNet.
    """
    row: str
    column: str
    cells: Tuple[Cell, ...]
    paper: Optional[float] = None


class Claim(NamedTuple):
    """That one figure is above another, each named by row and column."""
    text: str
    higher: Tuple[str, str]
    lower: Tuple[str, str]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: Heading.
        note: What a reader has to know of it.
        entries: Its figures.
        claims: What the paper says of them.
    """
    title: str
    note: str
    entries: List[Entry]
    claims: List[Claim] = field(default_factory=list)


# What makes each method, beside the recipe that all share
PLAIN = ('--model-kwargs', 'num_mhca_blocks=0')
TAUGHT = ('--kd-model-name', '{teacher}')
NO_HIDDEN = ('--dearkd-beta', '0')
METHODS = {'vit': 'ViT', 'hard': 'ViT, hard-label distillation', 'dearkd': 'DearKD'}


def one_stage(scale: Scale) -> Tuple[str, ...]:
    """The teacher teaches to the end."""
    return ('--dearkd-stage1-epochs', str(scale.epochs))


def methods(scale: Scale) -> Dict[str, Tuple[str, ...]]:
    """Arguments of the rows of table 1; 'vit', 'hard' and 'dearkd' are the methods of table 2."""
    return {
        'vit': PLAIN + scale.untaught,
        'mhca': scale.untaught,
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
    epochs = int(scale.teacher[scale.teacher.index('--epochs') + 1])
    return Cell('teacher', scale.data, argv, cost=scale.num_train * epochs / 3)


def training_cost(scale: Scale, num_images: float, argv: Sequence[str], num_evaluations: int) -> float:
    """See `Cell`; the factors are rough."""
    return num_images * scale.epochs * (1.3 if TAUGHT[1] in argv else 1.) + num_evaluations * scale.num_eval / 3


def student_cell(
        scale: Scale,
        name: str,
        argv: Tuple[str, ...],
        fraction: float,
        seed: int,
        tuning: bool = False,
) -> Cell:
    """A student; on the tuning images only the last epoch is evaluated, as nothing else is looked at."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs),
            '--train-fraction', str(fraction), '--fraction-seed', str(seed), *argv)
    if tuning:
        argv += ('--val-interval', str(scale.epochs))
    elif seed == 0 and fraction == scale.ablation_fraction:
        argv += ('--track-attention-distance',)  # for figure 4; changes nothing else
    teacher = teacher_cell(scale)
    return Cell(
        f'{"tuning-" if tuning else ""}{name}-{fraction:g}-seed{seed}',
        scale.tuning_data if tuning else scale.data,
        argv,
        training_cost(scale, scale.num_train * fraction, argv, 1 if tuning else scale.epochs // 5),
        seed,
        (teacher,) if teacher is not None and TAUGHT[1] in argv else (),
    )


def students(
        scale: Scale,
        name: str,
        argv: Tuple[str, ...],
        fraction: float,
        seeds: Sequence[int],
        tuning: bool = False,
) -> Tuple[Cell, ...]:
    """The same student for several seeds."""
    return tuple(student_cell(scale, name, argv, fraction, seed, tuning) for seed in seeds)


def table1(scale: Scale, seeds: Sequence[int]) -> Table:
    """The ablation."""
    labels = {
        'vit': 'ViT', 'mhca': '+ MHCA', 'hard': '+ hard labels, pooled tokens',
        'hidden': '+ hard labels + hidden loss', 'mhca_hidden': '+ hard labels + hidden loss + MHCA',
        'dearkd': 'all, in two stages (DearKD)'}
    paper = dict(zip(labels, (72.3, 72.5, 74.3, 74.1, 74.6, 74.8)))

    def claim(text: str, higher: str, lower: str) -> Claim:
        return Claim(text, (labels[higher], 'top-1'), (labels[lower], 'top-1'))

    return Table('Ablation (table 1)', f'On {100 * scale.ablation_fraction:g} % of the images.', [
        Entry(labels[name], 'top-1', students(scale, name, argv, scale.ablation_fraction, seeds), paper[name])
        for name, argv in methods(scale).items()
    ], [
        claim('MHCA alone helps', 'mhca', 'vit'),
        claim('Hard labels help', 'hard', 'vit'),
        claim('The hidden loss without MHCA hurts', 'hard', 'hidden'),
        claim('MHCA and the hidden loss above MHCA alone', 'mhca_hidden', 'mhca'),
        claim('MHCA and the hidden loss above the hidden loss alone', 'mhca_hidden', 'hidden'),
        claim('MHCA and the hidden loss above hard labels alone', 'mhca_hidden', 'hard'),
        claim('Two stages above one', 'dearkd', 'mhca_hidden'),
    ])


def table2(scale: Scale, seeds: Sequence[int]) -> Table:
    """Three methods at four sizes of the training set; the largest with two seeds at the most."""
    paper = {
        'vit': (40.5, 61.1, 68.3, 72.2), 'hard': (50.3, 64.3, 71.6, 74.5), 'dearkd': (54.3, 67.1, 72.3, 74.8)}
    columns = [f'{100 * fraction:g} %' for fraction in scale.fractions]
    vit, hard, dearkd = METHODS.values()
    claims = []
    for column in columns:
        claims += [
            Claim(f'{column}: hard labels above the plain ViT', (hard, column), (vit, column)),
            Claim(f'{column}: DearKD above hard labels', (dearkd, column), (hard, column)),
            Claim(f'{column}: DearKD above the plain ViT', (dearkd, column), (vit, column))]
    for fewer, more, shares in zip(columns, columns[1:], zip(scale.fractions, scale.fractions[1:])):
        if shares[1] <= 2.5 * shares[0]:
            claims.append(Claim(
                f'DearKD on {fewer} of the images above the plain ViT on {more}', (dearkd, fewer), (vit, more)))
    return Table(
        'Data efficiency (table 2)', 'The paper\'s four sizes are 10, 25, 50 and 100 % of ImageNet.', [
            Entry(METHODS[name], column, students(
                scale, name, methods(scale)[name], fraction, seeds[:2] if i == 3 else seeds), paper[name][i])
            for name in METHODS for i, (column, fraction) in enumerate(zip(columns, scale.fractions))],
        claims)


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
                if kind == 'ce':  # there is no stage II
                    continue
                name, argv = 'mhca_hidden', methods(scale)['mhca_hidden']
            elif share == 5 / 6 and kind == 'anneal':
                name, argv = 'dearkd', methods(scale)['dearkd']
            elif share == 0. and kind == 'ce':  # nobody teaches
                name, argv = 'mhca', methods(scale)['mhca']
            entries.append(Entry(
                f'{100 * share:.0f} %', kind, students(scale, name, argv, scale.ablation_fraction, seeds[:2]),
                paper.get(share) if kind == 'anneal' else None))
    default = ('83 %', 'anneal')
    return Table(
        'Length of stage I (table 7)',
        f'On {100 * scale.ablation_fraction:g} % of the images; stage I in percent of the epochs, and what follows it.'
        ' 100 % has no stage II, and 0 % with `ce` is MHCA without a teacher. The paper\'s figures are of 300 epochs.',
        entries,
        [Claim(f'83 %, `anneal`, above {entry.row}, `{entry.column}`', default, (entry.row, entry.column))
         for entry in entries if (entry.row, entry.column) != default])


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
# The defaults of the first round of choices, in which beta turned out to matter most
START = ('--dearkd-beta', '1', '--no-dearkd-normalize-features')
RPE_CHOICES: Dict[str, Tuple[str, ...]] = {
    'RPE dropout 0.1, of single scores': ('--dearkd-rpe-drop', '0.1'),
    'RPE dropout 0.3, of single scores': ('--dearkd-rpe-drop', '0.3'),
    'RPE dropout 0.1, by query': ('--dearkd-rpe-drop', '0.1', '--model-kwargs', 'rpe_drop_mode=query'),
    'RPE alpha from 0.1': ('--model-kwargs', 'rpe_alpha=0.1'),
    'RPE alpha from 0.3': ('--model-kwargs', 'rpe_alpha=0.3'),
    'RPE alpha from 3': ('--model-kwargs', 'rpe_alpha=3.'),
    'RPE delta from 0': ('--model-kwargs', 'rpe_delta=zero'),
    'RPE delta from N(0, 1)': ('--model-kwargs', 'rpe_delta=normal'),
}
HOOK_CHOICES: Dict[str, Tuple[str, ...]] = {
    'hidden loss on block 2, CNN stage 1': ('--dearkd-hooks', '2:1'),
    'hidden loss on block 4, CNN stage 2': ('--dearkd-hooks', '4:2'),
    'hidden loss on block 6, CNN stage 2': ('--dearkd-hooks', '6:2'),
    'hidden loss on blocks 2 and 4, CNN stages 1 and 2': ('--dearkd-hooks', '2:1', '4:2'),
}
ALPHA_CHOICES: Dict[str, Tuple[str, ...]] = {
    'alpha 0.25': ('--dearkd-alpha', '0.25'),
    'alpha 0.75': ('--dearkd-alpha', '0.75'),
}
# One change each from the defaults of the round
FIRST_CHOICES: Dict[str, Tuple[str, ...]] = {
    DEFAULT: (),
    **RPE_CHOICES,
    **HOOK_CHOICES,
    **{f'beta {beta}': ('--dearkd-beta', beta) for beta in ('0.1', '0.3', '3', '10', '30', '100', '300')},
    'normalised features': ('--dearkd-normalize-features',),
    'normalised features, beta 10': ('--dearkd-normalize-features', '--dearkd-beta', '10'),
    'normalised features, beta 30': ('--dearkd-normalize-features', '--dearkd-beta', '30'),
    **ALPHA_CHOICES,
}
CHOICES: Dict[str, Tuple[str, ...]] = {
    DEFAULT: (),
    **HOOK_CHOICES,
    # tried when stage 2 turned out above the default, to see where that ends
    'hidden loss on block 4, CNN stage 3': ('--dearkd-hooks', '4:3'),
    'hidden loss on block 6, CNN stage 3': ('--dearkd-hooks', '6:3'),
    **{f'beta {beta}': ('--dearkd-beta', beta) for beta in ('3', '30', '100')},
    'features as they are': ('--no-dearkd-normalize-features',),
    **ALPHA_CHOICES,
    **RPE_CHOICES,
}


SET_ASIDE = (
    'Students on {:g} % of 55,000 training images, figures on the other 5,000, which no student has seen. The teacher'
    ' has seen all 60,000.')


FIRST_ROUND = ' DearKD with beta 1 and features as they are.'


def _slug(label: str) -> str:
    return ''.join(c if c.isalnum() or c == '.' else '_' for c in label).replace('__', '_').strip('_')


def recipes(scale: Scale, seeds: Sequence[int]) -> Table:
    """The recipe of all students, on training images set aside."""
    def cells(label: str, name: str) -> Tuple[Cell, ...]:
        argv = RECIPES[label][0]
        is_default = name == 'dearkd' and not argv
        return students(
            scale, f'choice-{DEFAULT}' if is_default else f'recipe-{_slug(label)}-{name}',
            methods(scale)[name] + (START if name == 'dearkd' else ()) + argv, scale.ablation_fraction, seeds[:1],
            tuning=True)

    return Table('Recipe', SET_ASIDE.format(100 * scale.ablation_fraction) + FIRST_ROUND, [
        Entry(label, METHODS[name], cells(label, name)) for label, (_, names) in RECIPES.items() for name in names])


def _choices(scale: Scale, title: str, note: str, prefix: str, argv: Tuple[str, ...], options, seeds) -> Table:
    return Table(title, SET_ASIDE.format(100 * scale.ablation_fraction) + note, [
        Entry(label, 'top-1', students(
            scale, f'{prefix}-{_slug(label)}', TAUGHT + argv + change, scale.ablation_fraction, seeds, tuning=True))
        for label, change in options.items()
    ], [Claim(f'{label}: above the default', (label, 'top-1'), (DEFAULT, 'top-1'))
        for label in options if label != DEFAULT])


def first_choices(scale: Scale, seeds: Sequence[int]) -> Table:
    """What the paper leaves open, on training images set aside, one seed."""
    return _choices(
        scale, 'Settled choices, first round', FIRST_ROUND + ' The defaults of now come from it.', 'choice', START,
        FIRST_CHOICES, seeds[:1])


def choices(scale: Scale, seeds: Sequence[int]) -> Table:
    """The same from the defaults that the first round led to."""
    return _choices(
        scale, 'Settled choices', ' One change each from the defaults: beta 10, normalised features.', 'choice2', (),
        CHOICES, seeds[:2])


MODES: Dict[str, Tuple[str, Tuple[str, ...], Optional[float], Optional[float]]] = {
    # label, arguments, the paper's top-1 (table 5) and LPIPS (table 6)
    'none': ('DeepInversion', ('--diversity', 'none'), 62.7, 0.657),
    'adi': ('ADI', ('--diversity', 'adi', '--student', '{runs}/synthetic_student-none-seed{seed}'), 70.1, 0.683),
    'intra': ('DF-DearKD (intra-divergence)', ('--diversity', 'intra'), 71.2, 0.692),
}
REAL = 'real images'


def image_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """A set of images made out of the teacher, and how far apart those of a class are."""
    argv = tuple(arg.replace('{seed}', str(seed)) for arg in MODES[mode][1])
    teacher = teacher_cell(scale)
    needs = ((teacher,) if teacher else ()) + ((synthetic_student_cell(scale, 'none', seed),) if mode == 'adi' else ())
    return Cell(
        f'images-{mode}-seed{seed}', scale.data, (
            '--model', '{teacher}', '--num-images', str(scale.num_synthetic), *scale.inversion, *argv),
        scale.num_synthetic * 40., seed, needs, 'data_free')


def synthetic_student_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """The DearKD student of table 2 on a set of images; it is evaluated on the real ones, once."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs), '--val-interval',
            str(scale.epochs), *TAUGHT)
    images = image_cell(scale, mode, seed)
    return Cell(
        f'synthetic_student-{mode}-seed{seed}', f'/{images.name}', argv,
        training_cost(scale, scale.num_synthetic, argv, 1), seed, (images,))


def _ordered(column: str) -> List[Claim]:
    none, adi, intra = ((label, column) for label, *_ in MODES.values())
    return [Claim('ADI above DeepInversion', adi, none), Claim('Intra-divergence above ADI', intra, adi),
            Claim('Intra-divergence above DeepInversion', intra, none)]


def table5(scale: Scale, seeds: Sequence[int]) -> Table:
    """Students without real images, and one with about as many real ones."""
    entries = [
        Entry(label, 'top-1', tuple(synthetic_student_cell(scale, mode, seed) for seed in seeds[:2]), paper)
        for mode, (label, _, paper, _) in MODES.items()]
    real = students(scale, 'dearkd', TAUGHT, scale.ablation_fraction, seeds[:2])
    count = round(scale.num_train * scale.ablation_fraction)
    intra = (MODES['intra'][0], 'top-1')
    return Table(
        'Data-free (table 5)',
        f'DearKD students on {scale.num_synthetic} images made out of the teacher, and on {count} real ones; the'
        ' paper\'s last row is a DeiT on all of ImageNet.',
        [*entries, Entry(REAL, 'top-1', real, 72.2)],
        [*_ordered('top-1'), Claim('Real images above intra-divergence', (REAL, 'top-1'), intra)])


def table6(scale: Scale, seeds: Sequence[int]) -> Table:
    """How far apart the synthetic images of a class are."""
    return Table(
        'Diversity (table 6)',
        'Mean squared distance between features of the teacher, of two images of a class. The paper\'s figures are'
        ' LPIPS, on another scale.', [
            Entry(label, 'distance', tuple(image_cell(scale, mode, seed) for seed in seeds[:2]), paper)
            for mode, (label, _, _, paper) in MODES.items()],
        _ordered('distance'))


def figure4(scale: Scale, seeds: Sequence[int]) -> Table:
    """The runs of table 2 that record the attention distance, whatever the seeds."""
    return Table(
        'Attention distance over the epochs (figure 4)',
        f'The runs of table 2 on {100 * scale.ablation_fraction:g} % of the images, seed 0.',
        [Entry(METHODS[name], 'top-1', students(scale, name, methods(scale)[name], scale.ablation_fraction, (0,)))
         for name in METHODS])


CHOOSING = ('recipes', 'first_choices', 'choices')
TABLES: Dict[str, Callable[[Scale, Sequence[int]], Table]] = {
    'recipes': recipes, 'first_choices': first_choices, 'choices': choices, 'table2': table2, 'table1': table1,
    'table7': table7, 'table5': table5, 'table6': table6, 'figure4': figure4}


def tables_of(scale: Scale) -> Dict[str, Callable[[Scale, Sequence[int]], Table]]:
    """The tables that a scale has: nothing is chosen where there are no images for it."""
    return {name: make for name, make in TABLES.items() if scale.tuning_data or name not in CHOOSING}
