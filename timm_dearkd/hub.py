"""Push a run to the Hugging Face Hub, with a model card.

    python -m timm_dearkd.hub push output/train/student --repo org/name [--private] [--dry-run]
"""
import argparse
import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
from pathlib import Path, PureWindowsPath
from typing import Any, List, Optional, Sequence, Tuple

import timm
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError

from distill_hooks.checkpoint import training_args
from distill_hooks.errors import one_line
from timm_dearkd.analysis.compare import drawn_columns, plot_runs
from timm_dearkd.analysis.figures import render
from timm_dearkd.analysis.runs import Run, open_run, why_no_model
from timm_dearkd.attention import ConvAttention
from timm_dearkd.commands import run_command
from timm_dearkd.engine.image_folder import IMAGE_MODES
from timm_dearkd.engine.options import build_config_parser
from timm_dearkd.engine.options import build_parser as build_train_parser
from timm_dearkd.engine.run_folder import save_folder
from timm_dearkd.files import write_bytes, write_text
from timm_dearkd.weights import HubError, hub_errors

CITATION = '''@inproceedings{chen2022dearkd,
  title={DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers},
  author={Chen, Xianing and Cao, Qiong and Zhong, Yujie and Zhang, Jing and Gao, Shenghua and Tao, Dacheng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}'''


CARD = """---
{metadata}
---

# {title}

{kind} image classifier for [timm](https://github.com/huggingface/pytorch-image-models), trained with timm-dearkd.

{facts}

## Results

{best}

![Accuracy and losses by epoch](curves.png)

## How to use it

Install timm-dearkd from a clone of its repository; it is not on PyPI yet:

```sh
pip install PATH_TO_CLONE
```

```python
import timm, timm_dearkd
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open('photo.jpg').convert('{mode}')
probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)
```
{commands}{citation}"""


def model_card(run: Run, model: Any, repo: str) -> ModelCard:
    """Build the model card of a run.

    Args:
        run: The run.
        model: The trained model.
        repo: Name of the repository, ORG/NAME.
    """
    title, best = repo.split('/')[-1], _best(run)
    is_dearkd = any(isinstance(module, ConvAttention) for module in model.modules()) or 'train_stage' in run.columns
    metadata = ModelCardData(
        license=model.pretrained_cfg.get('license'), library_name='timm',
        pipeline_tag='image-classification', metrics=['accuracy'],
        tags=['image-classification', 'timm', *(['dearkd', 'knowledge-distillation'] if is_dearkd else [])],
        model_name=title, eval_results=_results(run))
    commands = '\n'.join(_public_command(session['command']) for session in run.info.get('sessions', ()))
    return ModelCard(CARD.format(
        metadata=metadata.to_yaml(), title=title, kind='A DearKD' if is_dearkd else 'An', repo=repo,
        facts='\n'.join(f'- **{key}:** {value}' for key, value in _facts(run, model) if value not in (None, '')),
        best=f'Best {run.metric.replace("_", " ")}: {best[1]:.2f}, after epoch {best[0]}.' if best else '',
        mode=run.args.get('input_img_mode') or IMAGE_MODES[model.pretrained_cfg['input_size'][0]],
        commands=f'\n## Training\n\n```sh\n{commands}\n```\n' if commands else '',
        citation=f'\n## Citation\n\n```bibtex\n{CITATION}\n```\n' if is_dearkd else ''))


def _data_name(run: Run) -> str:
    """Return the name of the data set, without directories."""
    args = run.args
    place = args.get('data_dir') or args.get('data') or 'images'
    split = Path(place, 'split.json')  # of `distill`, which names the folder of the images
    if split.is_file():
        place = json.loads(split.read_text(encoding='utf-8')).get('source') or place
    kind = _without_folders(args.get('dataset') or '')
    return _last_part(place) if not kind or kind.endswith('/') else kind


def _best(run: Run) -> Optional[Tuple[int, float]]:
    """Return the best epoch and its metric; None if there is none, or if it was measured on the training images."""
    return None if run.info.get('data', {}).get('validation_is_training') else run.best()


def _results(run: Run) -> Optional[List[EvalResult]]:
    """Return the best top-1 for the metadata; None if the run does not have it."""
    best = _best(run)
    if not best or run.metric != 'eval_top1':
        return None
    name = f'{_data_name(run)}, {_last_part(run.args.get("val_split") or "validation")} split'
    return [EvalResult(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=name, metric_type='accuracy',
        metric_name='top-1', metric_value=round(best[1] / 100, 4))]


