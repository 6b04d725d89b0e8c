"""The environment variables that set defaults; no other module reads them.

| variable | meaning | default |
|---|---|---|
| ITAE_CACHE | folder of file hashes and features | ~/.cache/itae |
| ITAE_DATA | folder of downloaded data sets | ~/.cache/itae/data |
| ITAE_STORE | feature store: a folder, an fsspec URL, or "none" | ITAE_CACHE/store |
| ITAE_DASK | Dask cluster for extraction: an address, or local:N | none |
| ITAE_PROGRESS | 0 hides progress bars | shown on a terminal |
| ITAE_TIMEOUT | seconds to wait for a server's answer | 8 |
| HF_ENDPOINT | server of weights, as `huggingface_hub` reads it | huggingface_hub's |
| CUDA_VISIBLE_DEVICES | GPUs that CUDA shows to this process; a Dask worker then takes the first | all |
"""

import os
from pathlib import Path

from itae_utils.errors import ItaeError

LONGEST_TIMEOUT = 86_400  # seconds: sockets overflow at some larger number


def cache_folder() -> Path:
    """Return the folder of file hashes and, unless ITAE_STORE is set, of features."""
    return Path(os.environ.get("ITAE_CACHE") or "~/.cache/itae").expanduser()


def data_folder() -> Path:
    """Return the folder of downloaded data sets."""
    return Path(os.environ.get("ITAE_DATA") or "~/.cache/itae/data").expanduser()


def named_store() -> str | None:
    """Return the feature store named by the user, or None for the default folder."""
    return os.environ.get("ITAE_STORE") or None


def named_cluster() -> str | None:
    """Return the Dask cluster named by the user, if any."""
    return os.environ.get("ITAE_DASK") or None


def hides_progress() -> bool:
    """Return True if progress bars are switched off."""
    return os.environ.get("ITAE_PROGRESS") == "0"


def hub_server() -> str | None:
    """Return the server of weights named by the user, if any."""
    return os.environ.get("HF_ENDPOINT") or None


def gpus_are_chosen() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES chooses the GPUs of this process."""
    return "CUDA_VISIBLE_DEVICES" in os.environ


def network_timeout() -> float:
    """Return the number of seconds to wait for a server's answer.

    Raises:
        ItaeError: ITAE_TIMEOUT is not a number above 0 and up to `LONGEST_TIMEOUT`.
    """
    text = os.environ.get("ITAE_TIMEOUT") or "8"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_TIMEOUT:  # nor NaN
        raise ItaeError(f"ITAE_TIMEOUT={text!r} is not a time limit: use seconds above 0, up to {LONGEST_TIMEOUT}")
    return seconds


def for_a_kernel(import_path: Path) -> dict[str, str]:
    """Return this process's environment for a notebook's kernel, which shows figures inline and no progress bars.

    Args:
        import_path: folder that the kernel imports packages from first.
    """
    def after(first: str, name: str, separator: str) -> str:
        return separator.join(filter(None, [first, os.environ.get(name)]))

    return {
        **os.environ,
        "ITAE_PROGRESS": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": after(str(import_path), "PYTHONPATH", os.pathsep),
        "PYTHONWARNINGS": after("ignore:IProgress not found", "PYTHONWARNINGS", ","),  # tqdm's, about its bars
    }
