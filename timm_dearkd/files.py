"""Atomic writes: readers never see half a file."""
import contextlib
import csv
import io
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: under a temporary name, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def create_file(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it exists. Of several processes, the first one writes it."""
    if path.exists():
        return
    complete = path.with_name(f'.{path.name}.{os.getpid()}.new')
    write_bytes(complete, content)
    try:
        os.link(complete, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(complete, path)
    complete.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` in the end, unless another process was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as temporary:
        content = Path(temporary, 'content')
        content.mkdir()
        yield content
        if not folder.exists():
            os.replace(content, folder)


def find_obstacle(path: Path) -> Optional[Path]:
    """Return the file or the read-only folder that prevents writing into a folder; None if nothing does."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return None if place.is_dir() and os.access(place, os.W_OK) else place


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a CSV file, under the columns of its header.

    If the row has new columns, the file is rewritten with these columns at the end, empty in earlier rows.
    """
    columns: List[str] = []
    rows: List[Dict[str, str]] = []
    if path.exists():
        with open(path, newline='') as file:
            reader = csv.DictReader(file, restval='')
            columns, rows = list(reader.fieldnames or ()), list(reader)
    if set(row) <= set(columns):
        with open(path, 'a', newline='') as file:
            csv.DictWriter(file, columns).writerow(row)
    else:
        columns += [name for name in row if name not in columns]
        write_table(path, [columns, *([entry.get(name, '') for name in columns] for entry in (*rows, row))])


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically. The first row is the header."""
    text = io.StringIO(newline='')
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())
