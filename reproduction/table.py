"""Describe a table of the report: its figures and the claims about them."""
from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Tuple

from reproduction.cells import Cell

HIDDEN = 'hidden loss'  # noise group: students with the hidden loss vary far less from seed to seed
OWN_CNN = (
    'For a CNN that `distill` trains, the figure is that of its best epoch on the test images, which is the one that'
    ' teaches. For its student, the figure is that of the last epoch. This favours the CNN. A teacher is'
    ' measured on the images as its student sees them.')
AGREEMENT = 'Teacher agreement: the share of the augmented images whose label the teacher predicts.'
Key = Tuple[str, str]  # row and column


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the mean over the seeds of its cells.

    Args:
        row: Label of the row.
        column: Label of the column.
        cells: One cell per seed.
        paper: The paper's figure on ImageNet.
        noise: Name of the group of figures whose standard deviation over seeds is pooled.
        key: Name of the figure in the result of a cell.
        digits: Decimals to print.
        interval: Print the confidence interval.
    """
    row: str
    column: str
    cells: Tuple[Cell, ...]
    paper: Optional[float] = None
    noise: str = ''
    key: str = 'top1'
    digits: int = 1
    interval: bool = True


class Claim(NamedTuple):
    """Statement that one figure is higher than another.

    Args:
        text: The statement.
        higher: Row and column of the figure that should be higher.
        lower: Row and column of the other figure.
        than: Two more figures: the statement is that the first difference is larger than theirs.
    """
    text: str
    higher: Key
    lower: Key
    than: Optional[Tuple[Key, Key]] = None

    @property
    def factors(self) -> Dict[Key, float]:
        """Factors of the figures, in order, whose weighted sum should be above 0."""
        signs = {self.higher: 1., self.lower: -1.}
        return {**signs, self.than[0]: -1., self.than[1]: 1.} if self.than else signs


class Decision(NamedTuple):
    """A choice, for the appendix of the report.

    Args:
        what: The setting.
        table: Name of the table with the figures.
        column: Column of the figures.
        options: Row of each option, by the value to print.
        taken: The value taken.
        why: The reason.
    """
    what: str
    table: str
    column: str
    options: Dict[str, str]
    taken: str
    why: str


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: Heading.
        note: Markdown text above the table.
        entries: The figures.
        claims: Statements to test.
        reference: Row that the other rows are compared with.
    """
    title: str
    note: str
    entries: List[Entry]
    claims: List[Claim] = field(default_factory=list)
    reference: str = ''
