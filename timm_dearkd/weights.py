"""Pretrained weights from the Hugging Face Hub, with a check of their hash."""
import contextlib
import dataclasses
import errno
import os
from pathlib import Path
from typing import Iterator, List, Optional, Tuple, Union

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from timm.models import PretrainedCfg, list_models
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split

NAMESPACE_VARIABLE = 'TIMM_DEARKD_HUB'
# Errors before a connection exists, by their names in the HTTP libraries of huggingface_hub
_UNREACHABLE = {
    'ConnectError', 'ConnectTimeout', 'ProxyError', 'NewConnectionError', 'NameResolutionError', 'gaierror',
    'ConnectionRefusedError', 'OfflineModeIsEnabled'}


class HubError(OSError):
    """Error of the Hub in one line, with a remedy."""


def _split(repo: str) -> Tuple[str, Optional[str]]:
    """Split ORG/NAME@REVISION into name and revision."""
    if repo.count('@') > 1:
        raise HubError(f'{repo!r} is not the name of a Hub repository. Expected ORG/NAME, or ORG/NAME@REVISION.')
    return hf_split(repo)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
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
            raise HubError(f'{e}. Free disk space, or set HF_HOME to another folder.') from e
        modules = {cls.__module__.partition('.')[0] for error in chain for cls in type(error).__mro__}
        if not isinstance(e, OSError) and not modules & {'huggingface_hub', 'httpx', 'httpx2', 'httpcore', 'requests'}:
            raise
        statuses = [getattr(getattr(error, 'response', None), 'status_code', None) for error in chain]
        status = next((status for status in statuses if status is not None), None)
        names = {cls.__name__ for error in chain for cls in type(error).__mro__}
        is_offline = bool(names & _UNREACHABLE)
        raise HubError(f'{repo!r} at {constants.ENDPOINT}: {_explain(e, status, is_offline)}') from e


def _explain(error: Exception, status: Optional[int], is_offline: bool) -> str:
    """Return the cause of an error and its remedy in one line."""
    reason = ' '.join(str(error).split())
    if isinstance(error, HFValidationError):
        return 'this is not the name of a Hub repository. Expected ORG/NAME.'
    if isinstance(error, GatedRepoError):
        return 'it is gated. Request access on its page, and log in with `hf auth login`.'
    if isinstance(error, RevisionNotFoundError):
        return 'it does not have this revision. Check the part after @.'
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            'it does not exist, or is private, or you are not logged in. Check the name, and log in with'
            ' `hf auth login` or HF_TOKEN.')
    if status == 403:
        return 'the token has no permission for this (403). Create one with write access.'
    if status is not None and status >= 500:
        return f'the Hub has an internal error ({status}). Try again later.'
    if isinstance(error, LocalEntryNotFoundError):
        return 'it cannot be reached and is not in the cache. Check the connection, or unset HF_HUB_OFFLINE.'
    if isinstance(error, EntryNotFoundError):
        return f'it is not a timm model, because a file is missing. {reason}'
    if status is not None:
        return f'the Hub refused the request ({status}). {reason}'
    if is_offline:
        return (
            f'the Hub cannot be reached ({reason}). Check the network connection and HF_ENDPOINT, and unset'
            ' HF_HUB_OFFLINE.')
    return (
        f'the transfer was interrupted or timed out ({type(error).__name__}: {reason}). Try again;'
        f' HF_HUB_DOWNLOAD_TIMEOUT sets the timeout, now {constants.HF_HUB_DOWNLOAD_TIMEOUT} seconds.')


def _verify(path: Path) -> None:
    """Check a file of the Hub's cache against its hash, the name of its blob.

    The hash is SHA-256 for large files (LFS), and git's SHA-1 for others.

    Raises:
        HubError: If the hash differs. The file is removed.
    """
    blob = path.resolve()
    if len(blob.name) not in (40, 64):
        return
    with open(blob, 'rb') as f:
        digest = sha_fileobj(f).hex() if len(blob.name) == 64 else git_hash(f.read())
    if digest != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f'{path.name} has the hash {digest[:12]}…, expected {blob.name[:12]}… as on the Hub. It was'
            ' removed from the cache. Try again.')


def download_weights(
        repo: str,
        filename: str = HF_SAFE_WEIGHTS_NAME,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """Download a file of a Hub repository, and check the hash of a new file.

    Args:
        repo: ORG/NAME, or ORG/NAME@REVISION.
        filename: Name of the file.
        cache_dir: The Hub's cache; None is the user's.

    Raises:
        HubError: If the file is not available or damaged. A damaged file does not stay in the cache.
    """
    name, revision = _split(repo)
    with hub_errors(repo):
        cached = try_to_load_from_cache(name, filename, cache_dir=cache_dir, revision=revision)
        path = Path(hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir))
        if str(path) != cached:
            _verify(path)
    return path


def locate_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> PretrainedCfg:
    """Return a pretrained configuration with the file of a DearKD model's weights.

    Weights of the recipes (tags such as `in1k_300e`) are not published yet. They come from the Hub namespace in the
    environment variable TIMM_DEARKD_HUB.

    Args:
        cfg: Pretrained configuration of the model.
        cache_dir: The Hub's cache; None is the user's.

    Raises:
        HubError: See `download_weights`.
        ValueError: If there are no weights.
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
            return cfg  # timm also looks for other file names
        raise
    return dataclasses.replace(cfg, file=str(path), source='')


def _recipe_tag(cfg: PretrainedCfg) -> str:
    """Return the recipe tag of a model, or '' if it has no recipe."""
    if cfg.tag and cfg.tag != 'untrained':
        return cfg.tag
    tags = [name.partition('.')[2] for name in list_models(f'{cfg.architecture}.*', include_tags=True)]
    return next((tag for tag in ('in1k_300e', 'in1k_300e_ft') if tag in tags), '')
