"""The tables of images that are made out of a CNN."""
from typing import Dict, List, Sequence, Tuple

from reproduction.cells import (
    Cell,
    Scale,
    adi_weights,
    cnn_cell,
    intra_weights,
    methods,
    students,
    teacher_cell,
    training_cost,
)
from reproduction.table import Claim, Entry, Table
from timm_dearkd.data_free.inversion import LossWeights

__all__ = ['inversion', 'table5', 'table6']

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
    cost = num_images * (80. if mode == 'adi' else 40.)
    return Cell(name, data, (*argv, *weights), cost, seed, tuple(needs), 'data_free')


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
        ' The paper has none on as many real images; its DeiT-Ti on all of ImageNet, without a teacher, is at 72.2.'
        ' To the right: the share of the augmented images whose label, the class that they were made for, the teacher'
        ' finds.')
    if scale.cnn:
        note += (
            ' The CNN is the teacher too, where the paper has two, and no image is left out. Images are made to look'
            ' like the crops that the CNN was trained on, and are cropped once more for the student, which may widen'
            ' the gap to real ones.')
    return Table(
        'Data-free (table 5)', note,
        [*entries, Entry(REAL, 'top-1', real, None, 'real'),
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
