"""Test the claims of a table: 95 % confidence intervals from Student's and Welch's t."""
import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import scipy.stats

from reproduction.results import Figure
from reproduction.table import Key, Table


class Estimate(NamedTuple):
    """A weighted sum of figures with its 95 % confidence interval.

    Args:
        value: The sum.
        margin: Half-width of the interval; NaN if the noise is unknown.
        means: The figures of the sum.
    """
    value: float
    margin: float
    means: Dict[Key, float]

    def text(self, digits: int, sign: str = '+') -> str:
        """Return '+1.2 ± 0.3', or the value alone if the margin is unknown."""
        margin = f' ± {self.margin:.{digits}f}' if math.isfinite(self.margin) else ''
        return f'{round(self.value, digits) + 0.:{sign}.{digits}f}{margin}'  # + 0. turns -0. into 0.


class Finding(NamedTuple):
    """A tested claim: one row of a table of claims.

    Args:
        text: The claim. It holds if the difference is positive.
        paper: The paper's figures, or its statement in words.
        here: The figures that are compared.
        difference: Their difference.
        digits: Decimals of the difference.
        of_paper: Whether the paper makes the claim.
    """
    text: str
    paper: str
    here: str
    difference: Estimate
    digits: int
    of_paper: bool

    @property
    def verdict(self) -> str:
        """Whether the 95 % interval is above 0, below 0, or contains it."""
        if abs(self.difference.value) <= self.difference.margin:
            return 'inconclusive'
        if self.difference.value < 0:
            return '**contradicted**'
        return 'reproduced' if self.of_paper else 'confirmed'


class Noise(NamedTuple):
    """Variance from seed to seed, and its degrees of freedom."""
    variance: float
    degrees: int


def table_of(findings: Dict[str, List[Finding]], first: str = 'claim') -> List[str]:
    """Return the lines of a table of claims, grouped by heading; '' is no heading."""
    lines = [f'| {first} | paper | here | difference, 95 % CI | verdict |', '| --- | --- | --- | --- | --- |']
    for heading, group in findings.items():
        lines += [f'| {heading} |  |  |  |  |'] if heading and group else []
        lines += [f'| {found.text} | {found.paper or "—"} | {found.here} | {found.difference.text(found.digits)} |'
                  f' {found.verdict} |' for found in group]
    return lines


def measure_noise(figures: Sequence[Figure], paired: bool) -> Noise:
    """Pool the variance of several figures over seeds, by least squares; NaN if each figure has one seed.

    Args:
        figures: Each has its own mean.
        paired: Whether a seed shifts all figures by the same amount (a randomised block design).
    """
    observed = [(i, seed, value) for i, figure in enumerate(figures) for seed, value in figure.by_seed.items()]
    blocks = sorted({seed for _, seed, _ in observed}) if paired else []
    values = np.array([value for *_, value in observed])
    design = np.array([
        [float(i == row) for row in range(len(figures))] + [float(seed == block) for block in blocks]
        for i, seed, _ in observed])
    residuals = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    degrees = len(values) - int(np.linalg.matrix_rank(design))
    return Noise(float(residuals @ residuals) / degrees if degrees else math.nan, degrees)


def confidence_margin(variance: float, degrees: float) -> float:
    """Return the half-width of the 95 % interval of an estimate with this variance."""
    return float(scipy.stats.t.ppf(0.975, degrees)) * math.sqrt(variance)


def measure(table: Table, figures: Dict[Key, Figure], factors: Dict[Key, float]) -> Estimate:
    """Estimate a weighted sum of figures of a table, by Welch's t.

    Figures of one noise group are compared on the seeds that they share.
    """
    groups: Dict[str, Dict[Key, Figure]] = {}
    for entry in table.entries:
        key = (entry.row, entry.column)
        if key in figures:
            groups.setdefault(entry.noise, {})[key] = figures[key]
    means, parts = {}, []
    for group in groups.values():
        used = {key: factor for key, factor in factors.items() if key in group}
        if not used:
            continue
        shared = set.intersection(*(set(group[key].by_seed) for key in used))
        paired = math.isclose(sum(used.values()), 0., abs_tol=1e-9) and bool(shared)
        noise = measure_noise(list(group.values()), paired)
        variance = 0.
        for key, factor in used.items():
            by_seed = group[key].by_seed
            values = [by_seed[seed] for seed in shared] if paired else list(by_seed.values())
            means[key] = statistics.mean(values)
            variance += factor ** 2 * noise.variance / len(values)
        parts.append(Noise(variance, noise.degrees))
    value, total = sum(factors[key] * mean for key, mean in means.items()), sum(part.variance for part in parts)
    if not total > 1e-12:  # one seed, or the same figures for all seeds
        return Estimate(value, math.nan, means)
    degrees = total ** 2 / sum(part.variance ** 2 / part.degrees for part in parts)  # Welch-Satterthwaite
    return Estimate(value, confidence_margin(total, degrees), means)


def measure_change(change: Figure) -> Estimate:
    """Estimate the mean of a difference that is known for each seed (a paired t-test)."""
    values = list(change.by_seed.values())
    variance = statistics.variance(values) / len(values) if len(values) > 1 else math.nan
    return Estimate(change.mean, confidence_margin(variance, len(values) - 1), {})


def _compare(values: Sequence[float], digits: int) -> str:
    """Return '80.7 vs. 65.4'; four values are two differences."""
    if len(values) == 4:
        return f'{values[0] - values[1]:+.{digits}f} vs. {values[2] - values[3]:+.{digits}f}'
    return ' vs. '.join(f'{value:.{digits}f}' for value in values)


def judge(table: Table, figures: Dict[Key, Figure]) -> List[Finding]:
    """Test the claims whose figures are known, with more than one seed.

    The paper makes a claim if its own figures agree with it.
    """
    published: Dict[Key, Optional[float]] = {(entry.row, entry.column): entry.paper for entry in table.entries}
    findings = []
    for claim in table.claims:
        if not claim.factors.keys() <= figures.keys():
            continue
        difference, digits = measure(table, figures, claim.factors), figures[claim.higher].digits
        if not math.isfinite(difference.margin):
            continue
        known = [value for value in map(published.get, claim.factors) if value is not None]
        paper, gap = '', 0.
        if len(known) == len(claim.factors):
            gap = sum(factor * value for factor, value in zip(claim.factors.values(), known))
            paper = f'{gap:+.{digits}f} ({_compare(known, digits)})'
        here = _compare([difference.means[key] for key in claim.factors], digits)
        findings.append(Finding(claim.text, paper, here, difference, digits, gap > 0))
    return findings
