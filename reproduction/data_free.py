"""Define the tables of images that are synthesised from a CNN."""
from typing import Dict, List, Optional, Sequence, Tuple

from reproduction.cells import (
    ROOT,
    Cell,
    Scale,
    adi_weights,
    cnn_cell,
    intra_weights,
    methods,
    read_yaml,
    students,
    teacher_cell,
    training_cost,
)
from reproduction.table import AGREEMENT, Claim, Decision, Entry, Table
from timm_dearkd.data_free.inversion import LossWeights

MODES: Dict[str, Tuple[str, float, float]] = {
    # label, the paper's top-1 (table 5) and LPIPS (table 6)
    'none': ('DeepInversion', 62.7, 0.657),
    'adi': ('ADI', 70.1, 0.683),
    'intra': ('DF-DearKD (intra-divergence)', 71.2, 0.692),
}
REAL_LPIPS = 0.708
# Sets beside those of the paper
GENERATED = {'generator': 'Generator', 'generator_intra': 'Generator, intra-divergence'}
ROUNDS = 'ADI, 3 rounds'
NUM_ROUNDS = 3
FILLS = ('edge', 'black')
BY_CLASS = 'recipe of table 2'  # column
REAL = 'Real images'
LONGER = ', twice the epochs'
VIT, VIT_MORE = 'ViT on real images', 'ViT on four times as many real images'
# Share of the images to which a CNN gives over half of its probability for their class: the CNN that they were
# synthesised from, and one with other weights
IMAGE_FIGURES = {'recognised by its CNN, %': 'sure', 'by another CNN, %': 'recognised'}


def image_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """Return a set of images that are synthesised from the teacher."""
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
        student: Optional[Cell] = None,
) -> Cell:
    """Return a set of images of one mode and its loss weights. A CNN trained on other images verifies them.

    ADI competes with `student`, or with the student of DeepInversion's images.
    """
    teacher, needs = teacher_cell(scale), []
    argv = ['--model', '{teacher}', '--num-images', str(num_images), '--diversity', mode, *scale.inversion]
    if teacher:
        needs += [teacher, cnn_cell(scale, 0)]
        argv += ['--verifier', f'{{runs}}/{needs[1].name}', '--min-prob', '0']
    if mode == 'adi':
        needs.append(student or synthetic_student_cell(scale, 'none', seed))
        argv += ['--student', f'{{runs}}/{needs[-1].name}']
    cost = num_images * (80. if mode == 'adi' else 40.)
    return Cell(name, data, (*argv, *weights), cost, seed, tuple(needs), 'data_free')


def path_of(cnn: Optional[Cell]) -> str:
    """Return the argument for a CNN: its run, or the teacher if it is None."""
    return f'{{runs}}/{cnn.name}' if cnn else '{teacher}'


def generator_cell(scale: Scale, mode: str, seed: int, cnn: Optional[Cell] = None) -> Cell:
    """Return a set of images of a generator, for the teacher or another CNN. A pilot chooses its weights."""
    diversity = 'intra' if mode == 'generator_intra' else 'none'
    needs = (cnn or teacher_cell(scale), cnn_cell(scale, 0))
    argv = (
        '--model', path_of(cnn), '--generator', '--num-images', str(scale.num_generated), '--diversity', diversity,
        '--verifier', path_of(needs[1]), '--min-prob', '0',
        *(('--resolutions', '32:4:0.01', '--images-per-class', '6') if scale.name == 'smoke' else ()))
    name = f'images-{cnn.name if cnn else mode}-seed{seed}'
    return Cell(
        name, scale.data, argv, scale.num_generated * 8., seed, needs, 'data_free')  # type: ignore[arg-type]


def round_cells(scale: Scale, number: int, seed: int) -> List[Cell]:
    """Return the images of each round of ADI up to a number. Later rounds compete with the latest student."""
    count = scale.num_synthetic // NUM_ROUNDS
    first = inversion_cell(scale, f'images-round1-seed{seed}', scale.data, 'none', seed, count, ())
    if number == 1:
        return [first]
    student = recipe_student(scale, f'round{number - 1}', merged_cell(scale, number - 1, seed), FILLS[0], seed)
    name = f'images-round{number}-seed{seed}'
    cell = inversion_cell(scale, name, scale.data, 'adi', seed + 100 * number, count, scale.adi, student)
    return [*round_cells(scale, number - 1, seed), cell]


