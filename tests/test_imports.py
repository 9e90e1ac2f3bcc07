"""One direction of imports, as the source files have them, inside functions too."""
import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Iterator, Tuple

ROOT = Path(__file__).parent.parent
# Each room may import those of the lines above
LEVELS = [
    {'distill_hooks'},
    {'_version', 'files', 'rel_pos', 'weights'},
    {'attention', 'commands'},
    {'distances', 'models'},
    {'__init__'},
    {'engine'},
    {'images'},
    {'settings'},
    {'analysis'},
    {'data_free', 'export', 'hub'},
    {'train'},
    {'planning'},
    {'api'},
    {'cli'},
    {'__main__'},
]
# `timm_dearkd.distill` is loaded when it is asked for
LAZY = {('timm_dearkd/__init__.py', 'timm_dearkd.api')}
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def find_room(module: str) -> str:
    """The room of a module of ours; '' for any other."""
    package, _, rest = module.partition('.')
    if package == 'distill_hooks':
        return package
    return (rest.partition('.')[0] or '__init__') if package == 'timm_dearkd' else ''


def imported_modules(path: Path) -> Iterator[str]:
    """Names of all modules that a source file imports; those that it imports names from, with the names, too."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join([*parts[:-node.level], *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                full = ROOT / base.replace('.', '/') / alias.name
                is_module = full.with_suffix('.py').exists() or full.is_dir()
                yield f'{base}.{alias.name}' if is_module else base


def find_upward_imports() -> Iterator[Tuple[str, str]]:
    for path in sorted(path for package in ('timm_dearkd', 'distill_hooks') for path in (ROOT / package).rglob('*.py')):
        own = find_room('.'.join(path.relative_to(ROOT).with_suffix('').parts))
        for module in imported_modules(path):
            room = find_room(module)
            if room and room != own and LEVEL[room] >= LEVEL[own]:
                yield str(path.relative_to(ROOT)), module


def test_nothing_imports_upwards():
    assert set(find_upward_imports()) == LAZY


def test_no_modules_import_each_other():
    """Whichever is imported first."""
    graph = {}
    for path in (path for package in ('timm_dearkd', 'distill_hooks') for path in (ROOT / package).rglob('*.py')):
        module = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
        lazy = {name for file, name in LAZY if path == ROOT / file}
        graph[module] = {name for name in imported_modules(path) if find_room(name)} - {module} - lazy
    try:
        TopologicalSorter(graph).prepare()
        circle = []
    except CycleError as e:
        circle = e.args[1]
    assert circle == []


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    """Also one inside a function."""
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    for name in ('engine/data.py', 'hub.py', 'models.py'):
        (tmp_path / 'timm_dearkd' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'timm_dearkd' / name).touch()
    (tmp_path / 'timm_dearkd' / 'models.py').write_text('def f():\n    from .hub import push\n    import timm')
    (tmp_path / 'timm_dearkd' / 'engine' / 'data.py').write_text('from .. import hub, models\n')
    assert sorted(find_upward_imports()) == [
        ('timm_dearkd/engine/data.py', 'timm_dearkd.hub'), ('timm_dearkd/models.py', 'timm_dearkd.hub')]


def test_the_names_are_registered_without_the_engine():
    code = 'import sys, timm_dearkd; print(*sys.modules)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rooms = {find_room(module) for module in result.stdout.split()} - {''}
    assert rooms <= {'__init__', '_version', 'attention', 'models', 'rel_pos', 'weights'} and 'models' in rooms
