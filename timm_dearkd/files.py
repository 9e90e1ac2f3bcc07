"""Files that are whole under their name at any moment."""
import csv
import io
import os
from pathlib import Path
from typing import Any, Iterable, Sequence

__all__ = ['write_bytes', 'write_table', 'write_text']


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """`write_bytes` for rows of a CSV file, the header first."""
    text = io.StringIO(newline='')
    csv.writer(text).writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_text(folder: str, name: str, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(Path(folder) / name, text.encode())
