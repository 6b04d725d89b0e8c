"""An extraction that is small, and slow enough to be killed on the way; it runs in processes of its own."""

import multiprocessing
import time
from pathlib import Path

import numpy as np

from itae_utils.data.datasets import ImageDataset
from itae_utils.method.setting import ITAE

BATCH, SHARD = 2, 4
VARIANTS = {"baseline": None, "itae": ITAE("key", 9.0), "mask": ITAE("value", 9.0, "mask")}


def backbone():
    from tests.conftest import as_backbone, tiny_vit

    return as_backbone(tiny_vit("registers"))


def dataset(count: int) -> ImageDataset:
    images = np.random.default_rng(3).integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    return ImageDataset("made", "all", "made by the tests", images, np.arange(count) % 3, list("abc"))


def extract(count: int, store, *, pause: float = 0.0, log: Path | None = None, variants=VARIANTS):
    """Extract, pausing in each batch; write a line to `log` for each shard after it was stored."""
    import torch

    from itae_utils.extraction import job
    from itae_utils.extraction.features import extract_features
    from itae_utils.store.variants import StoredVariant

    torch.set_num_threads(1)
    job.SHARD_IMAGES = SHARD
    model = backbone()
    model.model.patch_embed.register_forward_hook(lambda *_: time.sleep(pause))
    save = StoredVariant.save

    def logged(self, shard, *arrays):
        save(self, shard, *arrays)
        with log.open("a") as file:
            file.write(f"{self.path} {shard}\n")

    if log is not None:
        StoredVariant.save = logged
    try:
        return extract_features(model, dataset(count), variants, batch_size=BATCH, num_workers=0, store=store)
    finally:
        StoredVariant.save, job.SHARD_IMAGES = save, 2000


def processes():
    """Return a context whose processes start at once and inherit no threads: forked from one that only imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty", "tests.conftest", "itae_utils.extraction.features"])
    return context
