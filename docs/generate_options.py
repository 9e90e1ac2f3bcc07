"""Write docs/options.md: the flags of train.py, from its parser.

    python docs/generate_options.py
"""
import argparse
from pathlib import Path
from typing import Any

from timm_dearkd.engine.options import build_parser, recipe_names

PATH = Path(__file__).parent / 'options.md'
HEAD = '''# Options of train.py

Names and defaults are timm's, where timm has the flag. Three defaults differ: those of
`--kd-distill-type`, `--device` and `--pin-mem`. Created by `python docs/generate_options.py`.

Every flag can be a line of a YAML file, `-c FILE`: `--weight-decay 0.05` is `weight_decay: 0.05`, a switch is
`amp: true`. The command line wins over the file. `-c NAME` takes a recipe of the package:
{recipes}.
To change one, copy it from `timm_dearkd/recipes` and give the copy.
'''


def format_default(value: Any) -> str:
    """Return a default as code; '' for a switch or an unset flag."""
    if value is None or value is False or value == '' or value in ([], {}):
        return ''
    if isinstance(value, list):
        value = ' '.join(f'{item:.4g}' if isinstance(item, float) else str(item) for item in value)
    return f'`{value}`'


def format_row(action: argparse.Action) -> str:
    """Return the table row of a flag."""
    names = ', '.join(f'`{name}`' for name in action.option_strings) or f'`{action.metavar}`'
    text, _, default = (action.help or '').partition(' (default: ')
    choices = ', '.join(f'`{choice}`' for choice in action.choices or () if choice != '')
    cells = names, f'{text}: {choices}' if choices else text, default[:-1] or format_default(action.default)
    return f'| {" | ".join(cells)} |'


def main() -> str:
    """Return the page."""
    parts = [HEAD.format(recipes=', '.join(f'`{name}`' for name in recipe_names()))]
    for group in build_parser()._action_groups:
        shown = (action for action in group._group_actions if action.help != argparse.SUPPRESS)
        actions = [action for action in shown if action.dest != 'help']
        if actions:
            title = f'## {group.title}\n\n| flag | meaning | default |\n| --- | --- | --- |\n'
            parts.append(title + '\n'.join(map(format_row, actions)) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    PATH.write_text(main(), encoding='utf-8')
