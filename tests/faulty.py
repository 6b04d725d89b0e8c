"""A small extraction that is slow enough to be killed before it ends; it runs in separate processes."""

import multiprocessing
import time
from pathlib import Path

import torch

from itae_utils.extraction import job
from itae_utils.extraction.features import extract_features
from itae_utils.method.setting import ITAE
from itae_utils.store.variants import StoredVariant
from tests.conftest import array_dataset, as_backbone, tiny_vit

BATCH, SHARD = 2, 4
VARIANTS = {"baseline": None, "itae": ITAE("key", 9.0), "mask": ITAE("value", 9.0, "mask")}


def backbone():
    return as_backbone(tiny_vit("registers"))


def dataset(count: int):
    return array_dataset(count, seed=3)


def extract(count: int, store, *, pause: float = 0.0, log: Path | None = None, variants=VARIANTS):
    """Extract, pausing in each batch; write a line to `log` for each shard after it was stored."""
    torch.set_num_threads(1)
    job.SHARD_IMAGES = SHARD
    save, call = StoredVariant.save, job.OnePass.__call__

    def paused(self, *arguments):
        time.sleep(pause)
        return call(self, *arguments)

    def logged(self, shard, *arrays):
        save(self, shard, *arrays)
        with log.open("a") as file:
            file.write(f"{self.path} {shard}\n")

    if log is not None:
        StoredVariant.save = logged
    job.OnePass.__call__ = paused
    try:
        return extract_features(backbone(), dataset(count), variants, batch_size=BATCH, num_workers=0, store=store)
    finally:
        StoredVariant.save, job.OnePass.__call__, job.SHARD_IMAGES = save, call, 2000


def processes():
    """Return a context whose processes start at once and inherit no threads: forked from one that only imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faulty"])
    return context
