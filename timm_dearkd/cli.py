"""One command line for the whole package: `timm-dearkd COMMAND ...`, or `python -m timm_dearkd COMMAND ...`."""
import importlib
import os
import runpy
import sys
from typing import Dict, List, NoReturn, Optional, Sequence, Tuple

# Per group and command: what it does, the module, and the arguments before the user's
COMMANDS: Dict[str, Dict[str, Tuple[str, str, Tuple[str, ...]]]] = {
    'Train': {
        'distill': ('train a student on a folder of images, with a CNN as the teacher', 'api', ()),
        'train': ("train any timm model, with timm's flags", 'train', ()),
        'data-free': ('create training images from a CNN', 'data_free.__main__', ()),
    },
    'Look at runs and models': {
        'report': ('write the HTML page of a run', 'analysis.__main__', ('report',)),
        'compare': ('compare runs', 'analysis.__main__', ('compare',)),
        'app': ('open a local page: drop an image, see classes and attention', 'analysis.__main__', ('app',)),
        'predict': ('classify images', 'analysis.__main__', ('predict',)),
        'attention-map': ('draw where each head looks', 'analysis.__main__', ('attention-map',)),
        'attention-distance': ('measure how far each layer looks', 'analysis.__main__', ('attention-distance',)),
        'throughput': ('measure speed and cost of models', 'analysis.__main__', ('throughput',)),
        'diversity': ('measure how different the images of a class are', 'analysis.__main__', ('diversity',)),
    },
    'Share': {
        'push': ('push a run to the Hugging Face Hub', 'hub', ('push',)),
        'export': ('export a model to ONNX, torch.export or safetensors', 'export', ()),
    },
    'Other': {
        'run': ("run a script, such as timm's validate.py, with the models registered", 'cli', ()),
    },
}


def _help() -> str:
    lines = ['usage: timm-dearkd COMMAND ...', '', 'Train vision transformers from small image sets, with a CNN as the'
             ' teacher.']
    for group, commands in COMMANDS.items():
        lines += ['', f'{group}:', *(f'  {name:<20}{summary}' for name, (summary, _, _) in commands.items())]
    return '\n'.join([*lines, '', 'timm-dearkd COMMAND --help lists the flags of a command.'])


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f'timm-dearkd: error: {message}\n')
    sys.exit(2)


def run_script(argv: Sequence[str]) -> None:
    """Run a Python script as `python SCRIPT` does."""
    if argv and argv[0] in ('-h', '--help'):
        print('usage: timm-dearkd run SCRIPT [ARGUMENT ...]')
        return
    if not argv or not os.path.isfile(argv[0]):
        what = f'no file {argv[0]!r}' if argv else 'no script given'
        _fail(f'{what}. Expected: timm-dearkd run SCRIPT [ARGUMENT ...]')
    sys.argv = list(argv)
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    runpy.run_path(argv[0], run_name='__main__')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run a command; None takes the arguments of the process."""
    arguments: List[str] = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print(_help())
        return
    name, *rest = arguments
    known = {command: entry for commands in COMMANDS.values() for command, entry in commands.items()}
    if name == 'run' or (name not in known and os.path.isfile(name)):
        run_script(rest if name == 'run' else arguments)
        return
    if name not in known:
        _fail(f'no command or script {name!r}. Commands: {", ".join(known)}.')
    _, module, before = known[name]
    importlib.import_module(f'timm_dearkd.{module}').run_script([*before, *rest])
