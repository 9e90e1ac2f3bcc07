"""Hold the claims of a table against its figures, as far as their noise lets them be told."""
import math
import statistics
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
import scipy.stats

from reproduction.cells import METHODS
from reproduction.results import Figure, Key
from reproduction.table import Table

__all__ = ['Gap', 'judge', 'judge_change', 'judge_growth', 'measure']

def t_quantile(degrees: float) -> float:
    """Return the two-sided 95 % quantile of Student's t."""
    return float(scipy.stats.t.ppf(0.975, degrees))


class Gap(NamedTuple):
    """A difference, and half of its 95 % interval; not a number where nothing is known of the noise."""
    value: float
    margin: float

    def verdict(self, digits: int) -> str:
        """Whether it is above 0, where there is a margin."""
        if abs(self.value) > self.margin:
            return 'holds' if self.value > 0 else '**does not hold, the other way round**'
        if not round(self.value, digits):
            return 'not to be told from the noise'
        return f'not to be told from the noise, leaning {"this way" if self.value > 0 else "the other way"}'

    def text(self, digits: int) -> str:
        margin = f' ± {self.margin:.{digits}f}' if math.isfinite(self.margin) else ''
        return f'{round(self.value, digits) + 0.:+.{digits}f}{margin}'  # + 0. makes a -0 a 0


class Noise(NamedTuple):
    """Variance of a figure from seed to seed, and its degrees of freedom."""
    variance: float
    degrees: int


def measure_noise(figures: Sequence[Figure], paired: bool) -> Noise:
    """That of figures that are alike, by least squares; not a number where all have but one seed.

    Args:
        figures: Each has a mean of its own.
        paired: Each seed has an effect of its own too, the same on all figures (a randomised block design).
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


def measure(table: Table, figures: Dict[Key, Figure], factors: Dict[Key, float]) -> Gap:
    """A sum of a table's means with factors, by Welch's t.

    Figures that are alike are compared by the seeds that they share.
    """
    alike: Dict[str, Dict[Key, Figure]] = {}
    for entry in table.entries:
        key = (entry.row, entry.column)
        if key in figures:
            alike.setdefault(entry.noise, {})[key] = figures[key]
    value, parts = 0., []
    for group in alike.values():
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
            value += factor * statistics.mean(values)
            variance += factor ** 2 * noise.variance / len(values)
        parts.append(Noise(variance, noise.degrees))
    total = sum(part.variance for part in parts)
    if not total > 1e-12:  # nothing is known, or the figures are the same in all seeds
        return Gap(value, math.nan)
    degrees = total ** 2 / sum(part.variance ** 2 / part.degrees for part in parts)  # Welch and Satterthwaite
    return Gap(value, t_quantile(degrees) * math.sqrt(total))


def judge(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """The claims, held against the figures, as far as their noise is known."""
    lines = []
    for claim in table.claims:
        if claim.higher in figures and claim.lower in figures:
            gap = measure(table, figures, {claim.higher: 1., claim.lower: -1.})
            if math.isfinite(gap.margin):
                digits = figures[claim.higher].digits
                lines.append(f'- {claim.text}: {gap.verdict(digits)} ({gap.text(digits)}).')
    return lines


def judge_change(text: str, change: Figure, unit: str) -> List[str]:
    """The claim that a change by seed is above 0, by a t-test of pairs; none without two of them."""
    if len(change.by_seed) < 2 or change.error is None:
        return []
    gap = Gap(change.mean, t_quantile(len(change.by_seed) - 1) * change.error)
    return [f'- {text}: {gap.verdict(change.digits)} ({gap.text(change.digits)} {unit}).']


def judge_growth(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """Whether a method is further above another at the smallest size than at the largest."""
    vit, hard, dearkd = METHODS.values()
    lines = []
    for better, other in ((dearkd, vit), (dearkd, hard), (hard, vit)):
        columns = [column for row, column in figures if row == better and (other, column) in figures]
        if len(columns) < 2:
            continue
        first, last = columns[0], columns[-1]
        gap = measure(table, figures, {
            (better, first): 1., (other, first): -1., (better, last): -1., (other, last): 1.})
        if not math.isfinite(gap.margin):
            continue
        listed = ', '.join(f'{figures[better, c].mean - figures[other, c].mean:+.1f} at {c}' for c in columns)
        lines.append(f'- In points, "{better}" is further above "{other}" at {first} than at {last}: {gap.verdict(1)}'
                     f' ({gap.text(1)}; {listed}).')
    return lines
