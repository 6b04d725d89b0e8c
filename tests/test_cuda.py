"""On a GPU, if there is one: the same artifacts, features and clusters as on the CPU."""

import dataclasses

import numpy as np
import pytest
import torch

import itae_utils as itae
from itae_utils.extraction.batches import LARGEST, resolve_batch_size
from itae_utils.method.setting import ATTENUATIONS, SOURCES
from tests.conftest import STRUCTURES, array_dataset, setting, setup, sources_of, statistic, threshold_at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CLOSE = 2e-3  # of features of size 1: cuDNN computes the patch embedding in TF32


def on_gpu(backbone, **changes):
    """Return a copy of a backbone on the GPU."""
    return dataclasses.replace(backbone, model=backbone.model.to("cuda"), device=torch.device("cuda"), **changes)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_features_of_all_variants_equal_the_cpu_s(structure):
    backbone, dataset, batch = setup(structure, count=6)
    variants = {"baseline": None, "random": setting("key", threshold_at(backbone.model, batch, "key", 0.3), seed=1,
                                                    select="random")}
    for number, source in enumerate(sources_of(backbone.model)):
        threshold = threshold_at(backbone.model, batch, source, 0.3)
        for edit in ATTENUATIONS[number::2]:
            variants[f"{source} {edit}"] = setting(source, threshold, edit)
    variants["deep"] = setting("key", threshold_at(backbone.model, batch, "key", 0.2), blocks=1, rows="all")
    on_cpu = itae.extract_features(backbone, dataset, variants, batch_size=3)
    there = itae.extract_features(on_gpu(backbone), dataset, variants, batch_size=3)
    for name in variants:
        assert there.artifact_counts[name].tolist() == on_cpu.artifact_counts[name].tolist(), name
        assert np.abs(there[name] - on_cpu[name]).max() < CLOSE * max(1, np.abs(on_cpu[name]).max()), name


def test_an_image_without_artifacts_keeps_its_feature_to_the_bit():
    backbone, dataset, batch = setup("registers", count=6)
    least = statistic(backbone.model, batch, "key").amin(dim=1)
    threshold = float(least.sort().values[2:4].mean())
    features = itae.extract_features(on_gpu(backbone), dataset,
                                     {"baseline": None, "itae": itae.ITAE("key", threshold)})
    untouched = features.artifact_counts["itae"] == 0
    assert untouched.sum() == 3
    assert np.array_equal(features["itae"][untouched], features["baseline"][untouched])
    assert (features["itae"][~untouched] != features["baseline"][~untouched]).any(axis=1).all()


@pytest.mark.parametrize(("precision", "options"), [
    ("fp32", {"resize": "pil"}), ("fp32", {}), ("fp32", {"compile": True}), ("bf16", {}), ("bf16", {"compile": True})])
def test_the_demo_finds_the_same_artifacts(precision, options):
    """To the last one if images are resized alike; the demo's artifacts appear at a sharp bound, so rounding counts."""
    digits = itae.load_dataset("digits", limit=600)
    variants = {"baseline": None, "itae": itae.ITAE(), "oracle": itae.ITAE(select="oracle"),
                "registers": itae.TestTimeRegisters()}
    on_cpu = itae.extract_features(itae.load_backbone("demo", device="cpu"), digits, variants)
    there = itae.extract_features(itae.load_backbone("demo", device="cuda", precision=precision, **options), digits,
                                  variants)
    allowed = 0 if "resize" in options else 0.005 if precision == "fp32" else 0.04
    assert there.thresholds["itae"][0] == pytest.approx(on_cpu.thresholds["itae"][0], rel=0.001 + allowed / 2)
    for name in variants:
        different = there.artifact_counts[name] != on_cpu.artifact_counts[name]
        assert different.mean() <= allowed, name
        cosine = (on_cpu[name] * there[name]).sum(axis=1)
        cosine /= np.linalg.norm(on_cpu[name], axis=1) * np.linalg.norm(there[name], axis=1)
        assert np.quantile(cosine, 0.05) > (0.999 if precision == "fp32" else 0.95), name


@pytest.mark.parametrize("source", SOURCES)
def test_attention_and_statistics_equal_the_cpu_s(source):
    backbone, _, batch = setup("dinov2", count=5)
    chosen = setting(source, threshold_at(backbone.model, batch, source, 0.3))
    expected = itae.attention_map(backbone.model, batch, itae=chosen)
    seen = itae.attention_map(backbone.model.to("cuda"), batch.to("cuda"), itae=chosen).cpu()
    assert (seen - expected).abs().max() < CLOSE


def test_clusters_are_as_tight_as_the_cpu_s():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 32))
    points = (centres[rng.integers(20, size=3000)] + rng.normal(scale=0.3, size=(3000, 32))).astype(np.float32)
    here, there = (itae.cluster(points, 20, device=device)[1] for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-4)


def test_a_batch_that_does_not_fit_is_halved():
    backbone = itae.load_backbone("dinov2_vits14", pretrained=False, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(2**29 / total)
        assert 1 <= resolve_batch_size("auto", backbone) < LARGEST["cuda"]
        found = itae.extract_features(backbone, array_dataset(20), {"baseline": None})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.isfinite(found["baseline"]).all()
