"""Claims and their intervals, by hand and by simulation."""
import math

import numpy as np
import pytest
import scipy.stats
from helpers import SEEDS, t_quantile, write_results

from reproduction import significance
from reproduction.cells import SCALES
from reproduction.results import Figure, Results
from reproduction.table import Claim, Entry, Table
from reproduction.tables import TABLES


def estimate(*rows, noise='a'):
    entries = [Entry(row, 'top-1', (), noise=word) for row, word in zip('abcd', (noise, 'a', 'a', 'a'))]
    figures = {(row, 'top-1'): Figure(dict(enumerate(v)), 1) for row, v in zip('abcd', rows)}
    table = Table('', '', entries, [Claim('x', ('a', 'top-1'), ('b', 'top-1'))])
    return [(found.here, found.difference.text(1), found.verdict) for found in significance.judge(table, figures)]


def test_verdicts():
    assert estimate([65.], [60.]) == []
    # differences of a seed 14, 12 and 13: a mean of 13 and a deviation of 1; 95 % of t with 2 degrees is 4.30
    assert estimate([74., 66., 76.], [60., 54., 63.]) == [('72.0 vs. 59.0', '+13.0 ± 2.5', 'confirmed')]
    assert estimate([60., 54., 63.], [74., 66., 76.]) == [('59.0 vs. 72.0', '-13.0 ± 2.5', '**contradicted**')]
    assert estimate([63., 55., 65.], [60., 54., 63.]) == [('61.0 vs. 59.0', '+2.0 ± 2.5', 'inconclusive')]
    # "a" and "b" share one seed, which is where they are compared; the other rows tell of the noise: residuals of 0.5
    # with one degree, 12.71
    assert estimate([15.], [20., 24.], [10., 12.])[0][:2] == ('15.0 vs. 20.0', f'-5.0 ± {12.706 * math.sqrt(2):.1f}')
    # other noise, so not paired: two that differ by 2 each; a degree each is two together
    assert estimate([66., 68.], [59., 61.], noise='b')[0][1] == f'+7.0 ± {4.30 * math.sqrt(2):.1f}'
    for found in (estimate([66.], [59.], noise='b'), estimate([66., 68.], [59.], noise='b'),
                  estimate([5., 5.], [4., 4.])):
        assert not found


def test_intervals_are_those_of_scipy():
    """Paired and Welch's t-tests of two figures, and a single mean."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(70, 1, 5), rng.normal(69, 3, 5)
    keys = ('a', 'top-1'), ('b', 'top-1')
    figures = {key: Figure(dict(enumerate(map(float, values))), 1) for key, values in zip(keys, (a, b))}

    def table(*noise):
        return Table('', '', [Entry(*key, (), noise=word) for key, word in zip(keys, noise)])

    factors = dict(zip(keys, (1., -1.)))
    for noise, test in (
            (('', ''), scipy.stats.ttest_rel(a, b)),
            (('', 'other'), scipy.stats.ttest_ind(a, b, equal_var=False))):
        found, (low, high) = significance.measure(table(*noise), figures, factors), test.confidence_interval(0.95)
        assert (found.value - found.margin, found.value + found.margin) == pytest.approx((low, high))
    low, high = scipy.stats.ttest_1samp(a, 0).confidence_interval(0.95)
    for found in (significance.measure(table('', 'other'), figures, {keys[0]: 1.}),
                  significance.measure_change(figures[keys[0]])):
        assert (found.value - found.margin, found.value + found.margin) == pytest.approx((low, high))


def test_the_paper_makes_a_claim_that_its_figures_agree_with():
    for paper, expected in (
            (72.5, ('+0.2 (72.5 vs. 72.3)', 'reproduced')), (72., ('-0.3 (72.0 vs. 72.3)', 'confirmed')),
            (None, ('', 'confirmed'))):
        table = Table('', '', [Entry('a', '', (), paper), Entry('b', '', (), 72.3)], [Claim('x', ('a', ''), ('b', ''))])
        figures = {('a', ''): Figure({0: 5., 1: 6.}, 1), ('b', ''): Figure({0: 1., 1: 2.1}, 1)}
        found, = significance.judge(table, figures)
        assert (found.paper, found.verdict) == expected and found.of_paper == (expected[1] == 'reproduced')


def test_intervals_hold_for_95_percent():
    """Simulated tables like ours: seeds shift the rows without the hidden loss; rows with it vary little."""
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
        **{('table5', mode, 'recipe of table 2'): [50., 60.] for mode in modes},
        ('table5', 'Real images', 'recipe of table 2'): [85., 86., 87.]})
    table, real = TABLES['table5'](scale, SEEDS), ('Real images', 'recipe of table 2')
    figures = Results(scale, tmp_path, SEEDS).figures(table)
    gap = significance.measure(table, figures, {real: 1., (modes[2], 'recipe of table 2'): -1.})
    # variances of 1 and 50, of three seeds and two, with 2 and 3 degrees
    degrees = (1 / 3 + 25) ** 2 / ((1 / 3) ** 2 / 2 + 25 ** 2 / 3)
    margin = t_quantile(degrees) * math.sqrt(1 / 3 + 25)
    assert gap.value == pytest.approx(31) and gap.margin == pytest.approx(margin)
