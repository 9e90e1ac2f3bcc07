"""What a table of the report is."""
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Tuple

from reproduction.cells import Cell

__all__ = ['HIDDEN', 'Claim', 'Entry', 'Table']

HIDDEN = 'hidden loss'  # an entry's noise: figures with it vary far less from seed to seed than those without


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the mean over the seeds of its cells.

    Args:
        row: Label.
        column: Label.
        cells: One for each seed.
        paper: The paper's figure, on ImageNet.
        noise: Figures of a table with the same word here differ from seed to seed by about as much.
        key: Of the figure in the cell's result.
        digits: That it is printed with.
    """
    row: str
    column: str
    cells: Tuple[Cell, ...]
    paper: Optional[float] = None
    noise: str = ''
    key: str = 'top1'
    digits: int = 1


class Claim(NamedTuple):
    """That one figure is above another, each named by row and column."""
    text: str
    higher: Tuple[str, str]
    lower: Tuple[str, str]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: Heading.
        note: What a reader has to know of it.
        entries: Its figures.
        claims: What is expected of them.
        reference: Row that the others are compared with.
    """
    title: str
    note: str
    entries: List[Entry]
    claims: List[Claim] = field(default_factory=list)
    reference: str = ''
