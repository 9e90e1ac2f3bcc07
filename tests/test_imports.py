"""One direction of imports: train.py, tools and engine, models, distill_hooks."""
import pytest
from conftest import run_forked

IMPORTS = """import importlib, pkgutil, sys
for name in {names}:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, '__path__', [])):
        importlib.import_module(name + '.' + module.name)
print(*sorted(sys.modules))"""


@pytest.mark.parametrize('names, not_imported', [
    (['distill_hooks'], {'timm_dearkd'}),
    (['timm_dearkd.engine'], {'timm_dearkd.analysis', 'timm_dearkd.train', 'timm_dearkd.hub'}),
    (['timm_dearkd.distances', 'timm_dearkd.models'], {'timm_dearkd.engine', 'timm_dearkd.analysis'}),
])
def test_nothing_imports_upwards(names, not_imported):
    result = run_forked('-c', IMPORTS.format(names=names))
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split())
    assert set(names) <= imported and not not_imported & imported
