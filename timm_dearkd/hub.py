"""Models on the Hugging Face Hub: push a run with its model card, and get weights that are what was pushed.

    python -m timm_dearkd.hub push output/train/student --repo org/name [--private] [--dry-run]
    python -m timm_dearkd.hub pull org/name
"""
import argparse
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import re
import shlex
import shutil
from pathlib import Path, PureWindowsPath
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import timm
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split

import timm_dearkd  # noqa: F401  registers the architectures
from distill_hooks.teacher import training_args
from timm_dearkd.analysis.compare import drawn_columns, plot_runs
from timm_dearkd.analysis.figures import render
from timm_dearkd.analysis.runs import Run, open_run, why_no_model
from timm_dearkd.attention import ConvAttention
from timm_dearkd.commands import run_command
from timm_dearkd.engine.options import build_config_parser
from timm_dearkd.engine.options import build_parser as build_train_parser
from timm_dearkd.engine.output import save_folder
from timm_dearkd.files import write_bytes

__all__ = ['HubError', 'download_weights', 'locate_weights', 'model_card', 'prepare_folder', 'pull', 'push']

NAMESPACE_VARIABLE = 'TIMM_DEARKD_HUB'
CITATION = '''@inproceedings{chen2022dearkd,
  title={DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers},
  author={Chen, Xianing and Cao, Qiong and Zhong, Yujie and Zhang, Jing and Gao, Shenghua and Tao, Dacheng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}'''


# Errors before a connection is made, by the names that the HTTP libraries of huggingface_hub give them
_UNREACHABLE = {
    'ConnectError', 'ConnectTimeout', 'ProxyError', 'NewConnectionError', 'NameResolutionError', 'gaierror',
    'ConnectionRefusedError', 'OfflineModeIsEnabled'}


class HubError(OSError):
    """What the Hub can't do, in a line, with what to do about it."""


