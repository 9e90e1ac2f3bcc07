"""Command line of the tools: `python -m timm_dearkd.analysis TOOL ...`.

Each tool is a module with `add_arguments` and `run`.
"""
import argparse
import logging
from typing import Optional, Sequence

from timm.utils import setup_default_logging

from timm_dearkd.commands import run_command

from . import app, attention_distance, attention_map, compare, diversity, predict, report, throughput

TOOLS = {
    'app': app, 'attention-distance': attention_distance, 'attention-map': attention_map, 'compare': compare,
    'diversity': diversity, 'predict': predict, 'report': report, 'throughput': throughput,
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command, with a subcommand for each tool."""
    parser = argparse.ArgumentParser(prog='timm-dearkd', description='Measure data sets and models')
    subparsers = parser.add_subparsers(dest='tool', metavar='TOOL', required=True)
    for name, tool in TOOLS.items():
        summary = (tool.__doc__ or '').splitlines()[0]
        tool.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    TOOLS[args.tool].run(args)


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; an error is one line and status 2."""
    run_command(build_parser().prog, main, argv)


if __name__ == '__main__':
    run_script()
