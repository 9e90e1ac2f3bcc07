"""Define the tables of students on real images, and list all tables: cells, the paper's figures, claims."""
from dataclasses import replace
from typing import Callable, Dict, List, Sequence, Tuple

from reproduction.cells import (
    FIGURE4,
    LITE0_TIMM,
    METHODS,
    NO_HIDDEN,
    RPE_DROP,
    SOFT_LABELS,
    STAGE1,
    TABLE2,
    TAUGHT,
    Cell,
    Scale,
    cnn_cell,
    hidden_loss,
    methods,
    student_cell,
    students,
    teacher_cell,
    two_stages,
)
from reproduction.choices import choices, first_choices, recipes
from reproduction.data_free import inversion, other_cnn, table5, table6
from reproduction.table import AGREEMENT, HIDDEN, OWN_CNN, Claim, Entry, Table
from timm_dearkd.engine.schedule import epochs_for
from timm_dearkd.settings import choose_batch_size


def table1(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the ablation."""
    labels = {
        'vit': 'ViT', 'mhca': '+ MHCA', 'hard': '+ hard labels, pooled tokens',
        'mhca_hard': '+ hard labels + MHCA', 'hidden': '+ hard labels + hidden loss',
        'mhca_hidden': '+ hard labels + hidden loss + MHCA', 'dearkd': 'all, in two stages (DearKD)'}
    paper = dict(vit=72.3, mhca=72.5, hard=74.3, hidden=74.1, mhca_hidden=74.6, dearkd=74.8)

    def claim(text: str, higher: str, lower: str) -> Claim:
        return Claim(text, (labels[higher], 'top-1'), (labels[lower], 'top-1'))

    note = (f'Students on {100 * scale.ablation_fraction:g} % of the images. The paper has no row for hard labels with'
            ' MHCA alone. The weight of the hidden loss was chosen for students with MHCA.')
    return Table('Ablation (table 1)', note, [
        Entry(label, 'top-1', students(scale, name, methods(scale)[name], scale.ablation_fraction, seeds),
              paper.get(name), HIDDEN if name in ('hidden', 'mhca_hidden', 'dearkd') else '')
        for name, label in labels.items()
    ], [
        claim('MHCA alone improves the plain ViT', 'mhca', 'vit'),
        claim('Without MHCA: no hidden loss > hidden loss', 'hard', 'hidden'),
        claim('MHCA and the hidden loss improve hard labels', 'mhca_hidden', 'hard'),
        claim('The hidden loss improves hard labels with MHCA', 'mhca_hidden', 'mhca_hard'),
        claim('MHCA improves hard labels with the hidden loss', 'mhca_hidden', 'hidden'),
        claim('Two stages are better than one', 'dearkd', 'mhca_hidden'),
    ])


def table2(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return four methods at four sizes of the training set, the largest with at most two seeds, and two at one."""
    paper: Dict[str, Sequence[float]] = {
        'vit': (40.5, 61.1, 68.3, 72.2), 'hard': (50.3, 64.3, 71.6, 74.5), 'dearkd': (54.3, 67.1, 72.3, 74.8)}
    columns = [f'{100 * fraction:g} %' for fraction in scale.fractions]
    vit, hard, soft, feature, dearkd, dearkd_soft = TABLE2.values()
    claims = []
    for column in columns:
        claims += [
            Claim(f'{column} of the images: hard labels > plain ViT', (hard, column), (vit, column)),
            Claim(f'{column} of the images: DearKD > hard labels', (dearkd, column), (hard, column)),
            Claim(f'{column} of the images: DearKD > plain ViT', (dearkd, column), (vit, column)),
            Claim(f'{column} of the images: soft labels > hard labels', (soft, column), (hard, column)),
            Claim(f'{column} of the images: DearKD > soft labels', (dearkd, column), (soft, column))]
    one_size = f'{100 * scale.ablation_fraction:g} %'
    claims += [
        Claim(f'{one_size} of the images: DearKD > feature distillation', (dearkd, one_size), (feature, one_size)),
        Claim(f'{one_size} of the images: DearKD with soft labels > DearKD', (dearkd_soft, one_size),
              (dearkd, one_size))]
    for fewer, more, shares in zip(columns, columns[1:], zip(scale.fractions, scale.fractions[1:])):
        if shares[1] == 2 * shares[0]:
            claims.append(Claim(
                f'DearKD on {fewer} of the images > plain ViT on {more}', (dearkd, fewer), (vit, more)))
    first, last = columns[0], columns[-1]
    claims += [
        Claim(f'{text} larger on {first} than on {last} of the images', (better, first), (other, first),
              ((better, last), (other, last)))
        for text, better, other in (
            ('Gain of DearKD over plain ViT', dearkd, vit), ('Gain of DearKD over hard labels', dearkd, hard),
            ('Gain of hard labels over plain ViT', hard, vit))]
    return Table(
        'Data efficiency (table 2)',
        'The paper uses 10, 25, 50 and 100 % of ImageNet. Its plain ViT is a DeiT-Ti with 3 heads, and its hard labels'
        ' have their own distillation token. Here all methods have as many attention heads. Hard labels and DearKD'
        ' learn from the pooled tokens. DearKD alone has MHCA; table 1 tells what it adds.\n\n'
        'Soft labels and features are timm\'s `--kd-distill-type logit` (KL divergence, temperature 4) and `feature`'
        ' (pooled features), with timm\'s weights: 1 for each of the two losses. They'
        ' were not tuned; the weights of hard labels and DearKD were (appendix).\n\n'
        'A smaller share has fewer updates, too. "Four times as many epochs" tells few images from few updates.', [
            Entry(label, column, students(
                scale, name, methods(scale)[name], fraction, seeds[:2] if i == 3 else seeds),
                paper[name][i] if name in paper else None, column + (HIDDEN if 'dearkd' in name else ''))
            for name, label in TABLE2.items() for i, (column, fraction) in enumerate(zip(columns, scale.fractions))
            if fraction == scale.ablation_fraction or name not in ('feature', 'dearkd_soft')],
        claims)


def longer(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the smallest training set with four times the epochs, to tell few images from few updates; one seed."""
    share, long = scale.fractions[0], replace(scale, epochs=4 * scale.epochs)
    once = ('--val-interval', str(long.epochs))  # at the end
    entries = []
    for name, label in METHODS.items():
        short_run = students(scale, name, methods(scale)[name], share, seeds[:1])
        long_run = students(long, f'longer-{name}', methods(long)[name] + once, share, seeds[:1])
        entries += [
            Entry(f'{scale.epochs} epochs (table 2)', label, short_run),
            Entry(f'{long.epochs} epochs', label, long_run)]
    return Table(
        'Four times as many epochs',
        f'Students on {100 * share:g} % of the images, where an epoch has the fewest updates.', entries)


def own_teacher_cell(scale: Scale, name: str, argv: Tuple[str, ...], cnn: Cell) -> Cell:
    """Return a student whose teacher, `cnn`, was trained on the student's images alone."""
    cell = student_cell(scale, name, argv, scale.ablation_fraction, cnn.seed)
    argv = tuple(arg.replace('{teacher}', f'{{runs}}/{cnn.name}') for arg in cell.argv)
    return replace(cell, argv=argv, needs=(cnn,))


def own_teacher_students(scale: Scale, method: str, seeds: Sequence[int]) -> Tuple[Cell, ...]:
    """Return such students of a method for several seeds."""
    argv = methods(scale)[method]
    return tuple(own_teacher_cell(scale, f'pupil_{method}', argv, cnn_cell(scale, seed)) for seed in seeds)


def longer_own_students(scale: Scale, seeds: Sequence[int]) -> Dict[str, Tuple[Cell, ...]]:
    """Return DearKD with such a teacher and four times the epochs, in one stage and in two, by name."""
    long = replace(scale, epochs=4 * scale.epochs)
    kinds = {
        'mhca_hidden': methods(long)['mhca_hidden'], 'dearkd': methods(long)['dearkd'],
        'stage50_anneal': two_stages(long, 1 / 2, 'anneal')}
    once = ('--val-interval', str(long.epochs))  # at the end
    return {
        name: tuple(own_teacher_cell(long, name, argv + once, cnn_cell(scale, seed)) for seed in seeds)
        for name, argv in ((f'longer_pupil_{kind}', argv) for kind, argv in kinds.items())}


def distill_cell(
        scale: Scale,
        name: str,
        data: str,
        num_images: float,
        seed: int,
        *argv: str,
        needs: Sequence[Cell] = (),
) -> Cell:
    """Return a student of `timm-dearkd distill` without flags, on a CPU."""
    cost = 1.3 * num_images * epochs_for(round(num_images), round(num_images / 32)) + 2 * scale.num_eval
    return Cell(
        f'defaults_{name}-seed{seed}', data, ('--device', 'cpu', *argv), cost, seed, tuple(needs), 'distill')


def distill_part(scale: Scale, name: str, share: float, seed: int, *argv: str, needs: Sequence[Cell] = ()) -> Cell:
    """Return such a student on a share of the images."""
    return distill_cell(
        scale, f'{name}-{share:g}', scale.data, scale.num_train * share, seed, *argv, '--train-fraction', str(share),
        '--fraction-seed', str(seed), needs=needs)


def long_cnn_cell(scale: Scale, share: float, seed: int) -> Cell:
    """Return the CNN that `distill` trains on a share of grey images, but with as many updates as its student."""
    num_images = round(scale.num_train * share)
    batch_size = choose_batch_size(num_images)
    epochs = epochs_for(num_images, num_images // batch_size)
    argv = (
        '-c', 'recipes/small_folder.yaml', *scale.cnn, '--img-size', '32', '--in-chans', '1', '--mean', '0.5', '--std',
        '0.5', '--hflip', '0', '--batch-size', str(batch_size), '--epochs', str(epochs), '--warmup-epochs',
        str(epochs // 20), '--val-interval', str(epochs), '--train-fraction', str(share), '--fraction-seed', str(seed))
    return Cell(f'patient_cnn-{share:g}-seed{seed}', scale.data, argv, num_images * epochs / 3, seed)


def equal_updates(scale: Scale, seeds: Sequence[int]) -> Tuple[List[Entry], List[Claim]]:
    """Return the students of `distill`, their CNNs, and CNNs with as many updates, at the two smallest sizes."""
    entries, claims = [], []
    for share in scale.fractions[:2]:
        text = f'{100 * share:g} %, `distill`'
        own = tuple(distill_part(scale, 'own', share, seed) for seed in seeds)
        long = tuple(long_cnn_cell(scale, share, seed) for seed in seeds)
        cnn, longer_cnn, student = (
            f'{text}: {row}' for row in ('its CNN', 'this CNN with the updates of the student', 'DearKD'))
        entries += [
            Entry(cnn, 'top-1', own, None, text, 'teacher_top1'), Entry(longer_cnn, 'top-1', long, None, text),
            Entry(student, 'top-1', own, None, f'{text} {HIDDEN}'),
            Entry(student, 'teacher agreement', own, None, f'{text} labels', 'teacher_agreement', 2)]
        claims += [
            Claim(f'{text}: DearKD > its CNN', (student, 'top-1'), (cnn, 'top-1')),
            Claim(f'{text}: DearKD > a CNN with as many updates', (student, 'top-1'), (longer_cnn, 'top-1')),
            Claim(f'{text}: more updates improve the CNN', (longer_cnn, 'top-1'), (cnn, 'top-1'))]
    return entries, claims


def own_teacher(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return students whose teacher was trained on their own images alone, by hand or by `distill`."""
    rows = {
        'ViT': students(scale, 'vit', methods(scale)['vit'], scale.ablation_fraction, seeds),
        'CNN trained on the same images': tuple(cnn_cell(scale, seed) for seed in seeds),
        'ViT, hard labels of this CNN': own_teacher_students(scale, 'hard', seeds),
        'DearKD with this CNN': own_teacher_students(scale, 'dearkd', seeds),
        'DearKD with the CNN trained on all images': students(
            scale, 'dearkd', methods(scale)['dearkd'], scale.ablation_fraction, seeds)}
    vit, cnn, hard, dearkd, _ = ((row, 'top-1') for row in rows)
    entries, claims = equal_updates(scale, seeds) if scale.tuning_data else ([], [])
    note = (
        '\n\nRows with `distill` are `timm-dearkd distill` without flags (recipe `small_folder`), which trains the CNN'
        ' for 0.4 times the epochs of the student. The other CNN differs in the epochs and the warm-up.'
        " It is evaluated on crops of 95 %, the student's CNN on whole images."
        f'\n\n{OWN_CNN}'
    ) if entries else ''
    return Table(
        'A teacher that has seen no more than the student',
        f'Students on {100 * scale.ablation_fraction:g} % of the images. The teacher of the other tables was trained on'
        ' all images. The CNN here has the same architecture, and it was trained on its student\'s images with the'
        f' student\'s recipe and epochs. Nothing was tuned for it. {AGREEMENT}{note}',
        [Entry(row, 'top-1', cells, None, HIDDEN if 'DearKD' in row else 'CNN' if 'trained' in row else '')
         for row, cells in rows.items()]
        + [Entry(row, 'teacher agreement', cells, None, 'labels', 'teacher_agreement', 2)
           for row, cells in rows.items()] + entries, [
            Claim('DearKD > plain ViT', dearkd, vit),
            Claim('DearKD > hard labels of the same CNN', dearkd, hard),
            Claim('DearKD > its teacher', dearkd, cnn), *claims])


def defaults(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return `timm-dearkd distill` without flags, on this data and on two other sets; one seed."""
    seed, first, second = seeds[0], *scale.fractions[:2]
    digits_cnn = Cell('digits_teacher', 'digits', (
        '-c', 'recipes/digits.yaml', '--model', 'test_resnet', '--img-size', '32', '--batch-size', '64',
        '--epochs', '15'), 6e3)
    cnn = [cell for cell in [teacher_cell(scale)] if cell is not None]
    rows = {
        f'{scale.data}, {100 * first:g} %': (
            student_cell(scale, 'dearkd', methods(scale)['dearkd'], first, seed),
            distill_part(scale, 'kept', first, seed, '--teacher', '{teacher}', needs=cnn)),
        f'{scale.data}, {100 * second:g} %': (
            student_cell(scale, 'dearkd', methods(scale)['dearkd'], second, seed),
            distill_part(scale, 'kept', second, seed, '--teacher', '{teacher}', needs=cnn)),
        f'{scale.data}, {100 * second:g} %, no teacher given': (
            *own_teacher_students(scale, 'dearkd', [seed]), distill_part(scale, 'own', second, seed)),
        'digits, 125 images, teacher of 1,257': (None, distill_cell(
            scale, 'digits', 'digits', 125, seed, '--train-split', 'train_10pct', '--teacher',
            f'{{runs}}/{digits_cnn.name}', needs=[digits_cnn])),
        'stamps (colour), 618 images, no teacher given': (None, distill_cell(
            scale, 'stamps', 'stamps', 618, seed))}
    entries = []
    for row, (recipe, cell) in rows.items():
        entries += [Entry(row, f'DearKD, {scale.epochs} epochs', (recipe,))] if recipe else []
        entries += [Entry(row, 'no flags', (cell,)), Entry(row, 'teacher', (cell,), key='teacher_top1')]
    return Table(
        'No flags',
        '`timm-dearkd distill` on a CPU with the data, and the teacher if there is one. Its rules were found on the'
        ' digits of another split, and on images of `fashion_mnist` set aside for tuning. Nothing was tuned on the'
        ' stamps, small drawings and photographs of Tux Paint in 12 classes.\n\n'
        'A given teacher teaches soft labels of mixed images, and the classes of the training images have no effect.'
        " Without a teacher, `distill` trains a CNN on the student's images first, which teaches hard labels beside the"
        ' classes. The first column is DearKD of table 2, or of the table of weak teachers if no teacher is given. It'
        f' has 4x4 patches instead of 8x8, and fewer updates.\n\n{OWN_CNN}',
        entries)


def photo_cell(scale: Scale, name: str, argv: Sequence[str], cost: float, seed: int = 0) -> Cell:
    """Return a run on the image folder, at 64 pixels."""
    argv = ('-c', 'recipes/small_folder.yaml', '--img-size', '64', '--val-interval', '1000', *argv)
    return Cell(f'photos_{scale.photos}_{name}', f'photos/{scale.photos}', argv, cost, seed)


def photos(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return students on any image folder, with an ImageNet CNN as the teacher."""
    cnn = photo_cell(scale, 'cnn', (
        '--model', 'efficientnet_lite0', '--pretrained-path', LITE0_TIMM, '--lr', '2e-4'), 9e4)
    stage2 = ('--dearkd-stage2', 'anneal')
    kinds: Dict[str, Tuple[str, ...]] = {
        'vit': (), 'hard': TAUGHT + NO_HIDDEN + stage2, 'soft': SOFT_LABELS,
        'dearkd': TAUGHT + hidden_loss(('4:3',)) + stage2}

    def student(name: str, fraction: float, seed: int) -> Cell:
        argv = [arg.replace('{teacher}', f'{{runs}}/{cnn.name}') for arg in kinds[name]]
        no_mhca = () if name == 'dearkd' else ('num_mhca_blocks=0',)
        cell = photo_cell(scale, f'{name}-{fraction:g}-seed{seed}', (
            '--model', scale.student, '--model-kwargs', *no_mhca, 'patch_size=8', '--train-fraction', str(fraction),
            '--fraction-seed', str(seed), *argv), 4e4 if fraction < 1 else 9e4, seed)
        return replace(cell, needs=(cnn,) if argv else ())

    columns = {f'{100 * fraction:g} %': fraction for fraction in (0.25, 1.)}
    dearkd = TABLE2['dearkd']
    return Table(
        'A folder of colour images',
        f'The folder `{scale.photos}` at 64x64 pixels; `--photos` takes any other. The CNN was trained on ImageNet and'
        ' fine-tuned on all training images. The students have the recipe `small_folder`, with 8x8 patches. Nothing'
        ' was tuned. Hard labels fade out in the last sixth of the epochs, as in DearKD. The figures are for the'
        ' validation images of this folder. ± tells how much the students vary, not how much other images would.', [
            Entry('EfficientNet-Lite0, fine-tuned', '100 %', (cnn,), None, 'CNN'),
            *(Entry(TABLE2[name], column, tuple(student(name, fraction, seed) for seed in seeds), None,
                    column + (HIDDEN if name == 'dearkd' else ''))
              for column, fraction in columns.items() for name in kinds)],
        [Claim(f'{column} of the images: DearKD > {TABLE2[name]}', (dearkd, column), (TABLE2[name], column))
         for column in columns for name in ('vit', 'hard', 'soft')])


def table7(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the lengths of stage I, with both kinds of stage II."""
    paper = {2 / 3: 74.3, 3 / 4: 74.6, STAGE1: 74.8, 11 / 12: 74.7, 1.: 74.6}
    in_others = {(0., 'ce'): 'mhca', (STAGE1, 'anneal'): 'dearkd', (1., 'anneal'): 'mhca_hidden'}
    entries = []
    for share in (0., 1 / 2, *paper):
        if share in (3 / 4, 11 / 12) and scale.name != 'imagenet':
            continue
        for kind in ('anneal', 'ce'):
            shared = in_others.get((share, kind))
            if share == 1. and kind == 'ce':  # no stage II
                continue
            name = shared or f'stage{100 * share:.0f}_{kind}'
            argv = methods(scale)[shared] if shared else two_stages(scale, share, kind)
            entries.append(Entry(
                f'{100 * share:.0f} %', kind,
                students(scale, name, argv, scale.ablation_fraction, seeds if shared else seeds[:2]),
                paper.get(share) if kind == 'anneal' else None, HIDDEN if share else ''))
    default, one_stage = ('83 %', 'anneal'), ('100 %', 'anneal')  # a claim about these two is in table 1
    return Table(
        'Length of stage I (table 7)',
        f'Students on {100 * scale.ablation_fraction:g} % of the images. Rows: stage I in percent of the epochs.'
        ' Columns: the kind of stage II. 100 % has no stage II, and 0 % with `ce` is MHCA without a teacher. The'
        ' paper\'s figures are for 300 epochs. Its 75 % (74.6) and 92 % (74.7) are run at scale `imagenet` only.',
        entries,
        [Claim(f'Stage I of 83 % (`anneal`) > {entry.row} (`{entry.column}`)', default, (entry.row, entry.column))
         for entry in entries if (entry.row, entry.column) not in (default, one_stage)])


def longer_stages(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return one stage against two, where the teacher is weak and the student has time to outgrow it."""
    shares = dict(longer_pupil_mhca_hidden='100 %', longer_pupil_dearkd='83 %', longer_pupil_stage50_anneal='50 %')
    paper = {'100 %': 74.6, '83 %': 74.8}
    cells = longer_own_students(scale, seeds)
    entries = [Entry(shares[name], 'top-1', runs, paper.get(shares[name]), HIDDEN) for name, runs in cells.items()]
    one, *two = shares.values()
    long = replace(scale, epochs=4 * scale.epochs)
    longer_cnn = tuple(cnn_cell(long, seed, 'longer_cnn', '--crop-pct', '1') for seed in seeds)
    cnns = [
        Entry('its teacher', 'top-1', next(iter(cells.values())), None, 'CNN', 'teacher_top1'),
        Entry(f'the same CNN, {long.epochs} epochs', 'top-1', longer_cnn, None, 'CNN')]
    return Table(
        'Two stages with a weak teacher and four times as many epochs',
        f'DearKD on {100 * scale.ablation_fraction:g} % of the images, {long.epochs} epochs. The teacher was'
        f' trained on the same images for {scale.epochs} epochs. All are evaluated on whole images. Rows: stage I in'
        ' percent of the epochs; 100 % has no stage II. Stage II is `anneal`. The paper\'s figures are for its teacher'
        ' and 300 epochs.',
        [*cnns, *entries],
        [*[Claim(f'Weak teacher, {long.epochs} epochs: stage I of {share} > one stage', (share, 'top-1'),
                 (one, 'top-1')) for share in two],
         *[Claim(f'{long.epochs} epochs: DearKD > {cnn.row}', (two[0], 'top-1'), (cnn.row, 'top-1'))
           for cnn in cnns]])


def figure4(scale: Scale, seeds: Sequence[int]) -> Table:
    """Return the runs whose attention distance is recorded."""
    half = two_stages(scale, 1 / 2, 'ce')
    argv = {**methods(scale), 'stage50_ce': half, 'stage50_ce_rpe_drop': half + RPE_DROP}
    cells = longer_own_students(scale, seeds) if scale.cnn else {}
    for name, arguments in argv.items():
        cells[name] = students(
            scale, name, arguments, scale.ablation_fraction, seeds if name in methods(scale) else seeds[:2])
    longer_note = (
        f' "Longer" runs have {4 * scale.epochs} epochs and a teacher that was trained on the same images.'
    ) if scale.cnn else ''
    return Table(
        'Attention distance over the epochs (figure 4)',
        f'Runs of tables 1, 2 and 7 on {100 * scale.ablation_fraction:g} % of the images; the appendix has each layer.'
        ' One further run has the'
        f' paper\'s dropout of single positional scores; the others have none.{longer_note}',
        [Entry(label, 'top-1', cells[name]) for name, label in FIGURE4.items() if name in cells])


CHOOSING = ('recipes', 'first_choices', 'choices', 'inversion')
TABLES: Dict[str, Callable[[Scale, Sequence[int]], Table]] = {  # in the order of the report
    'table1': table1, 'table2': table2, 'defaults': defaults, 'photos': photos, 'longer': longer, 'table5': table5,
    'table6': table6, 'other_cnn': other_cnn, 'table7': table7, 'own_teacher': own_teacher,
    'longer_stages': longer_stages, 'figure4': figure4, 'recipes': recipes, 'first_choices': first_choices,
    'choices': choices, 'inversion': inversion}


def tables_of(scale: Scale) -> Dict[str, Callable[[Scale, Sequence[int]], Table]]:
    """Return the tables of a scale: no choices without tuning images, no own teacher if timm has its weights."""
    missing = () if scale.tuning_data else (*CHOOSING, 'longer', 'defaults')
    missing += () if scale.cnn else ('own_teacher', 'longer_stages')
    missing += (() if scale.photos else ('photos',)) + (() if scale.num_generated else ('other_cnn',))
    return {name: make for name, make in TABLES.items() if name in (scale.tables or TABLES) and name not in missing}


def collect_cells(scale: Scale, names: Sequence[str], seeds: Sequence[int]) -> List[Cell]:
    """Return the cells of some tables and their dependencies, each once and after its dependencies."""
    wanted: Dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        for need in cell.needs:
            add(need)
        wanted.setdefault(cell.name, cell)

    for name in names:
        for entry in TABLES[name](scale, seeds).entries:
            for cell in entry.cells:
                add(cell)
    return list(wanted.values())
