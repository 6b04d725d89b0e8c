"""See, attenuate and measure attention artifacts of Vision Transformers at inference time (ITAE, arXiv 2410.04801)."""

import importlib
import warnings

__version__ = "0.1.0"

# Importing timm in a notebook sets this off by way of tqdm; bars are then drawn as text, which is all there is to it.
warnings.filterwarnings("ignore", message="IProgress not found")

# Public names by module. They are imported when first used: torch and friends take seconds.
_MODULES = {
    "errors": ["ItaeError"],
    "datasets": ["load_dataset"],
    "batches": ["image_batches"],
    "backbones": ["Backbone", "load_backbone"],
    "artifacts": ["precision_recall", "qkv_norms", "token_norms"],
    "thresholds": ["fit_threshold", "fit_thresholds"],
    "attention": ["ITAE", "attenuate", "attention_map"],
    "features": ["extract_features"],
    "observation": ["observe"],
    "clustering": ["agreement", "cluster", "cluster_parts", "evaluate_clustering", "paired_bootstrap"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