def merged_cell(scale: Scale, number: int, seed: int) -> Cell:
    """Return the images of the first rounds of ADI in one folder."""
    cells = round_cells(scale, number, seed)
    return Cell(
        f'images-rounds{number}-seed{seed}', scale.data, tuple(f'{{runs}}/{cell.name}' for cell in cells), 100., seed,
        tuple(cells), 'merge')


def recipe_student(
        scale: Scale,
        name: str,
        images: Optional[Cell],
        fill: str,
        seed: int,
        cnn: Optional[Cell] = None,
        factor: int = 1,
) -> Cell:
    """Return the student of the recipe `data_free` on synthetic images; on real ones if there are none.

    The teacher is `cnn`, or that of the other tables. The epochs of the scale are multiplied by `factor`.
    """
    options = list(scale.synthetic)
    options[options.index('--epochs') + 1] = str(factor * int(options[options.index('--epochs') + 1]))
    argv: Tuple[str, ...] = (
        '-c', 'recipes/data_free.yaml', '--model', scale.student, '--kd-model-name', path_of(cnn), *options,
        '--affine-aug', fill, '--val-interval', '40')
    if images is None:
        fraction = str(round(scale.num_synthetic / scale.num_train, 4))
        argv += ('--train-fraction', fraction, '--fraction-seed', str(seed))
    needs = tuple(cell for cell in (cnn or teacher_cell(scale), images) if cell is not None)
    return Cell(
        f'recipe_{fill}-{name}-seed{seed}', f'/{images.name}' if images else scale.data, argv, factor * 45_000., seed,
        needs)


def column_of(fill: str) -> str:
    """Return the column of the students of the recipe `data_free` with a fill."""
    return f'`data_free`, {fill}'


def recipe_sets(scale: Scale, seed: int) -> Dict[str, Tuple[str, Optional[Cell]]]:
    """Return the name and the images of each set for the recipe `data_free`, by label."""
    sets: Dict[str, Tuple[str, Optional[Cell]]] = {
        MODES[mode][0]: (mode, image_cell(scale, mode, seed)) for mode in ('none', 'intra')}
    sets[ROUNDS] = ('rounds', merged_cell(scale, NUM_ROUNDS, seed))
    sets.update({label: (mode, generator_cell(scale, mode, seed)) for mode, label in GENERATED.items()})
    sets[REAL] = ('real', None)
    return sets


def recipe_entries(scale: Scale, seeds: Sequence[int]) -> List[Entry]:
    """Return the students of the recipe `data_free`, in a column for each fill, and plain ViTs to compare them with."""
    by_seed = {seed: recipe_sets(scale, seed) for seed in seeds}
    paper = {MODES[name][0]: MODES[name][1] for name in ('none', 'intra')}
    paper[ROUNDS] = MODES['adi'][1]
    entries = []
    for label, (name, _) in by_seed[seeds[0]].items():
        longer = [(label + LONGER, f'{name}_longer', 2)] if label in (GENERATED['generator'], REAL) else []
        for row, run, factor in [(label, name, 1), *longer]:
            for fill in FILLS:
                cells = tuple(
                    recipe_student(scale, run, by_seed[seed][label][1], fill, seed, factor=factor) for seed in seeds)
                entries.append(Entry(
                    row, column_of(fill), cells, paper.get(row) if fill == FILLS[0] else None,
                    'real' if label == REAL else f'synthetic {fill}'))
    for row, fraction, known in ((VIT, scale.ablation_fraction, seeds), (VIT_MORE, scale.fractions[-1], seeds[:2])):
        cells = students(scale, 'vit', methods(scale)['vit'], fraction, known)
        entries.append(Entry(row, BY_CLASS, cells, None, 'ViT'))
    return entries


def recipe_claims() -> List[Claim]:
    """Return the paper's order under the recipe `data_free`, and our own comparisons."""
    none, intra, generator = MODES['none'][0], MODES['intra'][0], GENERATED['generator']
    pairs = [
        (ROUNDS, none), (intra, ROUNDS), (intra, none), (generator, none), (GENERATED['generator_intra'], generator),
        (REAL, generator), (generator + LONGER, generator), (REAL + LONGER, generator + LONGER)]
    claims = []
    for fill in FILLS:
        column = column_of(fill)
        claims += [Claim(f'{higher} > {lower} (recipe `data_free`, {fill})', (higher, column), (lower, column))
                   for higher, lower in pairs]
        claims += [Claim(f'{generator}{LONGER} ({fill}) > {vit}', (generator + LONGER, column), (vit, BY_CLASS))
                   for vit in (VIT, VIT_MORE)]
    return claims


