"""Published weights: found in the cache or downloaded from the hub, checked against the checksum they are named by."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError
from timm.models import get_pretrained_cfg

from itae_utils.data.download import within
from itae_utils.errors import ItaeError

NETWORK_TIMEOUT = 5  # seconds for the first answer; a download that has begun may take as long as it needs
SHA256 = re.compile(r"[0-9a-f]{64}")


def published_weights(timm_name: str) -> Path:
    """The file of weights that timm names for `timm_name`, whole and checked; the network is asked only if it must be.

    Raises:
        ItaeError: timm names none, they can't be downloaded, or what came is damaged (it is deleted then).
    """
    config = get_pretrained_cfg(timm_name)
    if config is None or not config.hf_hub_id:
        raise ItaeError(f"timm has no weights for {timm_name!r}: add a tag (timm.list_pretrained lists them), "
                        "give checkpoint=FILE, or pretrained=False for random ones")
    repository, _, revision = config.hf_hub_id.partition("@")
    if cached := cached_weights(timm_name):
        return _checked(cached)
    names = _file_names(config.hf_hub_filename)
    page = huggingface_hub.hf_hub_url(repository, "").partition("/resolve")[0]
    try:
        return _checked(_download(repository, revision or None, names))
    except ItaeError:
        raise
    except Exception as error:  # whatever the client and its HTTP library raise: there is no common class
        told = (str(error).strip().splitlines() or [""])[0]
        raise ItaeError(f"can't get the weights of {timm_name} from {page} ({type(error).__name__}: {told[:120]}): "
                        f"download {names[0]} there, give checkpoint=FILE") from error


def cached_weights(timm_name: str) -> Path | None:
    """The file of weights that timm names for `timm_name`, where it was downloaded before; not checked."""
    config = get_pretrained_cfg(timm_name)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    found = (huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
             for name in _file_names(config.hf_hub_filename))
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _file_names(hub_filename: str | None) -> list[str]:
    """The names under which a repository may hold its weights, safetensors first."""
    if hub_filename is None:
        return ["model.safetensors", "pytorch_model.bin"]
    safe = str(Path(hub_filename).with_suffix(".safetensors"))
    return list(dict.fromkeys([safe, safe.replace("pytorch_model", "model"), hub_filename]))


def _download(repository: str, revision: str | None, names: list[str]) -> Path:
    """The first of `names` that the repository has."""
    for name in names:
        url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        try:  # asked first: offline, the download itself would try again for minutes
            within(NETWORK_TIMEOUT, huggingface_hub.get_hf_file_metadata, url, timeout=NETWORK_TIMEOUT)
            return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        except RemoteEntryNotFoundError:
            if name == names[-1]:
                raise


def _checked(path: Path) -> Path:
    """`path`, whose content is what it is named by: the hub calls large files by their SHA-256.

    The client itself compares no more than the length.
    """
    blob = path.resolve()
    if not SHA256.fullmatch(blob.name):
        return path  # a cache of copies instead of links: the checksum isn't known
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise ItaeError(f"the weights {path} were damaged, their SHA-256 was {found} instead of {blob.name}, and were "
                        "deleted: run again to download them anew")
    return path
