"""`[CLS]` features of a data set under any number of variants: read from the store, or computed in one pass."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from itae_utils.data.items import targets_of
from itae_utils.environment import hides_progress, named_cluster, named_store
from itae_utils.errors import ItaeError
from itae_utils.extraction import workers
from itae_utils.extraction.batches import checked_inputs, chosen_batch_size
from itae_utils.extraction.fitting import fitted_settings
from itae_utils.extraction.job import Job, Work, compute, missing_work, shard_size
from itae_utils.extraction.neurons import fitted_registers
from itae_utils.method.attention import check_setting
from itae_utils.method.register_setting import TestTimeRegisters, Variant, parted
from itae_utils.method.registers import check_registers
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import Thresholds
from itae_utils.models.backbones import Backbone
from itae_utils.store.identity import Unidentified
from itae_utils.store.store import Store, digest, open_store
from itae_utils.store.variants import Place, StoredVariant, device_name, setting_key

log = logging.getLogger("itae_utils")


class ByVariant(Mapping):
    """A lazy mapping from variant name to value."""

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
    """`[CLS]` features by variant name, with the settings they were computed with.

    `features[name]` reads (n, dim) float32 from the store each time; `parts(name)` reads a part at a time, in bounded
    memory.

    Attributes:
        stored: where the features of each variant are: in the feature store, or in memory that is freed with them.
        variants: the settings, with numbers for "auto" and register neurons.
        targets: (n,) labels, or None.
        settings: backbone, device, precision, batch size, and the store's place (None: in memory).
        computed: number of images computed in this call, by variant; the others were in the store.
        num_patches: number of patches per image.
        fit_seconds: seconds for fitting thresholds.
        seconds: seconds for reading the store and computing the rest.
    """

    stored: dict[str, StoredVariant] = field(repr=False)
    variants: dict[str, Variant]
    targets: np.ndarray | None = field(repr=False)
    settings: dict[str, object]
    computed: dict[str, int]
    num_patches: int
    fit_seconds: float
    seconds: float

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].features()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Return the features of one variant in order, a shard (m, dim) at a time."""
        return (self.stored[name].part(shard) for shard in self.stored[name].shards)

    @property
    def thresholds(self) -> dict[str, tuple[float | None, ...]]:
        """The threshold θ of each block that a variant changes, in block order; None for a block without artifacts."""
        edits = {name: parted(variant)[1] for name, variant in self.variants.items()}
        return {name: () if itae is None or itae.select == "oracle" else itae.thresholds
                for name, itae in edits.items()}

    @property
    def artifact_counts(self) -> Mapping[str, np.ndarray]:
        """The number of patches attenuated in the last block, (n,) by variant; read on access."""
        return ByVariant(self.stored, lambda name: self.stored[name].counts())


