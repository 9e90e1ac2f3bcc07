"""RESULTS.md, from files."""
import json
import math
import re
import statistics

import pytest
from helpers import SEEDS, t_quantile, write_results

from reproduction import figure4
from reproduction.cells import ROOT, SCALES
from reproduction.report import main, update_readme, write_report
from reproduction.results import RESULTS, Results, weights_hash
from reproduction.tables import CHOOSING
from timm_dearkd.commands import run_command


def rows_of(text):
    """The rows of all tables of claims, by section."""
    rows, section, inside = {}, '', False
    for line in text.splitlines():
        section = line[3:] if line.startswith('## ') else section
        if re.match(r'\| (claim|our comparison) \| paper \| here \| difference, 95 % CI \| verdict \|', line):
            inside = True
        inside = inside and line.startswith('|')
        if inside and not line.startswith(('| ---', '| claim', '| our comparison', '| **')):
            rows.setdefault(section, []).append([cell.strip() for cell in line.strip('|').split('|')])
    return rows


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp('report') / 'RESULTS.md'
    with pytest.MonkeyPatch.context() as patch:  # plots take seconds, and other tests draw them
        patch.setattr(figure4, 'plot_over_epochs', lambda *_: None)
        patch.setattr(figure4, 'render', lambda _: b'')
        write_report(SCALES['small'], RESULTS / 'small', SEEDS, output)
    return output.read_text()


@pytest.mark.skipif(not weights_hash(RESULTS / 'small' / 'teacher'), reason='a source archive has no teacher weights')
def test_results_md_is_what_the_script_writes(report):
    assert report == (ROOT / 'RESULTS.md').read_text()
    for line in report.splitlines():
        assert line.startswith(('|', '![')) or len(line) < 600, line  # five lines of 120


def test_the_table_of_the_readme_is_that_of_table_2(tmp_path, report):
    """An outdated table is replaced by the rows of RESULTS.md without the paper's figures; the rest stays."""
    readme = (ROOT / 'README.md').read_text()
    before, table, after = re.split(r'(?<=begin -->\n)|(?=<!-- results: end)', readme)
    (tmp_path / 'README.md').write_text(before + 'outdated\n' + after)
    update_readme(tmp_path / 'README.md', Results(SCALES['small'], RESULTS / 'small', SEEDS))
    assert (tmp_path / 'README.md').read_text() == readme
    assert len(table.splitlines()) >= 5
    section = report.split('## Data efficiency (table 2)')[1]
    assert all(line in re.sub(r' \[[\d.]+\]', '', section) for line in table.splitlines())


def has_noise(seeds, paired):
    """Whether figures with these seeds have a degree of freedom left: one for each mean, one for each further seed."""
    used = len(seeds) + (len(set(sum(seeds, []))) - 1 if paired else 0)
    return sum(map(len, seeds)) > used


def test_every_claim_of_the_tables_is_a_row_with_its_verdict(report):
    """The paper's claims are in the first table, and only those; a verdict is the sign of what is in the row."""
    rows, found = rows_of(report), Results(SCALES['small'], RESULTS / 'small', SEEDS)
    first, count = rows.pop(''), 0
    for table in found.tables.values():
        figures = {(e.row, e.column): found.figure(e) for e in table.entries}
        paper = {(e.row, e.column): e.paper for e in table.entries}
        noise = {(e.row, e.column): e.noise for e in table.entries}
        groups = {}  # the seeds of all figures that share their noise
        for key, figure in figures.items():
            groups.setdefault(noise[key], []).extend([list(figure.by_seed)] if figure else [])
        for claim in table.claims:
            if not all(figures[key] for key in claim.factors):
                continue
            if not all(has_noise(groups[group], [noise[key] for key in claim.factors].count(group) % 2 == 0)
                       for group in {noise[key] for key in claim.factors}):
                continue  # judged when its cells have been run with more seeds
            count += 1
            published = not claim.than and paper[claim.higher] and paper[claim.lower] and (
                paper[claim.higher] > paper[claim.lower])
            known = first if claim.than or published else rows[table.title]
            assert any(row[0] == claim.text for row in known), claim.text
            if published:
                assert len(figures[claim.higher].by_seed) > 1
                row, = (row for row in first if row[0] == claim.text and f'({paper[claim.higher]:.1f}' in row[1]
                        or row[0] == claim.text and f'({paper[claim.higher]:.3f}' in row[1])
                assert float(row[1].split()[0]) == pytest.approx(paper[claim.higher] - paper[claim.lower], abs=1e-9)
    assert sum(row[1] == 'grows in stage II' for row in first) == 2
    names = ('stage50_ce', 'stage50_ce_rpe_drop', 'mhca_hidden', 'longer_pupil_dearkd', 'longer_pupil_mhca_hidden',
             'longer_pupil_stage50_anneal')
    distances = {name: {path.name for path in (RESULTS / 'small').glob(f'{name}-*.distances.csv')} for name in names}
    distances = {name: {file.rpartition('-')[2] for file in files} for name, files in distances.items()}
    shared = [seeds for name, seeds in distances.items() if 'mhca' not in name]  # after stage I
    shared += [distances[f'{long}{kind}'] & distances[f'{long}mhca_hidden']  # against one stage
               for long, kind in (('', 'stage50_ce'), ('longer_pupil_', 'stage50_anneal'))]
    compared = 2 * sum(len(seeds) > 1 for seeds in shared)  # all layers, and the first
    assert len(rows['Attention distance over the epochs (figure 4)']) == compared
    assert len(first) + sum(map(len, rows.values())) == 2 + compared + count
    counts = dict.fromkeys(('reproduced', 'contradicted', 'inconclusive'), 0)
    for section, group in {'': first, **rows}.items():
        for *_, difference, verdict in group:
            value, margin = map(float, difference.split(' ± '))
            good = 'confirmed' if section else 'reproduced'
            allowed = {good} if value > margin else {'**contradicted**'} if value < -margin else {'inconclusive'}
            if abs(value) == margin:  # rounded
                allowed = {good, '**contradicted**', 'inconclusive'}
            assert verdict in allowed
            counts[verdict.strip('*')] = counts.get(verdict.strip('*'), 0) + (not section)
    assert f'Of {len(first)} claims of the paper, {counts["reproduced"]} are reproduced, {counts["contradicted"]}' \
           f' contradicted and {counts["inconclusive"]} inconclusive' in report.splitlines()[2]


