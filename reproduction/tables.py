"""The tables of the report: which cells their figures come from, the paper's figures, and the claims."""
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from reproduction.cells import (
    FIGURE4,
    METHODS,
    TAUGHT,
    Cell,
    Scale,
    adi_weights,
    hidden_loss,
    intra_weights,
    methods,
    stages,
    student_cell,
    students,
    teacher_cell,
    training_cost,
    two_stages,
)
from timm_dearkd.data_free.inversion import LossWeights

__all__ = ['CHOOSING', 'TABLES', 'Claim', 'Entry', 'Table', 'tables_of']


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the mean over the seeds of its cells.

    Args:
        row: Label.
        column: Label.
        cells: One for each seed.
        paper: The paper's figure, on ImageNet.
        noise: Figures of a table with the same word here differ from seed to seed by about as much.
        key: Of the figure in the cell's result.
        digits: That it is printed with.
    """
    row: str
    column: str
    cells: Tuple[Cell, ...]
    paper: Optional[float] = None
    noise: str = ''
    key: str = 'top1'
    digits: int = 1


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
        claims: What is expected of them.
        reference: Row that the others are compared with.
    """
    title: str
    note: str
    entries: List[Entry]
    claims: List[Claim] = field(default_factory=list)
    reference: str = ''


HIDDEN = 'hidden loss'  # figures with it vary far less from seed to seed than those without