def extract_features(
    backbone: Backbone,
    dataset: Dataset,
    variants: Mapping[str, Variant],
    *,
    thresholds: Thresholds | None = None,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = "auto",
    store: str | Path | Store | None = "auto",
    client: workers.Client | str | None = "auto",
) -> Features:
    """Return the `[CLS]` output of every image under every variant, in the data set's order.

    Features in the store are read from there. The others are computed in one pass over the images that lack them, and
    stored a shard at a time, so that an interrupted run resumes after its last whole shard.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`, or any map-style data set of pictures, (picture, label) or rows such as
            {"image": picture}; see `itae_utils.data.items` for what a picture and the labels may be. A store needs its
            `.images`, paths or arrays, and transforms that are known by their value (not a lambda).
        variants: `ITAE` or `TestTimeRegisters` settings by name; None stands for the unmodified model.
        thresholds: from `fit_thresholds`, for variants whose θ is "auto", "share:2%" or "sd:3"; None fits them here.
        batch_size: images per batch. It can change the last bits of the features. "auto" is 64 on a CPU, and on a GPU a
            size that fits in its memory.
        num_workers: number of processes that decode images, or "auto".
        store: a folder or an fsspec URL. "auto" takes ITAE_STORE from the environment, or else a folder in the user's
            cache. None holds the features in memory.
        client: a Dask client, a scheduler's address, or "local:N" for N processes on this machine. "auto" takes
            ITAE_DASK from the environment; None computes in this process. Needs a store that all workers reach.

    Raises:
        ItaeError: inputs of another kind, an oracle without ground truth, features that are not finite, or a store that
            can't be read or written, or can't recognise the data set and was named here.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    _check_variants(backbone, variants, thresholds)
    place = Place(open_store(store), backbone, dataset)
    batch_size = chosen_batch_size(batch_size, place)
    start = time.perf_counter()
    edited = {name: itae for name, itae in variants.items() if isinstance(itae, ITAE)}
    fitted, _ = fitted_settings(place, edited, thresholds, batch_size=batch_size)
    remembering = place if place.store is not None else Place(Store(None), backbone, dataset)  # neurons are found once
    fitted |= {name: fitted_registers(remembering, registers, batch_size=batch_size)
               for name, registers in variants.items() if isinstance(registers, TestTimeRegisters)}
    settings, fit_seconds = {name: fitted.get(name) for name in variants}, time.perf_counter() - start

    start = time.perf_counter()
    with _processor(client, backbone) as (run, backbone, device):
        stored, work = _plan(place, backbone, settings, batch_size, store, device)
        job = Job(backbone, dataset, stored, settings, batch_size, num_workers)
        if work:
            hidden = hides_progress() or None  # None: shown on a terminal only
            with tqdm(total=job.images(work), unit="image", desc="features", disable=hidden, leave=False) as progress:
                run(job, work, progress.update)
    return Features(
        stored=stored,
        variants=settings,
        targets=targets_of(dataset),
        settings={"backbone": backbone.name, "device": str(backbone.device), "precision": backbone.precision,
                  "batch_size": batch_size, "store": next(iter(stored.values())).store.place},
        computed=_computed(job, work),
        num_patches=int(np.prod(backbone.patch_grid)),
        fit_seconds=fit_seconds,
        seconds=time.perf_counter() - start,
    )


def _check_variants(backbone: Backbone, variants: Mapping[str, Variant], thresholds: Thresholds | None) -> None:
    if not isinstance(variants, Mapping) or not variants:
        raise ItaeError(f"variants={variants!r} names no settings: pass a mapping such as {{'baseline': None}}")
    for name, variant in variants.items():
        if not isinstance(name, str) or not isinstance(variant, Variant):
            raise ItaeError(f"variants hold {name!r}: {variant!r}, but a variant is a name and an ITAE(…), "
                            "TestTimeRegisters(…) or None")
        if isinstance(variant, TestTimeRegisters):
            check_registers(backbone.model, variant)
        _, itae = parted(variant)
        if itae is not None and itae.select == "oracle" and backbone.truth is None:
            raise ItaeError(f"variant {name!r} has select='oracle', but {backbone.name} has no ground truth: 'demo' "
                            "has")
        if itae is not None:
            check_setting(backbone.model, itae, backbone.truth)
    if not isinstance(thresholds, Thresholds | None):
        raise ItaeError(f"thresholds={thresholds!r} are not fits: pass fit_thresholds(backbone, dataset), or put a "
                        "number into ITAE(threshold=…)")
    if thresholds is not None and thresholds.num_blocks != backbone.num_blocks:
        raise ItaeError(f"thresholds were fitted to a model of {thresholds.num_blocks} blocks, and {backbone.name} has "
                        f"{backbone.num_blocks}: fit them to this backbone")


def _plan(place: Place, backbone: Backbone, settings: Mapping[str, Variant], batch_size: int,
          store: str | Path | Store | None, device: str) -> tuple[dict[str, StoredVariant], Work]:
    """Return where each variant is stored, and the missing work; use memory if the default store fails."""
    keys = {name: setting_key(itae, backbone.truth) for name, itae in settings.items()}
    shape = {"size": len(place.dataset), "dim": backbone.dim, "shard_size": shard_size(backbone, batch_size)}
    if place.store is not None:
        about = {"dataset": getattr(place.dataset, "name", type(place.dataset).__name__)}
        try:
            entry = place.key | {"batch_size": batch_size, "device": device} | shape
            return _prepared(place.store, entry, keys, about)
        except Unidentified as error:
            if store != "auto":
                raise
            log.info("%s; they are held in memory", error)
        except ItaeError as error:
            if store != "auto" or named_store():
                raise
            log.warning("%s; features are held in memory now", error)
    return _prepared(Store(None), shape, keys, {})


def _prepared(store: Store, entry: Mapping[str, object], keys: Mapping[str, Mapping[str, object]],
              about: Mapping[str, object]) -> tuple[dict[str, StoredVariant], Work]:
    """Return the prepared variants in a store and the missing work; variants with equal settings are one object."""
    by_setting = {digest(key): StoredVariant(store, entry, key, about) for key in keys.values()}
    stored = {name: by_setting[digest(key)] for name, key in keys.items()}
    first: dict[StoredVariant, str] = {}  # several names may stand for equal settings, which are computed once
    for name, variant in stored.items():
        first.setdefault(variant, name)
    work = missing_work({name: variant for variant, name in first.items()})
    for name in {name for names in work.values() for name in names}:
        stored[name].prepare()
    return stored, work


def _computed(job: Job, work: Work) -> dict[str, int]:
    """Return the number of images that each variant lacked."""
    images = Counter()
    for shard, names in work.items():
        images.update(dict.fromkeys((job.stored[name] for name in names), job.images([shard])))
    return {name: images[variant] for name, variant in job.stored.items()}


@contextmanager
def _processor(client: workers.Client | str | None, backbone: Backbone
               ) -> Iterator[tuple[Callable[..., object], Backbone, str]]:
    """Yield the function that computes, here or on a cluster, and the backbone and the name of the device there."""
    client = named_cluster() if client == "auto" else client
    if not client:
        yield compute, backbone, device_name(backbone.device)
        return
    with workers.connect(client) as connected:
        yield partial(workers.compute_on, connected), *workers.on_workers(connected, backbone)