def test_choices_are_in_the_appendix_with_their_options(report):
    body, appendix = report.split('## Appendix: choices')
    found = Results(SCALES['small'], RESULTS / 'small', SEEDS)
    for name, table in found.tables.items():
        if name in ('photos', 'other_cnn', 'longer_stages') and not found.figures(table):  # has not been run
            continue
        assert (f'### {table.title}' in appendix) == (name in CHOOSING) != (f'## {table.title}' in body)
    choices = [line for line in appendix.split('###')[0].splitlines() if line.startswith('| ')][2:]
    assert len(choices) == 14
    for line in choices:
        options, taken, why = (cell.strip() for cell in line.strip('|').split('|')[1:])
        assert re.fullmatch(r'(.+: \d+\.\d)(; .+: \d+\.\d)+', options) and why
        assert taken in [option.rpartition(': ')[0] for option in options.split('; ')]


def test_the_report_is_made_of_the_files_alone(tmp_path):
    scale = SCALES['small']
    vit, hard, dearkd = 'ViT', 'ViT, hard-label distillation', 'DearKD'
    values = {vit: [60., 62., 61.], hard: [61., 60., 63.5], dearkd: [70., 71., 72.]}
    write_results(tmp_path / 'results', scale, {
        ('table2', row, column): [figure + shift for figure in figures]
        for row, figures in values.items()
        for column, shift in (('1 %', 0.), ('2.5 %', 5.), ('5 %', 6.), ('10 %', 6. - (row == vit)))})
    (tmp_path / 'results' / 'vit-0.05-seed0.json').write_text('{"top1": 3')
    write_report(scale, tmp_path / 'results', SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    # the two without the hidden loss share a variance with 4 degrees of freedom, for which Student's t has 2.776
    mean = statistics.mean(values[hard])
    plain, own = (statistics.variance(values[vit]) + statistics.variance(values[hard])) / 2, 1.
    margin = 2.776 * math.sqrt(plain / 3)
    assert f'| {hard} | {mean:.1f} ± {margin:.1f} [50.3] | {mean + 5:.1f} ± {margin:.1f} [64.3]' in text
    # their difference is a t-test of pairs: 2 degrees, 4.303
    margin = 4.303 * statistics.stdev(a - b for a, b in zip(values[hard], values[vit])) / math.sqrt(3)
    assert ('| 1 % of the images: hard labels > plain ViT | +9.8 (50.3 vs. 40.5) | 61.5 vs. 61.0 |'
            f' +0.5 ± {margin:.1f} | inconclusive |') in text
    # with the hidden loss: Welch's t of a variance of 1 with 2 degrees and the pooled one with 4
    degrees = (plain + own) ** 2 / (plain ** 2 / 4 + own ** 2 / 2)
    assert 5 < degrees < 6
    margin = t_quantile(degrees) * math.sqrt((plain + own) / 3)
    assert ('| 1 % of the images: DearKD > hard labels | +4.0 (54.3 vs. 50.3) | 71.0 vs. 61.5 |'
            f' +9.5 ± {margin:.1f} | reproduced |') in text
    # 10 % has two seeds: 65 and 67 for the ViT, 76 and 77 for DearKD
    assert '## Ablation (table 1)' in text and '### Recipes' not in text
    row, = (line for line in text.splitlines() if line.startswith('| Gain of DearKD over plain ViT'))
    assert '| +11.2 (+13.8 vs. +2.6) | +10.0 vs. +10.5 | -0.5 ± ' in row and row.endswith('| inconclusive |')
    assert (tmp_path / 'reproduction' / 'plots' / 'table2.png').stat().st_size > 3000


def test_choices_are_compared_with_the_default(tmp_path):
    write_results(tmp_path, SCALES['small'], {
        ('choices', 'default', 'top-1'): [80., 82.], ('choices', 'alpha 0.25', 'top-1'): [83., 87.]})
    write_report(SCALES['small'], tmp_path, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    # a pooled variance of 5 with two degrees: 4.303; differences of 3 and 5, one degree: 12.706
    margin = 4.303 * math.sqrt(5 / 2)
    assert f'| alpha 0.25 | 85.0 ± {margin:.1f} | +4.0 ± 12.7 |' in text
    assert f'| default | 81.0 ± {margin:.1f} |  |' in text
    assert '| alpha, DearKD | 0.5: 81.0; 0.25: 85.0 | 0.5 |' in text


def test_figure4_is_told_in_numbers(tmp_path):
    scale, results = SCALES['small'], tmp_path / 'results'
    rows = ('DearKD', 'DearKD in one stage', 'DearKD, stage I of 50 %, then `ce`', 'DearKD, longer')
    write_results(results, scale, {('figure4', row, 'top-1'): [80., 81.] for row in rows})
    for name, further, epochs in (
            ('dearkd', 0., 40), ('mhca_hidden', 0., 40), ('stage50_ce', 1., 40), ('longer_pupil_dearkd', 0., 160)):
        for seed, growth in ((0, 0.1), (1, 0.2)):
            lines = ['epoch,layer,head,patches,pixels']
            for epoch in range(epochs):
                for layer in range(1, 7):
                    for head in range(2):
                        patches = layer + growth * epoch * (layer < 3) + 0.02 * head + further * (epoch > 19)
                        lines.append(f'{epoch},{layer},{head},{patches},{4 * patches}')
            (results / f'{name}-0.025-seed{seed}.distances.csv').write_text('\n'.join(lines) + '\n')
    write_report(scale, results, SEEDS, tmp_path / 'RESULTS.md')
    text = (tmp_path / 'RESULTS.md').read_text()
    # a mean growth of 0.15 an epoch in the first two layers
    assert '| DearKD | 1 | 1.01 | 2.01 | 3.01 | 4.01 | 5.01 | 6.01 |' in text
    assert '| DearKD | 20 | 3.86 | 4.86 | 3.01 | 4.01 | 5.01 | 6.01 |' in text
    # seven epochs of 0.1 and of 0.2 in two layers of six, or of the first four; and twenty. One degree: 12.7062
    few, many = 12.7062 * 0.35 / 3, 12.7062 / 3
    assert (f'| DearKD | 2 | +1.000 ± {many:.3f} | +1.500 ± {1.5 * many:.3f} | +0.350 ± {few:.3f} |'
            f' +0.525 ± {1.5 * few:.3f} |') in text
    # four times the epochs: 80 in the last half, 27 after stage I
    assert '| DearKD, longer | 80 | 12.86 | 13.86 | 3.01 | 4.01 | 5.01 | 6.01 |' in text
    assert f'| DearKD, longer | 2 | +4.000 ± {4 * many:.3f} | +6.000 ± {6 * many:.3f} |' in text
    first, ours = rows_of(text)[''], rows_of(text)['Attention distance over the epochs (figure 4)']
    assert [row[2:] for row in first] == [
        ['5.460 vs. 5.110', f'+0.350 ± {few:.3f}', 'inconclusive'],
        ['5.435 vs. 4.910', f'+0.525 ± {1.5 * few:.3f}', 'inconclusive']]
    assert ['11.460 vs. 10.110', f'+1.350 ± {1.35 * many:.3f}', 'inconclusive'] in [row[2:] for row in ours]
    assert ['6.435 vs. 5.435', '+1.000 ± 0.000', 'confirmed'] in [row[2:] for row in ours]
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

    assert 'the same teacher' not in report('abc', 'abc') and 'taught' not in report('abc', 'abc')
    text = report('abc', 'def')
    assert 'Not all students have the same teacher (1 %: abc; 2.5 %: def).' in text
    assert 'Other weights of the same recipe (abc) taught 1 student, in: ' in text and '2 files have a "+"' in text


def test_no_report_without_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run_command('report.py', main, ['--results', str(tmp_path / 'typo'), '--output', str(tmp_path / 'RESULTS.md')])
    assert e.value.code == 2 and 'holds no results of scale small' in capsys.readouterr().err
    assert not (tmp_path / 'RESULTS.md').exists()


def test_another_scale_has_its_own_report(tmp_path):
    for name in ('smoke', 'cifar10'):  # the latter has no figure 4
        write_results(tmp_path / name, SCALES[name], {('table2', 'ViT', '5 %'): [50.]})
        write_report(SCALES[name], tmp_path / name, SEEDS, tmp_path / f'RESULTS-{name}.md')
        assert f'reproduction/plots/{name}/table2.png' in (tmp_path / f'RESULTS-{name}.md').read_text()
        assert (tmp_path / f'reproduction/plots/{name}/table2.png').exists()
