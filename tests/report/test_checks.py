import pytest
from PIL import Image

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import check_backbone, check_clusters, check_dataset, check_values
from itae_utils.report.report import plan_report


@pytest.mark.parametrize("parameters", [
    {}, {"unknown": "thing"},
    {"limit": None, "clusters": None, "batch_size": "auto", "threshold": "auto", "pos_embed": "auto"},
    {"limit": 1, "seed": 0, "clusters": 2, "percents": [], "threshold": 0, "alpha": 0.5},
    {"sources": ["key", "key"], "attenuations": ["min"], "percents": [0.5, 99], "backbones": ["a"]},
])
def test_legal_values_pass(parameters):
    check_values(parameters)


def test_the_shipped_notebooks_defaults_pass():
    for step in plan_report(profile="paper").steps + plan_report().steps:
        check_values(step.parameters)


@pytest.mark.parametrize(("parameters", "message"), [
    ({"examples": 25}, "examples=25 is not possible: it must be a whole number from 1 to 24"),
    ({"source": "nonsense"}, "source='nonsense' is not known: use one of query, key, value"),
    ({"attenuation": "max"}, "attenuation='max'"),
    ({"alpha": 2}, "alpha=2 must lie between 0 and 1"),
    ({"alpha": float("nan")}, "alpha=nan"),
    ({"threshold": -1.0}, "threshold=-1.0 must be a number of at least 0"),
    ({"threshold": "much"}, "threshold='much'"),
    ({"threshold": None}, "threshold=None is not possible: it must be a number or auto"),
    ({"preprocess": "crop"}, "preprocess='crop' is not possible: it must be resize or meta-eval"),
    ({"precision": None}, "it must be auto, fp32 or bf16"),
    ({"pos_embed": 3}, "it must be auto, meta or timm"),
    ({"on_error": "ignore"}, "it must be raise or skip"),
    ({"limit": 0}, "limit=0 is not possible: it must be a whole number from 1 to 2,147,483,647, or null"),
    ({"limit": True}, "limit=True"), ({"limit": 2.5}, "limit=2.5"), ({"limit": "all"}, "limit='all'"),
    ({"seed": -1}, "seed=-1"), ({"seed": 2**31}, "seed=2147483648"), ({"seed": None}, "seed=None"),
    ({"batch_size": 0}, "batch_size=0"), ({"clusters": 1}, "clusters=1 "),
    ({"percents": [1, 0]}, "numbers between 0 and 100"), ({"percents": ["1"]}, "numbers between 0 and 100"),
    ({"sources": []}, "it must be a list: query, key or value"), ({"sources": [["key"]]}, "it must be a list"),
    ({"attenuations": ["min", "max"]}, "it must be a list: min, mask, mean or scale"),
    ({"backbones": [1]}, "a list of names"), ({"data_dir": "x\udcff"}, "is not UTF-8: give such a file or folder"),
])
def test_illegal_values_are_refused(parameters, message):
    with pytest.raises(ItaeError, match=message) as refused:
        check_values(parameters)
    assert "\n" not in str(refused.value)


def test_clusters_are_no_more_than_images(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    folder = f"imagefolder:{tmp_path}"
    for dataset, limit, images in [("digits", None, 1797), ("digits", 20, 20), (folder, None, 3), (folder, 2, 2)]:
        check_clusters({"dataset": dataset, "limit": limit, "clusters": images})
        with pytest.raises(ItaeError, match=f"clusters={images + 1} is more than there are images, {images:,}"):
            check_clusters({"dataset": dataset, "limit": limit, "clusters": images + 1})
    check_clusters({"dataset": "digits", "clusters": None})
    check_clusters({"results_dir": "x"})


def test_data_sets(tmp_path):
    check_dataset("digits")
    with pytest.raises(ItaeError, match="unknown data set 'digit': did you mean digits"):
        check_dataset("digit")
    with pytest.raises(ItaeError, match="unknown data set 'imagefolder:'"):
        check_dataset("imagefolder:")
    with pytest.raises(ItaeError, match="there is no such folder"):
        check_dataset("imagefolder:" + "a" * 5000)
    with pytest.raises(ItaeError, match="holds no image"):
        check_dataset(f"imagefolder:{tmp_path}")
    (tmp_path / "a.png").touch()
    with pytest.raises(ItaeError, match=r"can't read the image .*a\.png"):
        check_dataset(f"imagefolder:{tmp_path}")
    check_dataset(f"imagefolder:{tmp_path}", "skip")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    check_dataset(f"imagefolder:{tmp_path}")


def test_backbones(tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    check_backbone("demo", None, 32)
    check_backbone("dinov2_vits14", str(weights), 518)
    check_backbone("vit_tiny_patch16_224", str(tmp_path), None)
    for arguments, message in [
        (("demmo", None, None), "unknown backbone 'demmo': did you mean demo"),
        (("resnet18", None, None), "ResNet is not handled"),
        (("demo", str(weights), None), "demo carries its weights"),
        (("dinov2_vits14", str(tmp_path / "none.pth"), None), "there is no such file or folder"),
        (("dinov2_vits14", 3, None), "there is no such file or folder"),
        (("demo", None, 13), "image size 13 is not a multiple of the patch, 4: use 12 or 16"),
        (("vit_tiny_patch16_224", None, 100), "not a multiple of the patch, 16"),
        (("demo", None, 28.0), "image_size=28.0 is not possible: it must be a whole number of pixels"),
        (("demo", None, "big"), "image_size='big'"),
    ]:
        with pytest.raises(ItaeError, match=message):
            check_backbone(*arguments)
