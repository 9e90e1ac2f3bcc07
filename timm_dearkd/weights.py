"""Pretrained weights from the Hugging Face Hub, whose hash is checked."""
import contextlib
import dataclasses
import errno
import hashlib
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
from timm.models import PretrainedCfg, list_models
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split

__all__ = ['HubError', 'download_weights', 'hub_errors', 'locate_weights']

NAMESPACE_VARIABLE = 'TIMM_DEARKD_HUB'
# Errors before a connection is made, by the names that the HTTP libraries of huggingface_hub give them
_UNREACHABLE = {
    'ConnectError', 'ConnectTimeout', 'ProxyError', 'NewConnectionError', 'NameResolutionError', 'gaierror',
    'ConnectionRefusedError', 'OfflineModeIsEnabled'}


class HubError(OSError):
    """An error of the Hub in one line, with its remedy."""


def _split(repo: str) -> Tuple[str, Optional[str]]:
    """Return the name and the revision of ORG/NAME@REVISION."""
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
    """Check a file of the Hub's cache against its name, the SHA-256 of a large file or the git hash of others.

    Raises:
        HubError: If the hash is another. The file is removed.
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
    """Download a file of a Hub repository, and check its hash if it is new in the cache.

    Args:
        repo: ORG/NAME, or ORG/NAME@REVISION.
        filename: Name of the file.
        cache_dir: The Hub's cache; None is the user's.

    Raises:
        HubError: If the file is not available, or not what was pushed. No broken file stays in the cache.
    """
    name, revision = _split(repo)
    with hub_errors(repo):
        cached = try_to_load_from_cache(name, filename, cache_dir=cache_dir, revision=revision)
        path = Path(hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir))
        if str(path) != cached:
            _verify(path)
    return path


def locate_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> PretrainedCfg:
    """Return a pretrained configuration that says where the weights of one of our models are.

    Weights of the recipes (`in1k_300e` and the like) come from the Hub namespace in the environment variable
    TIMM_DEARKD_HUB, because none are published yet.

    Args:
        cfg: The model's.
        cache_dir: The Hub's cache.

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
            return cfg  # it may have weights of another kind, which timm looks for
        raise
    return dataclasses.replace(cfg, file=str(path), source='')


def _recipe_tag(cfg: PretrainedCfg) -> str:
    """The tag of the recipe whose weights are meant; '' for a model that has no recipe."""
    if cfg.tag and cfg.tag != 'untrained':
        return cfg.tag
    tags = [name.partition('.')[2] for name in list_models(f'{cfg.architecture}.*', include_tags=True)]
    return next((tag for tag in ('in1k_300e', 'in1k_300e_ft') if tag in tags), '')
