"""Other readings of the last block than the `[CLS]` output: the mean of patch tokens, and `[CLS]` without patches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.preprocessing import normalize as unit_rows
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.extraction.batches import checked_inputs, chosen_batch_size
from itae_utils.extraction.observation import last_directions, measure_images
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.artifacts import capture_truth, select_artifacts
from itae_utils.method.attention import check_setting
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import patch_statistic
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place, setting_key

NO_PATCHES = ITAE("token", 0.0, "mask")  # every norm is at least 0, so `[CLS]` attends to no patch at all


def pooled_features(backbone: Backbone, dataset: Dataset, itae: ITAE, *, batch_size: int | Literal["auto"] = "auto",
                    num_workers: int | Literal["auto"] = 0, store: str | Path | Store | None = "auto",
                    ) -> dict[str, np.ndarray]:
    """Return the mean of every image's patch tokens after the final norm, computed in one pass, stored and reused.

    Where timm applies the final norm after pooling (`fc_norm`), so does this.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: a setting of the last block with a numeric threshold; it says which patches are artifacts.
        batch_size: images per batch; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as in `extract_features`.

    Returns:
        "mean": (n, dim) float32, over all patches. "mean_normal": the same over the patches that are not artifacts. An
        image without artifacts, or of artifacts alone, has the mean over all patches in both.

    Raises:
        ItaeError: a setting with more than one block, or one that `attenuate` refuses.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    check_setting(backbone.model, itae, backbone.truth)
    if itae.blocks > 1:
        raise ItaeError(f"blocks={itae.blocks}: patches are pooled after the last block, pass a setting with blocks=1")
    place = Place(open_store(store), backbone, dataset)
    batch_size = chosen_batch_size(batch_size, place)
    measure = partial(_pool, backbone, itae, last_directions(backbone, itae.rank))
    options = {"batch_size": batch_size, "setting": setting_key(itae, backbone.truth)}
    return dict(place.remembered("pooled", options, lambda: measure_images(
        backbone, dataset, np.arange(len(dataset)), measure, batch_size=batch_size, num_workers=num_workers,
        store=place.store)))


def joined(*features: np.ndarray) -> np.ndarray:
    """Return features (n, dim) of the same images side by side, each row brought to length 1 first: (n, Σ dim)."""
    return np.hstack([unit_rows(each) for each in features])


def _pool(backbone: Backbone, itae: ITAE, directions: Tensor | None, images: Tensor, image_numbers: tuple[int, ...]
          ) -> dict[str, Tensor]:
    model, last, prefix = backbone.model, backbone.num_blocks - 1, backbone.model.num_prefix_tokens
    with capture_truth(backbone.truth, model) as captured:
        inputs = block_inputs(model, images, [last])[last]
    block = adapt(model).blocks[last]
    values = patch_statistic(itae.source, block.qkv(inputs), prefix, directions)
    artifacts = select_artifacts(values, itae.thresholds[-1], itae, block=last, image_numbers=image_numbers,
                                 truth=captured.mask)
    patches = model.norm(inputs.run(block.block))[:, prefix:].float()
    mean, normal = patches.mean(dim=1), (~artifacts).to(patches.dtype)
    of_normal = torch.einsum("bn,bnc->bc", normal, patches) / normal.sum(dim=1, keepdim=True)
    kept = artifacts.any(dim=1) & ~artifacts.all(dim=1)
    return {"mean": model.fc_norm(mean).float(),
            "mean_normal": model.fc_norm(torch.where(kept[:, None], of_normal, mean)).float()}