def synthetic_student_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """Return the DearKD student of table 2 on synthetic images, evaluated once on the real ones."""
    argv = ('-c', scale.recipe, '--model', scale.student, '--epochs', str(scale.epochs), '--val-interval',
            str(scale.epochs), *methods(scale)['dearkd'], *scale.data_free)
    images, teacher = image_cell(scale, mode, seed), teacher_cell(scale)
    return Cell(
        f'synthetic_student-{mode}-seed{seed}', f'/{images.name}', argv,
        training_cost(scale, scale.num_synthetic, argv, 1), seed, ((teacher,) if teacher else ()) + (images,))


def _ordered(column: str, recipe: str = '') -> List[Claim]:
    none, adi, intra = ((label, column) for label, *_ in MODES.values())
    return [Claim(f'ADI > DeepInversion{recipe}', adi, none), Claim(f'DF-DearKD > ADI{recipe}', intra, adi),
            Claim(f'DF-DearKD > DeepInversion{recipe}', intra, none)]


def real_students(scale: Scale, seeds: Sequence[int]) -> Tuple[Cell, ...]:
    """Return students on about as many real images; those of table 2 if the recipe is the same."""
    argv = methods(scale)['dearkd'] + scale.data_free
    if not scale.data_free:
        return students(scale, 'dearkd', argv, scale.ablation_fraction, seeds)
    return students(scale, 'real_student', argv, round(scale.num_synthetic / scale.num_train, 4), seeds)


def weights_notes(scale: Scale) -> List[str]:
    """Return a sentence with the loss weights that differ from data_free's defaults; none if none do."""
    argv = scale.inversion + scale.adi + scale.intra
    flags, defaults = dict(zip(argv, argv[1:])), LossWeights()
    names = dict(bn='BatchNorm', tv='total variation', ep='easiest positive', triplet='triplet', adi='ADI')
    changed = [
        f'{name} {flags[f"--{flag}-weight"]} (default {getattr(defaults, flag):g})' for flag, name in names.items()
        if float(flags[f'--{flag}-weight']) != getattr(defaults, flag)]
    changed += ['relative BatchNorm distances'] if flags['--bn-norm'] == 'relative' else []
    return [f'Changed from the defaults of `data_free`: {", ".join(changed)}.'] if changed else []


# Weights of the diversity losses: easiest positive (the triplet has a hundredth of it), and competition
WEIGHTS: Dict[str, Tuple[str, ...]] = {
    'intra': ('0.05', '0.1', '0.2', '0.5', '1', '2'), 'adi': ('10', '30', '100', '300')}
WEIGHT_DECISIONS = tuple(
    Decision(what, 'inversion', list(IMAGE_FIGURES)[0], {w: f'{MODES[mode][0]}, {w}' for w in WEIGHTS[mode]}, taken,
             'The largest weight that leaves 90 % of the images recognised by their CNN.')
    for what, mode, taken in (('weight of the easiest positive, DF-DearKD (% recognised)', 'intra', '0.1'),
                              ('weight of the competition, ADI (% recognised)', 'adi', '30')))


# The paper's weights under several readings of its losses: features as they are or of length 1, BatchNorm distances
# absolute or relative
ABSOLUTE = ('--bn-norm', 'absolute', '--tv-weight', '1e-4')
LENGTH_1 = ('--latent', 'normalized')
READINGS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    'raw-50': ('the paper\'s 50, absolute BatchNorm', (*ABSOLUTE, *intra_weights('50'))),
    'normalized-50': ('50, absolute BatchNorm, features of length 1', (*ABSOLUTE, *intra_weights('50'), *LENGTH_1)),
    'normalized-50-relative': ('50, features of length 1', (*intra_weights('50'), *LENGTH_1)),
    'normalized-5-relative': ('5, features of length 1', (*intra_weights('5'), *LENGTH_1)),
    'normalized-1-relative': ('1, features of length 1', (*intra_weights('1'), *LENGTH_1)),
}


