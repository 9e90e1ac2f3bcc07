"""The lines of a check as tables. Needs the standard library alone."""
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterable, List

from . import PHASES

BEGIN, END = '<!-- gpu-check: begin -->', '<!-- gpu-check: end -->'
Line = Dict[str, Any]


def phase_file(folder: Path, number: int) -> Path:
    """File of a phase's lines; those of a second run without cuDNN are in it too."""
    return folder / f'phase{number}.jsonl'


def read_lines(folder: Path) -> List[Line]:
    """All lines of a folder, in order. A last line that a kill cut off is dropped.

    Raises:
        FileNotFoundError: If there are none.
    """
    lines: List[Line] = []
    for phase in PHASES:
        path = phase_file(folder, phase.number)
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:
                lines.append(dict(
                    kind='error', phase=phase.number, variant='', name='a line', reason='it was cut off in writing'))
    if not lines:
        raise FileNotFoundError(f'{folder} has no phase*.jsonl. Run benchmarks/gpu_check.py --out {folder} first.')
    return lines


def environment_of(lines: Iterable[Line]) -> Dict[str, Any]:
    """Describe the machine of the phases.

    Raises:
        ValueError: If they ran on several cards or versions.
    """
    found = [line['environment'] for line in lines if line['kind'] == 'start']
    for other in found[1:]:
        different = [key for key in found[0] if found[0][key] != other.get(key)]
        if different:
            raise ValueError(f'The phases do not belong together: they differ in {", ".join(different)}.')
    return found[0] if found else {}


def is_toy(lines: Iterable[Line]) -> bool:
    return any(line.get('toy') for line in lines if line['kind'] == 'start')


def has_cudnn_failure(lines: Iterable[Line]) -> bool:
    """Whether attention by cuDNN raised an error, was wrong, or ended the phase."""
    before: Line = {}
    for line in lines:
        ended = line.get('status') in ('died', 'cut off') and before.get('cudnn') == 'started'
        if ended or line.get('cudnn_failed'):
            return True
        before = line
    return False


def passes(lines: List[Line]) -> bool:
    """Whether all phases ended, without an error, and no figure failed. Repetitions without cuDNN may be skipped."""
    started = {(line['phase'], line['variant']) for line in lines if line['kind'] == 'start'}
    ended = {(line['phase'], line['variant']) for line in lines if line['kind'] == 'status'
             and line['status'] == 'complete'}
    skipped = any(line['kind'] == 'status' and line['status'] == 'skipped' and not line['variant'] for line in lines)
    failed = any(line['kind'] == 'error' or line.get('ok') is False for line in lines)
    return bool(started) and started <= ended and not failed and not skipped


def _figure(value: Any) -> str:
    return 'not finite' if value is None else f'{value:.4g}'


def _details(details: Dict[str, Any]) -> str:
    """The details of a row in one cell."""
    parts = []
    for key, value in details.items():
        if isinstance(value, dict):
            inner = ', '.join(
                f'{name} {_figure(v) if isinstance(v, (int, float)) else v}'
                for name, v in value.items() if v is not None)
            parts += [f'{key}: {inner}'] if inner else []
        elif value not in (None, '', []):
            parts.append(f'{key}: {_figure(value) if isinstance(value, float) else value}')
    return '; '.join(parts).replace('|', '\\|')


def _row(line: Line, with_details: bool) -> List[str]:
    kind = line['kind']
    if kind == 'row':
        verdict = {True: 'pass', False: '**FAIL**', None: ''}[line['ok']]
        cells = [line['name'], f'{_figure(line["value"])} {line["unit"]}'.strip(), line['expected'], verdict]
        details = _details(line['details'])
    else:
        cells = [line['name'], '', '', 'skipped' if kind == 'skip' else '**error**']
        details = line['reason'].replace('|', '\\|')
    return [*cells, *([details] if with_details or kind != 'row' else [''])]


def _status(lines: List[Line]) -> str:
    """Return how a phase ended."""
    statuses = [line for line in lines if line['kind'] == 'status']
    if not statuses:
        return 'cut off: the check itself was stopped'
    last = statuses[-1]
    seconds = f', {last["seconds"]:.0f} s' if last.get('seconds') else ''
    return last['status'] + (f' ({last["reason"]})' if last.get('reason') else '') + seconds


def render(lines: List[Line], with_details: bool = False) -> str:
    """Tables in Markdown, one per phase."""
    environment = environment_of(lines)
    out = ['; '.join(f'{key} {value}' for key, value in environment.items() if value)]
    if is_toy(lines):
        out.append('\nToy size: the speeds say nothing, and are not judged.')
    titles = {phase.number: phase.title for phase in PHASES}
    runs = list(dict.fromkeys((line['phase'], line['variant']) for line in lines))
    for number, variant in runs:
        own = [line for line in lines if (line['phase'], line['variant']) == (number, variant)]
        title = f'{number}. {titles[number]}{f", {variant}" if variant else ""}'
        out.append(f'\n### {title}\n\nStatus: {_status(own)}.')
        table = [_row(line, with_details) for line in own if line['kind'] in ('row', 'skip', 'error')]
        if table:
            out.append('\n| what | figure | expected | result | details |\n| --- | --- | --- | --- | --- |')
            out += [f'| {" | ".join(cells)} |' for cells in table]
    return '\n'.join(out) + '\n'


def write(text: str, path: Path) -> None:
    """Put the tables between the marks of a document; a file without them becomes the tables alone."""
    section = f'{BEGIN}\n\n{text}\n{END}'
    document = path.read_text() if path.exists() else ''
    if BEGIN in document and END in document:
        pattern = re.compile(f'{re.escape(BEGIN)}.*?{re.escape(END)}', re.DOTALL)
        document = pattern.sub(lambda match: section, document, count=1)
    else:
        document = section + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document)