def _split(repo: str) -> Tuple[str, Optional[str]]:
    """Name and revision."""
    if repo.count('@') > 1:
        raise HubError(f'{repo!r} is not the name of a Hub repository. Expected ORG/NAME, or ORG/NAME@REVISION.')
    return hf_split(repo)


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into a `HubError` of one line."""
    try:
        yield
    except HubError:
        raise
    except Exception as e:
        chain: List[BaseException] = [e]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.EROFS, errno.EDQUOT):
            raise HubError(f'{e}. Make room for the cache of the Hub, or set HF_HOME to another folder.') from e
        modules = {cls.__module__.partition('.')[0] for error in chain for cls in type(error).__mro__}
        if not isinstance(e, OSError) and not modules & {'huggingface_hub', 'httpx', 'httpx2', 'httpcore', 'requests'}:
            raise
        statuses = [getattr(getattr(error, 'response', None), 'status_code', None) for error in chain]
        status = next((status for status in statuses if status is not None), None)
        names = {cls.__name__ for error in chain for cls in type(error).__mro__}
        is_offline = bool(names & _UNREACHABLE)
        raise HubError(f'{repo!r} at {constants.ENDPOINT}: {_explain(e, status, is_offline)}') from e


def _explain(error: Exception, status: Optional[int], is_offline: bool) -> str:
    """Say in one line what went wrong, and what to do."""
    reason = ' '.join(str(error).split())
    if isinstance(error, HFValidationError):
        return 'that is not the name of a Hub repository. Expected ORG/NAME.'
    if isinstance(error, GatedRepoError):
        return 'it asks for permission. Ask for it on its page, and log in with `hf auth login`.'
    if isinstance(error, RevisionNotFoundError):
        return 'it has no such revision. Check what is behind the @.'
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            'it does not exist, or is private, or you are not logged in. Check the name, and log in with'
            ' `hf auth login` or by HF_TOKEN.')
    if status == 403:
        return 'the token has no right to do that (403). Make one with write access.'
    if status is not None and status >= 500:
        return f'the Hub answers with an error of its own ({status}). Try again later.'
    if isinstance(error, LocalEntryNotFoundError):
        return 'it can not be reached, and is not in the cache. Check the connection, or unset HF_HUB_OFFLINE.'
    if isinstance(error, EntryNotFoundError):
        return f'it is no timm model, for a file is missing. {reason}'
    if status is not None:
        return f'the Hub refuses ({status}). {reason}'
    if is_offline:
        return (
            f'the Hub cannot be reached ({reason}). Check the network connection and HF_ENDPOINT, and unset'
            ' HF_HUB_OFFLINE.')
    return (
        f'the transfer was cut off or took too long ({type(error).__name__}: {reason}). Try again;'
        f' HF_HUB_DOWNLOAD_TIMEOUT sets how many seconds to wait ({constants.HF_HUB_DOWNLOAD_TIMEOUT}).')


def _verify(path: Path) -> None:
    """Remove a file of the Hub's cache that is not what its name says: the SHA-256 of a large file, git's of others.

    Raises:
        HubError: It was not.
    """
    blob = path.resolve()
    if len(blob.name) not in (40, 64):
        return
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b'blob %d\0' % blob.stat().st_size)
    with open(blob, 'rb') as f:
        while chunk := f.read(2 ** 22):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f'{path.name} arrived with another hash ({digest.hexdigest()[:12]}…) than the Hub names'
            f' ({blob.name[:12]}…). It was removed from the cache. Try again.')


def download_weights(
        repo: str,
        filename: str = HF_SAFE_WEIGHTS_NAME,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """A file of a Hub repository, whose hash is checked when it is new in the cache.

    Args:
        repo: ORG/NAME, or ORG/NAME@REVISION.
        filename: The file.
        cache_dir: The Hub's cache; None is the user's.

    Raises:
        HubError: It can not be had, or is not what was pushed. The cache holds no broken file then.
    """
    name, revision = _split(repo)
    with _hub_errors(repo):
        cached = try_to_load_from_cache(name, filename, cache_dir=cache_dir, revision=revision)
        path = Path(hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir))
        if str(path) != cached:
            _verify(path)
    return path


def pull(repo: str, cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """All files of a Hub repository, as a folder of the cache that `local-dir:` loads, with their hashes checked.

    Raises:
        HubError: See `download_weights`; or there are no weights in it.
    """
    name, revision = _split(repo)
    download_weights(repo, 'config.json', cache_dir)
    with _hub_errors(repo):
        folder = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir))
        for path in folder.rglob('*'):
            if path.is_file():
                _verify(path)
    if not any(path.suffix in ('.safetensors', '.bin', '.pth') for path in folder.iterdir()):
        raise HubError(
            f'{repo} has no weights, or the Hub can not be reached and the cache has none. Check the connection, or'
            ' unset HF_HUB_OFFLINE.')
    return folder


def locate_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> PretrainedCfg:
    """Where the pretrained weights of one of our models are: a pretrained configuration with a source.

    Those of the recipes (`in1k_300e` and the like) come from the Hub namespace that the environment variable
    TIMM_DEARKD_HUB names, for nobody has published any yet.

    Args:
        cfg: The model's.
        cache_dir: The Hub's cache.

    Raises:
        HubError: See `download_weights`.
        ValueError: There are no weights.
    """
    if not cfg.hf_hub_id:
        namespace, tag = os.environ.get(NAMESPACE_VARIABLE), _recipe_tag(cfg)
        name = f'{cfg.architecture}.{tag}'
        if not namespace or not tag:
            where = f' set {NAMESPACE_VARIABLE} to the Hub namespace that has {name},' if tag else ''
            raise ValueError(
                f'No weights of {cfg.architecture} are published. Train it with train.py,{where} or load a trained one:'
                ' local-dir:FOLDER, hf-hub:ORG/NAME.')
        cfg = dataclasses.replace(cfg, hf_hub_id=f'{namespace}/{name}', tag=tag)
    try:
        path = download_weights(str(cfg.hf_hub_id), cfg.hf_hub_filename or HF_SAFE_WEIGHTS_NAME, cache_dir)
    except HubError as e:
        cause, offline = e.__cause__, LocalEntryNotFoundError
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, offline) and not cfg.hf_hub_filename:
            return cfg  # it may have weights of another kind, which timm looks for
        raise
    return dataclasses.replace(cfg, file=str(path), source='')


def _recipe_tag(cfg: PretrainedCfg) -> str:
    """The tag of the recipe whose weights are meant; '' for a model that has no recipe."""
    if cfg.tag and cfg.tag != 'untrained':
        return cfg.tag
    tags = [name.partition('.')[2] for name in timm.list_models(f'{cfg.architecture}.*', include_tags=True)]
    return next((tag for tag in ('in1k_300e', 'in1k_300e_ft') if tag in tags), '')


def model_card(run: Run, model: Any, repo: str, license: Optional[str] = None) -> ModelCard:
    """A model card made from what the folder of a run says.

    Args:
        run: The run.
        model: Its model.
        repo: ORG/NAME that it is for.
        license: Licence of the weights, by the Hub's name for it; None takes the one in `config.json`, if any.
    """
    args, best = run.args, run.best()
    data = run.info.get('data', {})
    source = _without_folders(args.get('dataset') or '') or _last_part(
        args.get('data_dir') or args.get('data') or 'images')
    is_dearkd = any(isinstance(module, ConvAttention) for module in model.modules()) or 'train_stage' in run.columns
    results = [EvalResult(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=f'{source}, validation split',
        metric_type='accuracy', metric_name='top-1', metric_value=round(best[1] / 100, 4),
    )] if best and run.metric == 'eval_top1' else []
    metadata = ModelCardData(
        license=license or model.pretrained_cfg.get('license'), library_name='timm',
        pipeline_tag='image-classification', metrics=['accuracy'],
        tags=['image-classification', 'timm', *(['dearkd', 'knowledge-distillation'] if is_dearkd else [])],
        model_name=repo.split('/')[-1], eval_results=results or None)
    rate = f'lr {args["lr"]}' if args.get('lr') is not None else f'lr-base {args.get("lr_base")}'
    facts = [
        ('Model', _architecture(str(args.get('model'))) or model.pretrained_cfg.get('architecture')),
        ('Parameters', f'{sum(p.numel() for p in model.parameters()):,}'),
        ('Data', source), ('Training images', data.get('train_images')), ('Classes', model.num_classes),
        ('Image size', ' x '.join(map(str, model.pretrained_cfg['input_size']))),
        ('Teacher', _teacher(run)),
        ('Epochs', len(run.rows) if run.state == 'finished' else f'{run.state}, not finished'), *_stages(run),
        ('Optimizer', f'{args.get("opt")}, {rate}, weight decay {args.get("weight_decay")}, batch size'
         f' {args.get("batch_size")}')]
    lines = [f'- **{key}:** {value}' for key, value in facts if value not in (None, '')]
    figure = f'Best {run.metric.replace("_", " ")}: {best[1]:.2f}, after epoch {best[0]}.' if best else ''
    commands = '\n'.join(_public_command(session['command']) for session in run.info.get('sessions', ()))
    trained = f'\n## How it was trained\n\n```sh\n{commands}\n```\n' if commands else ''
    cited = f'\n## Citation\n\n```bibtex\n{CITATION}\n```\n' if is_dearkd else ''
    return ModelCard(f"""---
{metadata.to_yaml()}
---

