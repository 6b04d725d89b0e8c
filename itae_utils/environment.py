"""The environment variables that set a user's defaults; no other module reads them.

| variable | meaning | default |
|---|---|---|
| ITAE_CACHE | folder of file hashes and features | ~/.cache/itae |
| ITAE_DATA | folder of downloaded data sets | ~/.cache/itae/data |
| ITAE_STORE | feature store: a folder, an fsspec URL, or "none" | ITAE_CACHE/store |
| ITAE_DASK | Dask cluster for extraction: an address, or local:N | none |
| ITAE_PROGRESS | 0 hides progress bars | shown on a terminal |
| ITAE_TIMEOUT | seconds until a server must have given its first answer | 8 |
| HF_ENDPOINT | server of weights, as `huggingface_hub` reads it | its own |
"""

import math
import os
from pathlib import Path

from itae_utils.errors import ItaeError


def cache_folder() -> Path:
    """Return the folder of file hashes and, by default, features."""
    return Path(os.environ.get("ITAE_CACHE") or "~/.cache/itae").expanduser()


def data_folder() -> Path:
    """Return the folder of downloaded data sets."""
    return Path(os.environ.get("ITAE_DATA") or "~/.cache/itae/data").expanduser()


def named_store() -> str | None:
    """Return the feature store that the user names; None if the default folder is to be used."""
    return os.environ.get("ITAE_STORE") or None


def named_cluster() -> str | None:
    """Return the Dask cluster that the user names, if any."""
    return os.environ.get("ITAE_DASK") or None


def hides_progress() -> bool:
    """Return whether progress bars are switched off."""
    return os.environ.get("ITAE_PROGRESS") == "0"


def hub_server() -> str | None:
    """Return the server of weights, if it is not the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def network_timeout() -> float:
    """Return the seconds that a server has for its first answer.

    Raises:
        ItaeError: ITAE_TIMEOUT is not a positive number.
    """
    text = os.environ.get("ITAE_TIMEOUT") or "8"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ItaeError(f"ITAE_TIMEOUT={text!r} is not a number of seconds: use a positive number, such as 30")
    return seconds