def _facts(run: Run, model: Any) -> List[Tuple[str, Any]]:
    """Return keys and values about the model, the data and the training."""
    args, cfg = run.args, model.pretrained_cfg
    rate = f'lr {args["lr"]}' if args.get('lr') is not None else f'lr-base {args.get("lr_base")}'
    return [
        ('Model', _architecture(str(args.get('model'))) or cfg.get('architecture')),
        ('Parameters', f'{sum(p.numel() for p in model.parameters()):,}'),
        ('Data', _data_name(run)),
        ('Training images', run.info.get('data', {}).get('train_images')),
        ('Classes', model.num_classes),
        ('Image size', ' x '.join(map(str, cfg['input_size']))),
        ('Teacher', _teacher(run)),
        ('Epochs', run.num_done if run.state == 'finished' else f'{run.state}, not finished'),
        *_stages(run),
        ('Optimizer', f'{args.get("opt")}, {rate}, weight decay {args.get("weight_decay")}, {_batch(run)}')]


def _batch(run: Run) -> str:
    """Return the images per update in words, or only the batch size if they differ or are not recorded."""
    args, processes = run.args, run.info.get('environment', {}).get('processes')
    if not processes or args.get('train_batch_sizes'):
        return f'batch size {args.get("batch_size")}'
    return f'{args["batch_size"] * (args.get("grad_accum_steps") or 1) * processes} images per update'


def _last_part(path: str) -> str:
    """Return the last part of a POSIX or Windows path."""
    return PureWindowsPath(path).name


def _without_folders(word: str) -> str:
    """Strip directories from a word with a path from `/`, `~`, `.` or a drive."""
    start = r'(?:~|\.{1,2}|[A-Za-z]:)?[/\\]'
    return re.sub(
        rf'(^|=|:|[a-z]+/)({start}.*)$', lambda match: match[1] + _last_part(match[2]), word, flags=re.DOTALL)


class _Values(argparse.Namespace):
    """Parsed options, with all values of options that are repeated."""

    def __init__(self) -> None:
        vars(self)['values'] = []

    def __setattr__(self, name: str, value: Any) -> None:
        self.values.append((name, value))
        super().__setattr__(name, value)


def _given_paths(words: Sequence[str]) -> List[str]:
    """Return the values of the path options in the words of a train.py command."""
    parsers = build_config_parser(), build_train_parser()
    options = {action.dest for parser in parsers for action in parser._actions if action.metavar in ('FILE', 'DIR')}
    options |= {'model', 'kd_model_name', 'train_split', 'val_split', 'experiment'}  # names that may be paths
    given, rest = _Values(), list(words)
    for parser in parsers:
        _, rest = parser.parse_known_args(rest, given)
    overlays = [value for name, value in given.values if name == 'pretrained_cfg_overlay']
    files = [str(overlay['file']) for overlay in overlays if 'file' in overlay]
    return [value for name, value in given.values if name in options and value] + files


def _public_command(command: str) -> str:
    """Strip directories from a train.py command, so that cards show no private paths."""
    words = shlex.split(command)
    scripts = ('train.py', 'timm_dearkd.train', 'timm-dearkd')
    start = next((place for place, word in enumerate(words, 1) if word in scripts), 0)
    start += words[start:start + 1] == ['train']
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            paths = _given_paths(words[start:])
    except SystemExit:  # options of another version
        paths = [word.rpartition('=')[2] for word in words]
    paths = [path.removeprefix('local-dir:') for path in paths if not path.startswith(('hf-hub:', 'hf_hub:'))]
    paths = sorted((path for path in paths if '/' in path or '\\' in path), key=len, reverse=True)
    shown = []
    for word in words:
        path = next((path for path in paths if word.endswith(path)), None)
        shown.append(word.removesuffix(path) + _last_part(path) if path else _without_folders(word))
    return shlex.join(shown)


def _teacher(run: Run) -> str:
    """Describe the teacher by architecture and accuracy, without its path."""
    name = str(run.args.get('kd_model_name') or '')
    if not name:
        return 'none'
    text = _architecture(name) or 'a model whose architecture is not recorded'
    results = run.info.get('results')
    top1 = results.get('teacher_top1') if isinstance(results, dict) else None
    return f'{text}, top-1 {top1:.2f} %' if isinstance(top1, (int, float)) else text


