"""Claims and their intervals, by hand and by simulation."""
import math

import numpy as np
import pytest
from helpers import SEEDS, t_quantile, write_results

from reproduction import significance
from reproduction.cells import SCALES
from reproduction.results import Figure, Results
from reproduction.table import Claim, Entry, Table
from reproduction.tables import TABLES


def test_verdicts():
    def judge(*rows, noise='a'):
        entries = [Entry(row, 'top-1', (), noise=word) for row, word in zip('abcd', (noise, 'a', 'a', 'a'))]
        figures = {(row, 'top-1'): Figure(dict(enumerate(v)), 1) for row, v in zip('abcd', rows)}
        table = Table('', '', entries, [Claim('x', ('a', 'top-1'), ('b', 'top-1'))])
        return ' '.join(significance.judge(table, figures))

    assert judge([65.], [60.]) == ''
    # differences of a seed 14, 12 and 13: a mean of 13 and a deviation of 1; 95 % of t with 2 degrees is 4.30
    assert 'x: holds (+13.0 ± 2.5)' in judge([74., 66., 76.], [60., 54., 63.])
    assert 'x: **does not hold, the other way round** (-13.0 ± 2.5)' in judge([60., 54., 63.], [74., 66., 76.])
    assert 'x: not to be told from the noise, leaning this way (+2.0 ± 2.5)' in judge([63., 55., 65.], [60., 54., 63.])
    # "a" and "b" share one seed, which is where they are compared; the other rows tell of the noise: residuals of 0.5
    # with one degree, 12.71
    assert f'(-5.0 ± {12.706 * math.sqrt(2):.1f})' in judge([15.], [20., 24.], [10., 12.])
    # other noise, so not paired: two that differ by 2 each; a degree each is two together
    assert f'(+7.0 ± {4.30 * math.sqrt(2):.1f})' in judge([66., 68.], [59., 61.], noise='b')
    assert 'nan' not in judge([66.], [59.], noise='b') + judge([66., 68.], [59.], noise='b') + judge([5., 5.], [4., 4.])


def test_intervals_hold_for_95_percent():
    """Of simulated tables like ours: seeds that move the rows without the hidden loss, and quiet rows with it."""
    rng = np.random.default_rng(0)
    loud, quiet = ('vit', 'mhca', 'hard', 'mhca_hard'), ('hidden', 'mhca_hidden', 'dearkd')
    table = Table('', '', [Entry(row, '', (), noise='quiet' if row in quiet else '') for row in loud + quiet])
    pairs = (('hard', 'vit'), ('dearkd', 'hard'), ('dearkd', 'mhca_hidden'))
    missed = dict.fromkeys(pairs, 0)
    for _ in range(200):
        seed_effects = rng.normal(0, 1.7, 3)
        figures = {(row, ''): Figure(dict(enumerate(
            rng.normal(0, 0.15, 3) if row in quiet else seed_effects + rng.normal(0, 0.8, 3))), 1)
            for row in loud + quiet}
        for higher, lower in pairs:
            gap = significance.measure(table, figures, {(higher, ''): 1., (lower, ''): -1.})
            missed[higher, lower] += abs(gap.value) > gap.margin
    # binomial with 200 and 5 %: 10 with a deviation of 3.1; across groups more, as the loud rows share their seeds
    assert all(2 <= missed[pair] <= 20 for pair in (pairs[0], pairs[2])) and 2 <= missed[pairs[1]] <= 30


def test_only_what_is_alike_shares_its_noise(tmp_path):
    """Students on real images differ by less than those on synthetic ones, whose noise would hide it."""
    scale, modes = SCALES['small'], ('DeepInversion', 'ADI', 'DF-DearKD (intra-divergence)')
    write_results(tmp_path, scale, {
        **{('table5', mode, 'top-1'): [50., 60.] for mode in modes},
        ('table5', 'real images', 'top-1'): [85., 86., 87.]})
    table, real = TABLES['table5'](scale, SEEDS), ('real images', 'top-1')
    figures = Results(scale, tmp_path, SEEDS).figures(table)
    gap = significance.measure(table, figures, {real: 1., (modes[2], 'top-1'): -1.})
    # variances of 1 and 50, of three seeds and two, with 2 and 3 degrees
    degrees = (1 / 3 + 25) ** 2 / ((1 / 3) ** 2 / 2 + 25 ** 2 / 3)
    margin = t_quantile(degrees) * math.sqrt(1 / 3 + 25)
    assert gap.value == pytest.approx(31) and gap.margin == pytest.approx(margin)
