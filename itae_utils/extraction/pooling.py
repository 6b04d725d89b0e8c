"""Other readings of the last block than the `[CLS]` output: the mean of patch tokens, and `[CLS]` without patches."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.extraction.batches import checked_inputs, chosen_batch_size
from itae_utils.extraction.observation import directions_entering, measured_batches
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.artifacts import capture_truth, select_artifacts
from itae_utils.method.attention import check_setting
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import patch_statistic
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place, setting_key

NO_PATCHES = ITAE("token", 0.0, "mask")  # every norm is at least 0, so `[CLS]` attends to no patch


def pooled_features(backbone: Backbone, dataset: Dataset, itae: ITAE, *, batch_size: int | Literal["auto"] = "auto",
                    num_workers: int | Literal["auto"] = 0, store: str | Path | Store | None = "auto",
                    ) -> dict[str, np.ndarray]:
    """Return the mean of each image's patch tokens after the final norm, (n, dim) float32, stored and reused.

    "mean" is over all patches, and "mean_normal" over those that are not artifacts. They are equal for an image without
    artifacts, and for one of artifacts alone. `itae` says which patches are artifacts, and is refused as by `observe`.
    The other arguments are as for `extract_features`. Where timm pools before the final norm, so does this.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    check_setting(backbone.model, itae, backbone.truth)
    if itae.blocks > 1:
        raise ItaeError(f"blocks={itae.blocks}: patches are pooled after the last block, pass a setting with blocks=1")
    model, vit, directions = backbone.model, adapt(backbone.model), directions_entering(backbone, itae.rank)
    place, last, prefix = Place(open_store(store), backbone, dataset), backbone.num_blocks - 1, vit.num_prefix_tokens
    batch_size = chosen_batch_size(batch_size, place)

    def measure(images: Tensor, image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
        with capture_truth(backbone.truth, model) as captured:
            inputs = block_inputs(model, images, [last])[last]
        values = patch_statistic(itae.source, vit.blocks[last].qkv(inputs), prefix, directions)
        artifacts = select_artifacts(values, itae.thresholds[-1], itae, block=last, image_numbers=image_numbers,
                                     truth=captured.mask)
        patches = model.norm(inputs.run(model.blocks[last]))[:, prefix:].float()
        normal = ~artifacts[..., None]
        kept = {"mean": torch.ones_like(normal), "mean_normal": normal | ~normal.any(dim=1, keepdim=True)}
        return {name: model.fc_norm(torch.where(mask, patches, 0).sum(dim=1) / mask.sum(dim=1)).float()
                for name, mask in kept.items()}

    return dict(place.remembered(
        "pooled", {"batch_size": batch_size, "setting": setting_key(itae, backbone.truth)},
        lambda: measured_batches(place, np.arange(len(dataset)), measure, batch_size, num_workers)))
