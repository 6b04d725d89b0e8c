"""`[CLS]` features of a data set under any number of variants: found in the store, or computed in one pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from distributed import Client
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from itae_utils.environment import hides_progress, named_cluster, named_store
from itae_utils.errors import ItaeError
from itae_utils.extraction import workers as distributed
from itae_utils.extraction.batches import chosen_batch_size
from itae_utils.extraction.job import Job, Work, compute, missing_work, shard_size
from itae_utils.extraction.observation import fit_thresholds
from itae_utils.method.attention import check_blocks
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import Thresholds
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, digest, open_store
from itae_utils.store.variants import InMemory, InStore, KeptVariant, entry_key, setting_key

log = logging.getLogger("itae_utils")


class ByVariant(Mapping):
    """Something of every variant, got when it is asked for."""

    def __init__(self, names: Iterable[str], get: Callable[[str], object]) -> None:
        self._names, self._get = dict.fromkeys(names), get

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Features(Mapping):
    """`[CLS]` features by variant name, and what they were made with.

    `features[name]` is (n, dim) float32, read from the store when it is asked for; `parts(name)` gives it in parts that
    fit any memory.

    Attributes:
        kept: where each variant is kept.
        variants: the settings, with numbers for "auto".
        targets: (n,) labels, or None.
        settings: backbone, device, precision, batch size, and the store's place (None: in memory).
        computed: images that were run for this call, by variant; the others were in the store.
        num_patches: of an image.
        fit_seconds: time for fitting thresholds.
        seconds: time for finding what is stored and computing the rest.
    """

    kept: dict[str, KeptVariant] = field(repr=False)
    variants: dict[str, ITAE | None]
    targets: np.ndarray | None = field(repr=False)
    settings: dict[str, object]
    computed: dict[str, int]
    num_patches: int
    fit_seconds: float
    seconds: float

    def __getitem__(self, name: str) -> np.ndarray:
        return self.kept[name].features()

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """The features of one variant in order, a shard (m, dim) at a time."""
        return (self.kept[name].part(shard) for shard in self.kept[name].shards)

    @property
    def thresholds(self) -> dict[str, tuple[float | None, ...]]:
        """θ of each block a variant touches, in block order; None where nothing was found."""
        return {name: () if itae is None or itae.select == "oracle" else itae.thresholds
                for name, itae in self.variants.items()}

    @property
    def artifact_counts(self) -> Mapping[str, np.ndarray]:
        """Patches attenuated in the last block, (n,) by variant, read when asked for."""
        return ByVariant(self.kept, lambda name: self.kept[name].counts())

    @property
    def left_alone(self) -> Mapping[str, int]:
        """Images without a normal patch, which "mean" leaves as they are, by variant."""
        def count(name: str) -> int:
            itae = self.variants[name]
            if itae is None or itae.attenuation != "mean":
                return 0
            return int(np.count_nonzero(self.artifact_counts[name] == self.num_patches))

        return ByVariant(self.kept, count)


def extract_features(
    backbone: Backbone,
    dataset: Dataset,
    variants: Mapping[str, ITAE | None],
    *,
    thresholds: Thresholds | None = None,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = "auto",
    store: str | Path | Store | None = "auto",
    client: Client | str | None = "auto",
) -> Features:
    """The `[CLS]` output of every image under every variant, in the data set's order.

    What the store holds is taken from there; the rest is computed in one pass over the images that need it and stored
    a shard at a time, so that a run that was stopped goes on after its last whole shard.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`, or any torch data set of (PIL image, label). Its `.targets`, where it has them,
            become the features' labels; by its `.images`, paths or arrays, the features are found again in a store.
        variants: `ITAE` settings by name; None is the model as it is.
        thresholds: fits to take "auto" from; made here where they are needed and not given.
        batch_size: images at a time. It can change the last bits of the features. "auto" is 64 on a CPU, and on a GPU
            what fits.
        num_workers: processes that decode images; 0 for none.
        store: a folder or an fsspec URL; "auto" is the environment's ITAE_STORE, else a folder in the user's cache;
            None keeps everything in memory. Needs a data set whose fingerprint can be taken (`.images`).
        client: a Dask client, a scheduler's address, or "local:N" for N processes of this machine; "auto" is the
            environment's ITAE_DASK, else None: this process. Needs a store that all workers reach.

    Raises:
        ItaeError: bad variants, an oracle without ground truth, features that are not finite, a store that can't be
            read or written.
    """
    if not isinstance(variants, Mapping):
        raise ItaeError(f"variants={variants!r} are no settings by name: write them as in {{'baseline': None}}")
    if not variants:
        raise ItaeError("no variants were given: name at least one, as in {'baseline': None}")
    needs_fit = any(itae is not None and itae.threshold == "auto" and itae.select != "oracle"
                    for itae in variants.values())
    batch_size, fit_seconds = chosen_batch_size(batch_size, backbone, dataset, store), 0.0
    if needs_fit and thresholds is None:
        thresholds = fit_thresholds(backbone, dataset, batch_size=batch_size, store=store)
        fit_seconds = thresholds.seconds
    settings = {name: _resolved(backbone, name, itae, thresholds) for name, itae in variants.items()}

    start = time.perf_counter()
    with _workers(client, backbone) as (run, backbone):
        kept, work = _planned(backbone, dataset, settings, batch_size, store)
        job = Job(backbone, dataset, kept, settings, batch_size, num_workers)
        if work:
            with _progress(job.images(work)) as advance:
                run(job, work, advance)
    return Features(
        kept=kept,
        variants=settings,
        targets=getattr(dataset, "targets", None),
        settings={"backbone": backbone.name, "device": str(backbone.device), "precision": backbone.precision,
                  "batch_size": batch_size, "store": _place(kept)},
        computed={name: job.images({shard: names for shard, names in work.items() if _first(variant, kept) in names})
                  for name, variant in kept.items()},
        num_patches=int(np.prod(backbone.patch_grid)),
        fit_seconds=fit_seconds,
        seconds=time.perf_counter() - start,
    )


def _resolved(backbone: Backbone, name: str, itae: ITAE | None, thresholds: Thresholds | None) -> ITAE | None:
    """The variant with numbers for "auto", checked against the backbone."""
    if itae is None:
        return None
    if itae.select == "oracle" and backbone.truth is None:
        raise ItaeError(f"variant {name!r} has select='oracle', but {backbone.name} has no ground truth: 'demo' has")
    check_blocks(backbone.model, itae, backbone.truth)
    if itae.threshold == "auto" and itae.select != "oracle":
        numbers = tuple(thresholds[block, itae.source].threshold for block in range(-itae.blocks, 0))
        itae = replace(itae, threshold=numbers)
    return itae


def _planned(backbone: Backbone, dataset: Dataset, settings: Mapping[str, ITAE | None], batch_size: int,
             store: str | Path | Store | None) -> tuple[dict[str, KeptVariant], Work]:
    """Where each variant is kept, and what is missing; without a store where nobody named the one that fails."""
    keys = {name: setting_key(itae, backbone.truth) for name, itae in settings.items()}
    images = {"size": len(dataset), "dim": backbone.dim, "shard_size": shard_size(backbone, batch_size)}
    place = open_store(store)
    entry = None if place is None else entry_key(backbone, dataset, batch_size)
    if entry is not None:
        about = {"dataset": getattr(dataset, "name", type(dataset).__name__), "device": str(backbone.device)}
        try:
            return _missing({name: InStore(place, entry | images, key, about) for name, key in keys.items()})
        except ItaeError as error:
            if store != "auto" or named_store():
                raise
            log.warning("%s; they are kept in memory now", error)
    elif place is not None and store != "auto":
        raise ItaeError(f"data set {getattr(dataset, 'name', dataset)!r} says nothing of its images, so its features "
                        "can't be found again: give it .images (paths or arrays), or store=None")
    in_memory = {digest(key): InMemory(**images) for key in keys.values()}
    return _missing({name: in_memory[digest(key)] for name, key in keys.items()})


def _missing(kept: dict[str, KeptVariant]) -> tuple[dict[str, KeptVariant], Work]:
    """What is missing, ready to be written."""
    work = missing_work({name: variant for name, variant in kept.items() if _first(variant, kept) == name})
    for name in {name for names in work.values() for name in names}:
        kept[name].prepare()
    return kept, work


def _first(variant: KeptVariant, kept: Mapping[str, KeptVariant]) -> str:
    """The first variant that is kept in the same place: equal settings run once."""
    return next(name for name, other in kept.items() if other == variant)


def _place(kept: Mapping[str, KeptVariant]) -> str | None:
    """The place of the store that variants are kept in; None for memory."""
    variant = next(iter(kept.values()))
    return variant.store.place if isinstance(variant, InStore) else None


@contextmanager
def _workers(client: Client | str | None, backbone: Backbone) -> Iterator[tuple[Callable[..., object], Backbone]]:
    """What computes, here or on a cluster, and the backbone as it will be there."""
    client = named_cluster() if client == "auto" else client
    if not client:
        yield compute, backbone
        return
    with distributed.connect(client) as connected:
        yield partial(distributed.compute_on, connected), distributed.on_workers(connected, backbone)


@contextmanager
def _progress(images: int) -> Iterator[Callable[[int], object]]:
    hidden = hides_progress() or None  # None: shown on a terminal only
    with tqdm(total=images, unit="image", desc="features", disable=hidden, leave=False) as progress:
        yield progress.update