def _architecture(name: str) -> Optional[str]:
    """Return the timm or Hub name of a model, folder or checkpoint; None if unknown."""
    if name.startswith(('hf-hub:', 'hf_hub:')) or timm.is_model(name):
        return name
    path = Path(name.removeprefix('local-dir:'))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((path / 'config.json').read_text())['architecture'])
    checkpoints = [path] if path.is_file() else sorted(path.glob('*.pth.tar'))
    return next((args['arch'] for args in map(training_args, map(str, checkpoints)) if 'arch' in args), None)


def _stages(run: Run) -> List[Tuple[str, str]]:
    """Return keys and values about the length of the stages."""
    if not run.args.get('kd_model_name') or 'train_stage' not in run.columns:
        return []
    start = run.stage2_start
    if start is None:
        return [('Stage I', f'{run.num_done} epochs')]
    kind = run.args.get('dearkd_stage2')
    return [('Stage I', f'{start} epochs'), ('Stage II', f'{run.num_done - start} epochs, {kind}')]


def prepare_folder(run_folder: str, folder: Path, repo: str, license: Optional[str] = None) -> None:
    """Write the folder that is pushed: weights, `config.json`, model card and curves.

    Args:
        run_folder: Output folder of train.py.
        folder: Folder to write, which is replaced.
        repo: Name of the repository, ORG/NAME.
        license: Licence of the weights, by the Hub's name; None takes the one in `config.json`, if any.

    Raises:
        FileNotFoundError: If the run does not exist.
        ValueError: If the run has no model yet, or `repo` is not ORG/NAME.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise ValueError(f'--repo {repo!r} is not the name of a Hub repository. Expected ORG/NAME.')
    run = open_run(run_folder)
    if not (run.folder / 'config.json').exists():
        raise ValueError(f'{run_folder!r} has no model: {why_no_model(run.folder)}.')
    try:
        model: Any = timm.create_model(f'local-dir:{run.folder}', pretrained=True)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as e:
        raise ValueError(f'The model in {run_folder!r} cannot be loaded: {one_line(e)}') from e
    if license:
        model.pretrained_cfg['license'] = license
    temporary = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_folder(model, temporary)
        write_text(temporary / 'README.md', model_card(run, model, repo).content)
        if columns := drawn_columns([run]):
            write_bytes(temporary / 'curves.png', render(plot_runs([run], columns)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push(run_folder: str, repo: str, private: bool = False, license: Optional[str] = None) -> str:
    """Push a run to the Hub in one commit. Creates the repository if necessary.

    Args:
        run_folder: Output folder of train.py.
        repo: Name of the repository, ORG/NAME.
        private: Create a private repository, and do not push to a public one.
        license: Licence of the weights, by the Hub's name; None takes the one in `config.json`, if any.

    Returns:
        URL of the repository.

    Raises:
        HubError: If the Hub refuses the push or cannot be reached.
        ValueError: See `prepare_folder`.
    """
    folder = Path(run_folder) / 'hub'
    prepare_folder(run_folder, folder, repo, license)
    api = HfApi(library_name='timm-dearkd')
    with hub_errors(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise HubError(
                f'{repo!r} exists and is public. Make it private on its page, or push without --private.')
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f'Add {Path(run_folder).name}')
    return str(url)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = argparse.ArgumentParser(
        prog='timm-dearkd', description='Share models on the Hugging Face Hub')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    add = commands.add_parser('push', help='push a run').add_argument
    add('run', metavar='RUN', help='output folder of train.py')
    add('--repo', required=True, metavar='ORG/NAME', help='repository, created if necessary')
    add('--private', action='store_true', help='create a private repository; do not push to a public one')
    add('--license', metavar='NAME', help="Hub's name of the weights' licence (default: from config.json)")
    add('--dry-run', action='store_true', help='only write the folder to push, RUN/hub')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    hub_logging.set_verbosity_error()  # it logs every attempt
    logging.getLogger('timm').setLevel(logging.WARNING)
    if args.dry_run:
        folder = Path(args.run) / 'hub'
        prepare_folder(args.run, folder, args.repo, args.license)
        print(folder)
    else:
        print(push(args.run, args.repo, args.private, args.license))


def run_script(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; an error is one line and status 2."""
    run_command(build_parser().prog, main, argv)


if __name__ == '__main__':
    run_script()