def inversion(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the weights of the diversity losses that were tried."""
    make = dict(intra=intra_weights, adi=adi_weights)
    tried: Dict[str, Tuple[str, str, Tuple[str, ...]]] = {MODES['none'][0]: ('none', 'none', ())}
    for mode, weights in WEIGHTS.items():
        tried.update({f'{MODES[mode][0]}, {w}': (f'{mode}-{w}', mode, make[mode](w)) for w in weights})
    tried[f'{MODES["none"][0]}, absolute BatchNorm'] = ('none-absolute', 'none', ABSOLUTE)
    tried.update({f'{MODES["intra"][0]}, {label}': (name, 'intra', argv) for name, (label, argv) in READINGS.items()})
    return Table(
        'Weights of the diversity losses, without real images',
        '120 images each, of 200 steps. DF-DearKD: weight of the easiest positive; the triplet has a hundredth of it,'
        ' as in the paper. ADI: weight of the competition. BatchNorm distances are relative unless a row says'
        ' otherwise. An image is recognised if the CNN gives its class a probability above 0.5. Three images are 2.5'
        ' points. The other CNN was not used to choose.',
        [Entry(row, column, (inversion_cell(
            scale, f'tuning-images-{name}-seed{seeds[0]}', scale.tuning_data, mode, seeds[0], 120, argv),), None, key,
            key)
         for row, (name, mode, argv) in tried.items() for column, key in IMAGE_FIGURES.items()])


def updates(scale: Scale) -> str:
    """Return a sentence with the updates of the students of table 5 and of the plain ViTs."""
    flags = dict(zip(scale.synthetic, scale.synthetic[1:]))
    student = int(flags['--epochs']) * int(flags['--train-batches-per-epoch'])
    batch_size = read_yaml(ROOT / scale.recipe)['batch_size']
    vit, more = (int(scale.num_train * fraction) // batch_size * scale.epochs
                 for fraction in (scale.ablation_fraction, scale.fractions[-1]))
    return (f'Students of the recipe `data_free` have {student:,} updates ({2 * student:,} with twice the epochs), the'
            f' ViTs {vit:,} and {more:,}.')


def table5_notes(scale: Scale) -> List[str]:
    """Return what a reader of table 5 has to know."""
    verified = '' if scale.cnn else ' (before the verifier rejects any)'
    notes = [
        f'DearKD students on {scale.num_synthetic} images synthesised from a CNN{verified}, and on about as many real'
        ' images.',
        *weights_notes(scale),
        "ADI competes with the student of DeepInversion's images.",
        'The paper has no student on as few real images. Its DeiT-Ti on all of ImageNet, without a teacher, has'
        ' 72.2 %.',
        f'{AGREEMENT} The label of a synthetic image is the class that it was made for.']
    if scale.cnn:
        notes += [
            'The images are synthesised from the teacher itself, which has seen all training images; the paper uses two'
            ' CNNs. No image is rejected.',
            'The images resemble the crops that the CNN was trained on, and are cropped again for the student. This may'
            ' widen the gap to real images.']
    if scale.synthetic:
        notes += [
            f'Column "{BY_CLASS}": its recipe was chosen on real images. The label of an image is the class that it was'
            ' made for. The ViTs have this recipe, and no teacher.',
            'Columns `data_free`: this recipe with its two fills and patches of 8x8 pixels, for half of its epochs.'
            f' Rows with "{LONGER[2:]}" have all of them. The default fill, `edge`, is compared with the paper.',
            updates(scale),
            f'{ROUNDS}: at least {scale.num_synthetic // NUM_ROUNDS} images each. The first round is DeepInversion. The'
            f' others compete with the student (fill `{FILLS[0]}`) of all images so far.',
            f'Generators make at least {scale.num_generated} images, up to three of each learned code. Images of one'
            ' code are almost equal. A pilot chooses their weights.']
    return notes


def table5(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return students on synthetic images, and on about as many real ones."""
    recipe = bool(scale.synthetic)  # if there is one, its students are compared with the paper's
    entries = []
    for mode, (label, paper, _) in MODES.items():
        cells = tuple(synthetic_student_cell(scale, mode, seed) for seed in seeds[:2])
        entries += [
            Entry(label, BY_CLASS, cells, None if recipe else paper, 'synthetic'),
            Entry(label, 'teacher agreement', cells, None, 'labels', 'teacher_agreement', 2)]
    real, intra = real_students(scale, seeds), (MODES['intra'][0], BY_CLASS)
    return Table(
        'Data-free (table 5)', '\n'.join(f'- {line}' for line in table5_notes(scale)),
        [*entries, Entry(REAL, BY_CLASS, real, None, 'real'),
         Entry(REAL, 'teacher agreement', real, None, 'labels', 'teacher_agreement', 2),
         *(recipe_entries(scale, seeds) if recipe else [])],
        [*_ordered(BY_CLASS, ' (recipe of table 2)' if recipe else ''),
         Claim('Real images > DF-DearKD', (REAL, BY_CLASS), intra),
         *(recipe_claims() if recipe else [])])


def other_cnn(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return a student of images of a generator, from a CNN of another kind; one seed."""
    name, seed = 'regnety_002', seeds[0]
    fraction = scale.fractions[-1]
    argv = ('-c', scale.recipe, '--model', name, *scale.teacher, '--train-fraction', str(fraction), '--val-interval',
            '1000')
    epochs = int(scale.teacher[scale.teacher.index('--epochs') + 1])
    cnn = Cell(f'other_cnn-{name}', scale.data, argv, scale.num_train * fraction * epochs)
    images = generator_cell(scale, 'generator', seed, cnn)
    row = f'{name}, trained on {100 * fraction:g} % of the images'
    looks = [Entry(row, column, (images,), None, key, key) for column, key in IMAGE_FIGURES.items()]
    students = [Entry(row, f'student, {fill}', (recipe_student(scale, cnn.name, images, fill, seed, cnn),))
                for fill in FILLS]
    return Table(
        'Data-free from a CNN of another kind',
        f'`data_free --generator --num-images {scale.num_generated}` without other flags, and the recipe `data_free`'
        ' with two fills. Nothing was chosen for this CNN.',
        [Entry(row, 'CNN', (cnn,)), *looks, *students])


def set_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """Return a set of images in table 6."""
    if mode == 'rounds':
        return merged_cell(scale, NUM_ROUNDS, seed)
    return (generator_cell if mode in GENERATED else image_cell)(scale, mode, seed)


def distance_cell(scale: Scale, mode: str, seed: int) -> Cell:
    """Return a measurement of the distance between images of a class; real images if there is no mode."""
    need, data = teacher_cell(scale), scale.data  # the teacher may measure the distance
    if mode:
        need = set_cell(scale, mode, seed)
        data = f'/{need.name}'
    return Cell(
        f'distance-{mode or "real"}-seed{seed}', data, scale.diversity, 1000., seed, (need,) if need else (),
        'diversity')


def table6(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the distances between images of a class."""
    metric, is_lpips = 'LPIPS.', '--model' not in scale.diversity
    if not is_lpips:
        cnn = scale.diversity[scale.diversity.index('--model') + 1].strip('{}')
        published = ', '.join(f'{label} {lpips}' for label, _, lpips in MODES.values())
        metric = (f'mean squared distance between features of `{cnn}`. The paper has LPIPS, another distance:'
                  f' {published}, real images {REAL_LPIPS}. So no claim of the paper is tested.')
    sets = {mode: (label, lpips if is_lpips else None) for mode, (label, _, lpips) in MODES.items()}
    if scale.num_generated:
        sets.update(rounds=(ROUNDS, None), **{mode: (label, None) for mode, label in GENERATED.items()})
    entries = [Entry(REAL, 'distance', tuple(distance_cell(scale, '', seed) for seed in seeds),
                     REAL_LPIPS if is_lpips else None, 'real', 'distance', 3)]
    for mode, (label, lpips) in sets.items():
        known = seeds[:2] if mode == 'adi' else seeds  # as in table 5
        entries.append(Entry(label, 'distance', tuple(distance_cell(scale, mode, seed) for seed in known), lpips,
                             'synthetic', 'distance', 3))
        cells = tuple(set_cell(scale, mode, seed) for seed in known)
        entries += [Entry(label, column, cells, None, key, key) for column, key in IMAGE_FIGURES.items()]
        entries.append(Entry(label, 'seconds per image', cells, None, 'time', 'seconds_per_image', 2, interval=False))
    return Table(
        'Diversity (table 6)',
        f'- Distance between two images of a class: {metric}\n- Pixel noise also increases the distance. A larger'
        ' distance means diversity only if the images are recognised as well.\n- An image is recognised if a CNN gives'
        ' its class a probability above 0.5. Its CNN is the one that it was synthesised from. The other CNN was'
        f' trained {"on as many real images" if scale.cnn else "separately"}.\n- Seconds are those of one core, beside'
        ' other programs: a rough figure. The rounds of ADI have none, because students train between them.',
        entries, [
            *_ordered('distance', ': distance'),
            *(Claim(f'Real images > {label}: distance', (REAL, 'distance'), (label, 'distance'))
              for label, *_ in MODES.values())])