# {repo.split('/')[-1]}

{'A DearKD' if is_dearkd else 'An'} image classifier for [timm](https://github.com/huggingface/pytorch-image-models),
trained with timm-dearkd.

{chr(10).join(lines)}

## Results

{figure}

![Accuracy and losses over the epochs](curves.png)

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
image = Image.open('photo.jpg').convert('{'L' if model.pretrained_cfg['input_size'][0] == 1 else 'RGB'}')
probabilities = model(transform(image).unsqueeze(0)).softmax(dim=-1)
```
{trained}{cited}""")


def _last_part(path: str) -> str:
    """Return the last part of a path, with the separators of POSIX or Windows."""
    return PureWindowsPath(path).name


def _without_folders(word: str) -> str:
    """Strip directories from a path that a word shows by itself: absolute, or from `~`, `.`, `..` or a drive."""
    start = r'(?:~|\.{1,2}|[A-Za-z]:)?[/\\]'
    return re.sub(
        rf'(^|=|:|[a-z]+/)({start}.*)$', lambda match: match[1] + _last_part(match[2]), word, flags=re.DOTALL)


class _Values(argparse.Namespace):
    """Parsed options with every value of those that are given several times."""

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
    return [value for name, value in given.values if name in options and value]


def _public_command(command: str) -> str:
    """Strip directories from a command of train.py, so that a model card does not show private paths."""
    words = shlex.split(command)
    start = next((place for place, word in enumerate(words, 1) if word in ('train.py', 'timm_dearkd.train')), 0)
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
    """Describe the teacher by its architecture and accuracy, but not by its path."""
    name = str(run.args.get('kd_model_name') or '')
    if not name:
        return 'none'
    text = _architecture(name) or 'a model whose architecture is not recorded'
    results = run.info.get('results')
    top1 = results.get('teacher_top1') if isinstance(results, dict) else None
    return f'{text}, top-1 {top1:.2f} %' if isinstance(top1, (int, float)) else text


def _architecture(name: str) -> Optional[str]:
    """Return the timm or Hub name of a model that may be given as a folder or a checkpoint; None if unknown."""
    if name.startswith(('hf-hub:', 'hf_hub:')) or timm.is_model(name.split('.')[0]):
        return name
    path = Path(name.removeprefix('local-dir:'))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((path / 'config.json').read_text())['architecture'])
    checkpoints = [path] if path.is_file() else sorted(path.glob('*.pth.tar'))
    return next((args['arch'] for args in map(training_args, map(str, checkpoints)) if 'arch' in args), None)


def _stages(run: Run) -> List[Any]:
    """How long the teacher taught, and what came then."""
    if not run.args.get('kd_model_name') or 'train_stage' not in run.columns:
        return []
    start = run.stage2_start
    if start is None:
        return [('Stage I', f'{len(run.rows)} epochs')]
    kind = run.args.get('dearkd_stage2')
    return [('Stage I', f'{start} epochs'), ('Stage II', f'{len(run.rows) - start} epochs, {kind}')]


def prepare_folder(run_folder: str, folder: Path, repo: str, license: Optional[str] = None) -> None:
    """Write what is pushed: weights as safetensors, timm's `config.json` with the class names, the card, the curves.

    Args:
        run_folder: Output folder of train.py.
        folder: Where to; replaced as a whole.
        repo: ORG/NAME that it is for.
        license: Licence of the weights, see `model_card`.

    Raises:
        FileNotFoundError: No such run.
        ValueError: A run that has no model yet, or no name of a repository.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise ValueError(f'{repo!r} is not the name of a Hub repository. Expected ORG/NAME.')
    run = open_run(run_folder)
    if not (run.folder / 'config.json').exists():
        raise ValueError(f'{run_folder!r} has no model: {why_no_model(run.folder)}.')
    try:
        model: Any = timm.create_model(f'local-dir:{run.folder}', pretrained=True)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as e:
        raise ValueError(f'The model in {run_folder!r} can not be loaded: {" ".join(str(e).split())}') from e
    if license:
        model.pretrained_cfg['license'] = license
    temporary = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_folder(model, temporary)
        write_bytes(temporary / 'README.md', model_card(run, model, repo, license).content.encode())
        if drawn_columns([run]):
            write_bytes(temporary / 'curves.png', render(plot_runs([run])))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push(run_folder: str, repo: str, private: bool = False, license: Optional[str] = None) -> str:
    """Push a run to the Hub, in one commit. A repository that is not there is made.

    Args:
        run_folder: Output folder of train.py.
        repo: ORG/NAME.
        private: Make it private; refuse to push to one that is public.
        license: Licence of the weights, see `model_card`.

    Returns:
        Its address.

    Raises:
        HubError: The Hub refuses, or can't be reached.
        ValueError: See `prepare_folder`.
    """
    folder = Path(run_folder) / 'hub'
    prepare_folder(run_folder, folder, repo, license)
    api = HfApi(library_name='timm-dearkd')
    with _hub_errors(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise HubError(
                f'{repo!r} is there already, and public. Make it private on its page, or push without --private.')
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f'Add {Path(run_folder).name}')
    return str(url)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_dearkd.hub', description='Share models on the Hugging Face Hub')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    add = commands.add_parser('push', help='push a run').add_argument
    add('run', metavar='RUN', help='output folder of train.py')
    add('--repo', required=True, metavar='ORG/NAME')
    add('--private', action='store_true', help='make it private; refuse one that is public')
    add('--license', metavar='NAME', help="licence of the weights, by the Hub's name (the one in config.json, if any)")
    add('--dry-run', action='store_true', help='write the folder that would be pushed, RUN/hub, and push nothing')
    add = commands.add_parser('pull', help='fetch a model, and check its hashes').add_argument
    add('repo', metavar='ORG/NAME[@REVISION]')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    hub_logging.set_verbosity_error()  # it logs every try
    logging.getLogger('timm').setLevel(logging.WARNING)
    if args.command == 'pull':
        print(pull(args.repo))
    elif args.dry_run:
        folder = Path(args.run) / 'hub'
        prepare_folder(args.run, folder, args.repo, args.license)
        print(folder)
    else:
        print(push(args.run, args.repo, args.private, args.license))


if __name__ == '__main__':
    run_command(build_parser().prog, main)
