"""RESULTS.md, out of files."""
import json
import math
import statistics

import pytest
from helpers import SEEDS, t_quantile, write_results

from reproduction.cells import SCALES
from reproduction.report import main, write_report
from timm_dearkd.commands import run_command


def test_the_report_is_made_of_the_files_alone(tmp_path):
    scale = SCALES['small']
    vit, hard, dearkd = 'ViT', 'ViT, hard-label distillation', 'DearKD'
    values = {vit: [60., 62., 61.], hard: [61., 60., 63.5], dearkd: [70., 71., 72.]}
    write_results(tmp_path / 'results', scale, {
        ('table2', row, column): [figure + shift for figure in figures]
        for row, figures in values.items()
        for column, shift in (('1 %', 0.), ('2.5 %', 5.), ('5 %', 6. - (row == vit)))})
    (tmp_path / 'results' / 'vit-0.1-seed0.json').write_text('{"top1": 3')
    write_report(scale, tmp_path / 'results', SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    mean, error = statistics.mean(values[hard]), statistics.stdev(values[hard]) / math.sqrt(3)
    assert f'| {hard} | {mean:.1f} ± {error:.1f} [50.3] | {mean + 5:.1f}' in text
    # the two without the hidden loss are a t-test of pairs: 2 degrees of freedom, for which Student's t has 4.303
    margin = 4.303 * statistics.stdev(a - b for a, b in zip(values[hard], values[vit])) / math.sqrt(3)
    told = '- 1 %: hard labels above the plain ViT: not to be told from the noise, leaning this way'
    assert f'{told} (+0.5 ± {margin:.1f})' in text
    # with it: Welch's t of a variance of 1 with 2 degrees and one pooled from two samples, with 4
    plain, own = (statistics.variance(values[vit]) + statistics.variance(values[hard])) / 2, 1.
    degrees = (plain + own) ** 2 / (plain ** 2 / 4 + own ** 2 / 2)
    assert 5 < degrees < 6
    margin = t_quantile(degrees) * math.sqrt((plain + own) / 3)
    assert f'- 1 %: DearKD above hard labels: holds (+9.5 ± {margin:.1f})' in text
    assert f'DearKD on 2.5 % of the images above the plain ViT on 5 %: holds (+10.0 ± {margin:.1f})' in text
    # the same of four figures, with twice the degrees
    margin = t_quantile(2 * degrees) * math.sqrt((plain + own) * 2 / 3)
    assert f'"DearKD" is further above "ViT" at 1 % than at 5 %: not to be told from the noise, leaning the other way' \
           f' (-1.0 ± {margin:.1f}; +10.0 at 1 %, +10.0 at 2.5 %, +11.0 at 5 %)' in text
    assert '## Ablation (table 1)' in text and '## Recipe' not in text
    assert (tmp_path / 'reproduction' / 'plots' / 'table2.png').stat().st_size > 3000


def test_choices_are_compared_with_the_default(tmp_path):
    write_results(tmp_path, SCALES['small'], {
        ('choices', 'default', 'top-1'): [80., 82.], ('choices', 'alpha 0.25', 'top-1'): [83., 87.]})
    write_report(SCALES['small'], tmp_path, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    # differences of 3 and 5, one degree: 12.706 * sqrt(2) / sqrt(2)
    assert '| alpha 0.25 | 85.0 ± 2.0 (2 seeds) | +4.0 ± 12.7 |' in text
    assert '| default | 81.0 ± 1.0 (2 seeds) |  |' in text


def test_figure4_is_told_in_numbers(tmp_path):
    scale, results = SCALES['small'], tmp_path / 'results'
    rows = ('DearKD', 'DearKD in one stage', 'DearKD, stage I of 50 %, then `ce`')
    write_results(results, scale, {('figure4', row, 'top-1'): [80., 81.] for row in rows})
    for name, further in (('dearkd', 0.), ('mhca_hidden', 0.), ('stage50_ce', 1.)):
        for seed, growth in ((0, 0.1), (1, 0.2)):
            lines = ['epoch,layer,head,patches,pixels']
            for epoch in range(40):
                for layer in range(1, 7):
                    for head in range(2):
                        patches = layer + growth * epoch * (layer < 3) + 0.02 * head + further * (epoch > 19)
                        lines.append(f'{epoch},{layer},{head},{patches},{4 * patches}')
            (results / f'{name}-0.025-seed{seed}.distances.csv').write_text('\n'.join(lines) + '\n')
    write_report(scale, results, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    assert ('after the first epoch 1.01, 2.01, 3.01, 4.01, 5.01, 6.01; after epoch 20 2.91, 3.91, 3.01, 4.01, 5.01,'
            ' 6.01; after epoch 33 4.21, 5.21,') in text
    # seven epochs of 0.1 and of 0.2 in two layers of six, or of the first four; and twenty
    assert 'Change from epoch 33 to the last, a mean over all layers: DearKD 0.350 ± 0.117' in text
    assert 'from epoch 33 to the last, a mean over the first 4 layers, which the CNN teaches: DearKD 0.525' in text
    assert 'Change from epoch 20 to the last, a mean over all layers: DearKD 1.000 ± 0.333' in text
    # one degree of freedom: 12.706 times the error
    assert f'DearKD: the distance grows after stage I, a mean over all layers: not to be told from the noise, leaning' \
           f' this way (+0.350 ± {12.706 * 0.35 / 3:.3f} patches)' in text
    assert 'the same until then, a mean over the first 4 layers, which the CNN teaches: holds (+1.000 ± 0.000' in text
    assert (tmp_path / 'reproduction' / 'plots' / 'figure4-dearkd.png').exists()


def test_the_report_tells_whose_students_are_in_a_table(tmp_path):
    scale = SCALES['small']
    write_results(tmp_path, scale, {
        ('table2', method, column): [70.] for method in ('ViT', 'DearKD') for column in ('1 %', '2.5 %')})

    def report(*teachers):
        for fraction, teacher in zip(('0.01', '0.025'), teachers):
            path = tmp_path / f'dearkd-{fraction}-seed0.json'
            path.write_text(json.dumps({**json.loads(path.read_text()), 'teacher': teacher, 'commits': ['0ab+']}))
        write_report(scale, tmp_path, SEEDS, tmp_path / 'RESULTS.md')
        return (tmp_path / 'RESULTS.md').read_text()

    assert 'the same teacher' not in report('abc', 'abc') and 'of teacher' not in report('abc', 'abc')
    text = report('abc', 'def')
    assert 'Not all of these students have the same teacher. 1 %: abc; 2.5 %: def.' in text
    assert 'teacher abc has 1 of the students, teacher def has 1' in text and '2 files have a "+"' in text


def test_no_report_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run_command('report.py', main, ['--results', str(tmp_path / 'typo'), '--output', str(tmp_path / 'RESULTS.md')])
    assert e.value.code == 2 and 'holds no results of scale small' in capsys.readouterr().err
    assert not (tmp_path / 'RESULTS.md').exists()


def test_another_scale_has_its_own_report(tmp_path):
    write_results(tmp_path / 'results', SCALES['smoke'], {('table2', 'ViT', '5 %'): [50.]})
    write_report(SCALES['smoke'], tmp_path / 'results', SEEDS, tmp_path / 'RESULTS-smoke.md')
    assert 'reproduction/plots/smoke/table2.png' in (tmp_path / 'RESULTS-smoke.md').read_text()
    assert (tmp_path / 'reproduction/plots/smoke/table2.png').exists()
