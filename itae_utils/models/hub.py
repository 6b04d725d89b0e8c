"""Published weights: read from the hub's local cache or downloaded, and verified by their SHA-256.

timm's own `load_state_dict_from_hf` is not used. It asks the server even for a cached file, retries for minutes when
there is no network, and returns tensors, so the file could not be verified before it is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError
from timm.models import get_pretrained_cfg

from itae_utils.data.download import within
from itae_utils.data.fingerprint import file_sha256
from itae_utils.environment import network_timeout
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

SHA256 = re.compile(r"[0-9a-f]{64}")


def published_weights(timm_name: str) -> Path:
    """Return the path of the weights that timm names for a model, verified; download them if they are not cached.

    Raises:
        ItaeError: timm names no weights, they can't be downloaded, or the file is damaged. A damaged file is deleted.
    """
    location = _location(timm_name)
    if location is None:
        raise ItaeError(f"timm has no weights for {timm_name!r}: add a tag (timm.list_pretrained lists them), "
                        "give checkpoint=FILE, or pretrained=False for random ones")
    path = cached_weights(timm_name) or _download(timm_name, *location)
    # The client compares only the length of a file. Its SHA-256 is its name in the hub's cache, but a cache without
    # symbolic links does not record it. An unchanged file is hashed once, see `file_sha256`.
    blob = path.resolve()
    if SHA256.fullmatch(blob.name) and (found := file_sha256(blob)) != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ItaeError(f"the weights {path} were damaged (SHA-256 {found} instead of {blob.name}) and are now "
                        "deleted: run again to download them")
    return path


def cached_weights(timm_name: str) -> Path | None:
    """Return the path of the weights that timm names for a model if they are cached, without verifying them."""
    location = _location(timm_name)
    if location is None:
        return None
    repository, revision, names = location
    found = (huggingface_hub.try_to_load_from_cache(repository, name, revision=revision) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _location(timm_name: str) -> tuple[str, str | None, list[str]] | None:
    """Return the repository and revision that timm names, and the preferred order of the names of its weights."""
    config = get_pretrained_cfg(timm_name)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    name = config.hf_hub_filename or constants.PYTORCH_WEIGHTS_NAME
    safe = str(Path(name).with_suffix(".safetensors")).replace("pytorch_model", "model")  # timm's rule, too
    return repository, revision or None, list(dict.fromkeys([safe, name]))


def _download(timm_name: str, repository: str, revision: str | None, names: list[str]) -> Path:
    """Download the first of the names that the repository has."""
    is_set = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    seconds = max(network_timeout(), constants.HF_HUB_ETAG_TIMEOUT if is_set else 0)  # for the server's first answer
    try:
        for name in names:
            url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
            try:  # within a time limit: without a network, the download would retry for minutes
                within(seconds, huggingface_hub.get_hf_file_metadata, url, timeout=seconds)
            except RemoteEntryNotFoundError:
                if name == names[-1]:
                    raise
            else:
                return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, etag_timeout=seconds))
    except Exception as error:  # the client and its HTTP library have no common exception class
        page = huggingface_hub.hf_hub_url(repository, "").partition("/resolve")[0]
        slow = (f"or on a slow network set ITAE_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT above {seconds:g} s"
                if not constants.HF_HUB_OFFLINE else "or unset HF_HUB_OFFLINE")
        raise ItaeError(f"can't download the weights of {timm_name}: get {names[0]} from {page} and give "
                        f"checkpoint=FILE, {slow} ({type(error).__name__}: {in_one_line(error)})") from error