def table1(scale: Scale, seeds: Sequence[int]) -> Table:
    """The ablation."""
    labels = {
        'vit': 'ViT', 'mhca': '+ MHCA', 'hard': '+ hard labels, pooled tokens',
        'mhca_hard': '+ hard labels + MHCA', 'hidden': '+ hard labels + hidden loss',
        'mhca_hidden': '+ hard labels + hidden loss + MHCA', 'dearkd': 'all, in two stages (DearKD)'}
    paper = dict(vit=72.3, mhca=72.5, hard=74.3, hidden=74.1, mhca_hidden=74.6, dearkd=74.8)

    def claim(text: str, higher: str, lower: str) -> Claim:
        return Claim(text, (labels[higher], 'top-1'), (labels[lower], 'top-1'))

    note = (f'On {100 * scale.ablation_fraction:g} % of the images. Hard labels with MHCA alone are a row that the'
            ' paper does not have. The weight of the hidden loss was chosen with MHCA.')
    return Table('Ablation (table 1)', note, [
        Entry(labels[name], 'top-1', students(scale, name, argv, scale.ablation_fraction, seeds), paper.get(name),
              HIDDEN if name in ('hidden', 'mhca_hidden', 'dearkd') else '')
        for name, argv in methods(scale).items()
    ], [
        claim('MHCA alone helps', 'mhca', 'vit'),
        claim('Hard labels help', 'hard', 'vit'),
        claim('The hidden loss without MHCA hurts', 'hard', 'hidden'),
        claim('With hard labels, MHCA and the hidden loss above neither', 'mhca_hidden', 'hard'),
        claim('With hard labels, MHCA and the hidden loss above MHCA alone', 'mhca_hidden', 'mhca_hard'),
        claim('With hard labels, MHCA and the hidden loss above the hidden loss alone', 'mhca_hidden', 'hidden'),
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
        if shares[1] == 2 * shares[0]:
            claims.append(Claim(
                f'DearKD on {fewer} of the images above the plain ViT on {more}', (dearkd, fewer), (vit, more)))
    return Table(
        'Data efficiency (table 2)',
        'The paper\'s four sizes are 10, 25, 50 and 100 % of ImageNet, its ViT is a DeiT-Ti with 3 heads, and its hard'
        ' labels are learned by a token of their own; here all three methods have the same heads, and both with a'
        ' teacher learn its labels from the pooled tokens.', [
            Entry(METHODS[name], column, students(
                scale, name, methods(scale)[name], fraction, seeds[:2] if i == 3 else seeds), paper[name][i],
                column + (HIDDEN if name == 'dearkd' else ''))
            for i, (column, fraction) in enumerate(zip(columns, scale.fractions)) for name in METHODS],
        claims)


def cnn_cell(scale: Scale, seed: int) -> Cell:
    """The teacher's CNN, trained on a student's images alone, by the student's recipe."""
    argv = ('-c', scale.recipe, *scale.cnn, '--epochs', str(scale.epochs), '--val-interval', str(scale.epochs),
            '--train-fraction', str(scale.ablation_fraction), '--fraction-seed', str(seed))
    cost = scale.num_train * scale.ablation_fraction * scale.epochs / 3
    return Cell(f'cnn-{scale.ablation_fraction:g}-seed{seed}', scale.data, argv, cost, seed)


def pupil_cell(scale: Scale, method: str, seed: int) -> Cell:
    """A student that such a CNN teaches."""
    cnn = cnn_cell(scale, seed)
    cell = student_cell(scale, f'pupil_{method}', methods(scale)[method], scale.ablation_fraction, seed)
    argv = tuple(arg.replace('{teacher}', f'{{runs}}/{cnn.name}') for arg in cell.argv)
    return replace(cell, argv=argv, needs=(cnn,))


def own_teacher(scale: Scale, seeds: Sequence[int]) -> Table:
    """What a CNN teaches that has seen no other images than the student; two seeds at the most."""
    rows = {
        'ViT': students(scale, 'vit', methods(scale)['vit'], scale.ablation_fraction, seeds),
        'that CNN': tuple(cnn_cell(scale, seed) for seed in seeds[:2]),
        'ViT, hard labels of that CNN': tuple(pupil_cell(scale, 'hard', seed) for seed in seeds[:2]),
        'DearKD with that CNN': tuple(pupil_cell(scale, 'dearkd', seed) for seed in seeds[:2]),
        'DearKD with the CNN of all images': students(
            scale, 'dearkd', methods(scale)['dearkd'], scale.ablation_fraction, seeds)}
    vit, cnn, hard, dearkd, _ = ((row, 'top-1') for row in rows)
    return Table(
        'A teacher that has seen no more than the student',
        f'On {100 * scale.ablation_fraction:g} % of the images. The teacher of all other tables has seen all of them;'
        ' the CNN here, of the same architecture, only those of its student, by the same recipe, epochs included.'
        ' Nothing was chosen for it. To the right: the share of the augmented images whose label the teacher finds.',
        [Entry(row, 'top-1', cells, None, HIDDEN if row.startswith('DearKD') else '') for row, cells in rows.items()]
        + [Entry(row, 'labels found', cells, None, 'labels', 'teacher_agreement', 2) for row, cells in rows.items()], [
            Claim('DearKD above the plain ViT', dearkd, vit),
            Claim('DearKD above hard labels of the same CNN', dearkd, hard),
            Claim('DearKD above its teacher', dearkd, cnn)])


def table7(scale: Scale, seeds: Sequence[int]) -> Table:
    """The length of stage I, and both kinds of stage II."""
    paper = {2 / 3: 74.3, 3 / 4: 74.6, 5 / 6: 74.8, 11 / 12: 74.7, 1.: 74.6}
    entries = []
    for share in (0., 1 / 2, *paper):
        if share in (3 / 4, 11 / 12) and scale.name != 'imagenet':
            continue
        for kind in ('anneal', 'ce'):
            shared = {(0., 'ce'): 'mhca', (5 / 6, 'anneal'): 'dearkd', (1., 'anneal'): 'mhca_hidden'}.get((share, kind))
            if share == 1. and kind == 'ce':  # there is no stage II
                continue
            name = shared or f'stage{100 * share:.0f}_{kind}'
            argv = methods(scale)[shared] if shared else two_stages(scale, share, kind)
            entries.append(Entry(
                f'{100 * share:.0f} %', kind,
                students(scale, name, argv, scale.ablation_fraction, seeds if shared else seeds[:2]),
                paper.get(share) if kind == 'anneal' else None, HIDDEN if share else ''))
    default = ('83 %', 'anneal')
    return Table(
        'Length of stage I (table 7)',
        f'On {100 * scale.ablation_fraction:g} % of the images; stage I in percent of the epochs, and what follows it.'
        ' 100 % has no stage II, and 0 % with `ce` is MHCA without a teacher. The paper\'s figures are of 300 epochs;'
        ' those at 75 % (74.6) and 92 % (74.7) are only run at its scale.',
        entries,
        [Claim(f'83 %, `anneal`, above {entry.row}, `{entry.column}`', default, (entry.row, entry.column))
         for entry in entries if (entry.row, entry.column) != default])


# Recipes tried, one change each: learning rates and stronger augmentation for all methods, weaker ones and the paper's
# heads for the ViT, and the weight of the teacher's labels where it is all that there is of the teacher
ALL_METHODS, BASELINE, HARD = ('vit', 'hard', 'dearkd'), ('vit',), ('hard',)
RECIPES: Dict[str, Tuple[Tuple[str, ...], Tuple[str, ...]]] = {
    'as the file': ((), ALL_METHODS),
    'lr 1e-3': (('--lr', '1e-3'), ALL_METHODS),
    'lr 4e-3': (('--lr', '4e-3'), ALL_METHODS),
    'Mixup, CutMix': (('--mixup', '0.8', '--cutmix', '1.0', '--mixup-prob', '0.5'), ALL_METHODS),
    'RandAugment': (('--aa', 'rand-m9-mstd0.5-inc1'), ALL_METHODS),
    'crops from 0.35': (('--scale', '0.35', '1.0'), BASELINE),
    'no random erasing': (('--reprob', '0'), ALL_METHODS),
    '3 heads': (('--model-kwargs', 'num_mhca_blocks=0', 'num_heads=3'), BASELINE),
    **{f'alpha {alpha}': (('--dearkd-alpha', alpha), HARD) for alpha in ('0.25', '0.75', '0.9')},
}
DEFAULT = 'default'
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


def first_round(scale: Scale) -> Tuple[str, ...]:
    """DearKD in the first round of choices, in which beta turned out to matter most."""
    return TAUGHT + hidden_loss(('4:1',), '1', normalize=False) + stages(scale, 5 / 6)


def second_round(scale: Scale) -> Tuple[str, ...]:
    """DearKD in the second."""
    return TAUGHT + hidden_loss(('4:1',)) + stages(scale, 5 / 6)


def _slug(label: str) -> str:
    return ''.join(c if c.isalnum() or c == '.' else '_' for c in label).replace('__', '_').strip('_')


def recipes(scale: Scale, seeds: Sequence[int]) -> Table:
    """The recipe of all students, on training images set aside."""
    def cells(label: str, name: str) -> Tuple[Cell, ...]:
        argv = RECIPES[label][0]
        is_default = name == 'dearkd' and not argv
        return students(
            scale, f'choice-{DEFAULT}' if is_default else f'recipe-{_slug(label)}-{name}',
            (first_round(scale) if name == 'dearkd' else methods(scale)[name]) + argv, scale.ablation_fraction,
            seeds[:1], tuning=True)

    note = (' In the last column: the share of the augmented images whose label the teacher finds, for hard labels,'
            ' where it was recorded.')
    return Table('Recipe', SET_ASIDE.format(100 * scale.ablation_fraction) + FIRST_ROUND + note, [
        *(Entry(label, METHODS[name], cells(label, name)) for label, (_, names) in RECIPES.items() for name in names),
        *(Entry(label, 'labels found', cells(label, 'hard'), None, 'labels', 'teacher_agreement', 2)
          for label, (_, names) in RECIPES.items() if 'hard' in names)])


def _choices(scale: Scale, title: str, note: str, prefix: str, argv: Tuple[str, ...], options, seeds) -> Table:
    return Table(title, SET_ASIDE.format(100 * scale.ablation_fraction) + note, [
        Entry(label, 'top-1', students(
            scale, f'{prefix}-{_slug(label)}', argv + change, scale.ablation_fraction, seeds, tuning=True))
        for label, change in options.items()
    ], reference=DEFAULT)


def first_choices(scale: Scale, seeds: Sequence[int]) -> Table:
    """What the paper leaves open, on training images set aside, one seed."""
    return _choices(
        scale, 'Settled choices, first round', FIRST_ROUND
        + ' The weight of the hidden loss and the normalised features of the later tables come from it.', 'choice',
        first_round(scale), FIRST_CHOICES, seeds[:1])


def choices(scale: Scale, seeds: Sequence[int]) -> Table:
    """The same from the defaults that the first round led to."""
    return _choices(
        scale, 'Settled choices',
        ' One change each from DearKD with beta 10, normalised features, and the hidden loss between block 4 and CNN'
        ' stage 1. The later tables have CNN stage 2 by it; nothing was chosen again after that. Of so many differences'
        ' one is outside of its interval by chance.',
        'choice2', second_round(scale), CHOICES, seeds[:2])


def longer(scale: Scale, seeds: Sequence[int]) -> Table:
    """Whether the methods differ in where they end, or in how fast they get there."""
    scale = replace(scale, epochs=4 * scale.epochs)
    return Table(
        'Four times as many epochs',
        SET_ASIDE.format(100 * scale.ablation_fraction) + f' All have {scale.epochs} epochs.',
        [Entry(label, 'top-1', students(
            scale, f'longer-{name}', methods(scale)[name], scale.ablation_fraction, seeds[:1], tuning=True))
         for name, label in METHODS.items()],
        reference=METHODS['vit'])


MODES: Dict[str, Tuple[str, float, float]] = {
    # label, the paper's top-1 (table 5) and LPIPS (table 6)
    'none': ('DeepInversion', 62.7, 0.657),
    'adi': ('ADI', 70.1, 0.683),
    'intra': ('DF-DearKD (intra-divergence)', 71.2, 0.692),
}
REAL = 'real images'
# What two CNNs say of images that were made: the one that they were made out of, and one that has other weights
IMAGE_FIGURES = {'CNN is sure, %': 'sure', 'another CNN is, %': 'recognised'}


def image_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """A set of images made out of the teacher."""
    weights = {'none': (), 'adi': scale.adi, 'intra': scale.intra}[mode]
    return inversion_cell(scale, f'images-{mode}-seed{seed}', scale.data, mode, seed, scale.num_synthetic, weights)


def inversion_cell(
        scale: Scale,
        name: str,
        data: str,
        mode: str,
        seed: int,
        num_images: int,
        weights: Tuple[str, ...],
) -> Cell:
    """Images by one of the modes, with some weights of its loss. A CNN of other images looks on."""
    teacher, needs = teacher_cell(scale), []
    argv = ['--model', '{teacher}', '--num-images', str(num_images), '--diversity', mode, *scale.inversion]
    if teacher:
        needs += [teacher, cnn_cell(scale, 0)]
        argv += ['--verifier', f'{{runs}}/{needs[1].name}', '--min-prob', '0']
    if mode == 'adi':
        needs.append(synthetic_student_cell(scale, 'none', seed))
        argv += ['--student', f'{{runs}}/{needs[-1].name}']
    return Cell(name, data, (*argv, *weights), num_images * 40., seed, tuple(needs), 'data_free')


def synthetic_student_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """The DearKD student of table 2 on a set of images; it is evaluated on the real ones, once."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs), '--val-interval',
            str(scale.epochs), *methods(scale)['dearkd'], *scale.data_free)
    images, teacher = image_cell(scale, mode, seed), teacher_cell(scale)
    return Cell(
        f'synthetic_student-{mode}-seed{seed}', f'/{images.name}', argv,
        training_cost(scale, scale.num_synthetic, argv, 1), seed, ((teacher,) if teacher else ()) + (images,))


def _ordered(column: str) -> List[Claim]:
    none, adi, intra = ((label, column) for label, *_ in MODES.values())
    return [Claim('ADI above DeepInversion', adi, none), Claim('Intra-divergence above ADI', intra, adi),
            Claim('Intra-divergence above DeepInversion', intra, none)]


def real_students(scale: Scale, seeds: Sequence[int]) -> Tuple[Cell, ...]:
    """On about as many real images: those of table 2, where the recipe is the same."""
    argv = methods(scale)['dearkd'] + scale.data_free
    if not scale.data_free:
        return students(scale, 'dearkd', argv, scale.ablation_fraction, seeds)
    return students(scale, 'real_student', argv, round(scale.num_synthetic / scale.num_train, 4), seeds)


def weights_note(scale: Scale) -> str:
    """What is other than data_free's defaults in the images' losses."""
    argv = scale.inversion + scale.adi + scale.intra
    flags, defaults = dict(zip(argv, argv[1:])), LossWeights()
    names = dict(bn='BatchNorm', tv='total variation', ep='easiest positive', triplet='triplet', adi='ADI')
    changed = [
        f'{name} {flags[f"--{flag}-weight"]} (default {getattr(defaults, flag):g})' for flag, name in names.items()
        if float(flags[f'--{flag}-weight']) != getattr(defaults, flag)]
    changed += ['relative BatchNorm distances'] if flags['--bn-norm'] == 'relative' else []
    return f' Not the defaults of `data_free`: {", ".join(changed)}.' if changed else ''


# Weights of what keeps images apart: easiest positive (the triplet's is a hundredth of it), and the competition
WEIGHTS: Dict[str, Tuple[str, ...]] = {
    'intra': ('0.05', '0.1', '0.2', '0.5', '1', '2'), 'adi': ('10', '30', '100', '300')}


def inversion(scale: Scale, seeds: Sequence[int]) -> Table:
    """How strong the losses for diversity may be."""
    make = dict(intra=intra_weights, adi=adi_weights)
    tried: Dict[str, Tuple[str, str, Tuple[str, ...]]] = {MODES['none'][0]: ('none', 'none', ())}
    for mode, weights in WEIGHTS.items():
        tried.update({f'{MODES[mode][0]}, {w}': (f'{mode}-{w}', mode, make[mode](w)) for w in weights})
    return Table(
        'Weights for diversity, without real images',
        '120 images each, of one seed, by the weight of the easiest positive (a hundredth of it for the triplet, as in'
        ' the paper) and of the competition. Tables 5 and 6 are to have the largest of these that leaves 90 % of the'
        ' images with more than half of the probability of the CNN that they are made out of, as far as they have been'
        ' run; three images are 2.5 points. The other CNN has no say.',
        [Entry(row, column, (inversion_cell(
            scale, f'tuning-images-{name}-seed{seeds[0]}', scale.tuning_data, mode, seeds[0], 120, argv),), None, key,
            key)
         for row, (name, mode, argv) in tried.items() for column, key in IMAGE_FIGURES.items()])


def table5(scale: Scale, seeds: Sequence[int]) -> Table:
    """Students without real images, and one with about as many real ones."""
    entries = [
        entry for mode, (label, paper, _) in MODES.items()
        for cells in [tuple(synthetic_student_cell(scale, mode, seed) for seed in seeds[:2])]
        for entry in (Entry(label, 'top-1', cells, paper, 'synthetic'),
                      Entry(label, 'labels found', cells, None, 'labels', 'teacher_agreement', 2))]
    real, intra = real_students(scale, seeds), (MODES['intra'][0], 'top-1')
    note = (
        f'DearKD students on {scale.num_synthetic} images made out of a CNN'
        f'{"" if scale.cnn else " (before the verifier leaves any out)"}, and on about as many real ones; their recipe'
        f' was chosen on real ones.{weights_note(scale)} ADI competes with the student of DeepInversion\'s images.'
        ' To the right: the share of the augmented images whose label, the class that they were made for, the teacher'
        ' finds.')
    if scale.cnn:
        note += (
            ' The CNN is the teacher too, where the paper has two, and no image is left out. Images are made to look'
            ' like the crops that the CNN was trained on, and are cropped once more for the student, which may widen'
            ' the gap to real ones.')
    return Table(
        'Data-free (table 5)', note,
        [*entries, Entry(REAL, 'top-1', real, 72.2, 'real'),
         Entry(REAL, 'labels found', real, None, 'labels', 'teacher_agreement', 2)],
        [*_ordered('top-1'), Claim('Real images above intra-divergence', (REAL, 'top-1'), intra)])


def distance_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """How far apart the images of a class are, real ones without a mode."""
    need, data = teacher_cell(scale), scale.data  # the teacher may be what measures
    if mode:
        need = image_cell(scale, mode, seed)
        data = f'/{need.name}'
    return Cell(
        f'distance-{mode or "real"}-seed{seed}', data, scale.diversity, 1000., seed, (need,) if need else (),
        'diversity')


def table6(scale: Scale, seeds: Sequence[int]) -> Table:
    """How far apart the images of a class are."""
    metric = 'LPIPS'
    if '--model' in scale.diversity:
        cnn = scale.diversity[scale.diversity.index('--model') + 1].strip('{}')
        metric = (f'a mean of squared distances between features of {cnn}; the paper\'s figures are LPIPS, on another'
                  ' scale')
    distances = [
        Entry(label, 'distance', tuple(distance_cell(scale, mode, seed) for seed in seeds[:2]), lpips, noise,
              'distance', 3)
        for label, mode, lpips, noise in (
            (REAL, '', 0.708, 'real'),
            *((label, mode, lpips, 'synthetic') for mode, (label, _, lpips) in MODES.items()))]
    looks = [
        Entry(label, column, tuple(image_cell(scale, mode, seed) for seed in seeds[:2]), None, key, key)
        for mode, (label, *_) in MODES.items() for column, key in IMAGE_FIGURES.items()]
    return Table(
        'Diversity (table 6)',
        f'Distance of two images of a class: {metric}. Noise in the pixels is distance too, so that more of it is'
        ' diversity only where the images are recognised as well. Beside it: images in percent to which the CNN that'
        ' they were made out of gives more than half of its probability for their class, and to which another CNN does'
        f'{", trained on as many real images" if scale.cnn else ""}.',
        distances + looks, [
            *_ordered('distance'),
            *(Claim(f'Real images above {label}', (REAL, 'distance'), (label, 'distance'))
              for label, *_ in MODES.values())])


def figure4(scale: Scale, seeds: Sequence[int]) -> Table:
    """Runs of the other tables that record the attention distance."""
    argv = {**methods(scale), 'stage50_ce': two_stages(scale, 1 / 2, 'ce')}
    return Table(
        'Attention distance over the epochs (figure 4)',
        f'Runs of tables 1, 2 and 7 on {100 * scale.ablation_fraction:g} % of the images; pictures and numbers by layer'
        ' are of seed 0.',
        [Entry(label, 'top-1', students(
            scale, name, argv[name], scale.ablation_fraction, seeds[:2] if name == 'stage50_ce' else seeds))
         for name, label in FIGURE4.items()])


CHOOSING = ('recipes', 'first_choices', 'choices', 'longer', 'inversion')
TABLES: Dict[str, Callable[[Scale, Sequence[int]], Table]] = {
    'recipes': recipes, 'first_choices': first_choices, 'choices': choices, 'longer': longer, 'table2': table2,
    'table1': table1, 'own_teacher': own_teacher, 'table7': table7, 'inversion': inversion, 'table5': table5,
    'table6': table6, 'figure4': figure4}


def tables_of(scale: Scale) -> Dict[str, Callable[[Scale, Sequence[int]], Table]]:
    """The tables that a scale has: nothing is chosen where there are no images for it, no CNN trained where one is."""
    missing = (() if scale.tuning_data else CHOOSING) + (() if scale.cnn else ('own_teacher',))
    return {name: make for name, make in TABLES.items() if name not in missing}
