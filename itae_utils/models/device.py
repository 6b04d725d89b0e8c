"""The device that models and k-means run on."""

from __future__ import annotations

import torch

from itae_utils.errors import ItaeError


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine; "auto" is CUDA if available, else the CPU. Nothing is allocated on it.

    Raises:
        ItaeError: this machine has no such device.
    """
    here = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator():  # the kind that torch is built for
        here += [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except (RuntimeError, TypeError):  # torch's answers to other words, and to other types
        found = None
    if found is None or (found.type if found.type == "cpu" else f"{found.type}:{found.index or 0}") not in here:
        built = "" if torch.backends.cuda.is_built() else "; torch is installed without CUDA"
        raise ItaeError(f"device={device!r} is not available: use auto, or one of this machine's devices, "
                        f"{', '.join(here)}{built}")
    return found
