from dataclasses import fields

import matplotlib
import pytest

from itae_utils.errors import ItaeError
from itae_utils.figures.style import ReportFigure
from itae_utils.files import OUTPUT_MARK
from itae_utils.method.setting import ITAE
from itae_utils.report import notebook
from itae_utils.report.parameters import find_notebooks, notebooks_folder
from itae_utils.results import read_results

DEFAULTS = {each.name: each.defaults for each in find_notebooks(notebooks_folder())}


def start(tmp_path, name="03_clustering", **values):
    """Start a notebook as its first cell does, with all that its namespace may hold by then."""
    namespace = {**DEFAULTS[name], "output_dir": str(tmp_path), **values, "unrelated": object(), "np": matplotlib}
    return notebook.start(name, namespace)


@pytest.mark.parametrize(("values", "message"), [
    ({"seeds": 0}, "seeds=0"), ({"source": "hidden"}, "source='hidden'"), ({"limit": "all"}, "limit='all'"),
    ({"options": {"image_size": "big"}}, "image_size='big'"), ({"options": {"imagesize": 28}}, "'imagesize'"),
    ({"options": {"sample": 3}}, "'sample'"), ({"options": 3}, "options=3"),
])
def test_parameters_are_validated_as_on_the_command_line(tmp_path, values, message):
    with pytest.raises(ItaeError, match=message) as refused:
        start(tmp_path, **values)
    assert "\n" not in str(refused.value)


def run_cells(tmp_path, *cells, name="03_clustering"):
    """Start a notebook after these cells, the last ones that were run, as IPython lists them."""
    source = "".join(f"{key} = {value!r}\n" for key, value in (DEFAULTS[name] | {"output_dir": str(tmp_path)}).items())
    before = ["", "import numpy as np", *(cell.replace("PARAMETERS", source) for cell in cells)]
    namespace = {}
    for cell in before:
        exec(cell, namespace)
    return notebook.start(name, namespace | {"In": [*before, "run = notebook.start()"]})


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_notebooks_own_parameters_are_known(tmp_path, name):
    (tmp_path / "reports").mkdir()
    run_cells(tmp_path, "PARAMETERS", "# Parameters\nseed: int = 3", name=name)


@pytest.mark.parametrize(("cells", "message"), [
    (["PARAMETERS\nlimt = 60"], "'limt'.* limit"), (["PARAMETERS", "# Parameters\nlimt = 60"], "'limt'.* limit"),
    (["PARAMETERS\ndatset = 'stl10'", "print()"], "'datset'.* dataset"), (["PARAMETERS\nk = 5"], "'k'.* clusters"),
    (["PARAMETERS\nbatch_size = 8"], r"'batch_size'.* options = \{'batch_size'"),
    (["PARAMETERS\nsample = 9"], "'sample'"),
])
def test_a_parameter_that_does_not_exist_is_refused_before_anything_is_written(tmp_path, cells, message):
    with pytest.raises(ItaeError, match=message):
        run_cells(tmp_path, *cells)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_an_earlier_run_of_the_cell_does_not_count(tmp_path):
    run_cells(tmp_path, "PARAMETERS\nlimt = 60", "print()", "PARAMETERS")


def test_options_have_defaults(tmp_path):
    run = start(tmp_path, options={"n_init": 3, "store": "none"})
    assert (run.options["n_init"], run.options["attenuation"], run.options["precision"]) == (3, "min", "auto")
    assert run.extraction == {"batch_size": "auto", "num_workers": "auto", "store": "none", "client": "auto"}
    assert run.reading == {"batch_size": "auto", "num_workers": "auto", "store": "none"}


def test_a_draw_has_the_common_seed_or_its_own(tmp_path):
    run = start(tmp_path, seed=5, options={"control_seed": 8, "kmeans_seed": 0})
    assert [run.seed(of) for of in ("subset", "threshold", "control", "kmeans")] == [5, 5, 8, 0]


SETTING = {"source": "token", "threshold": "share:2%", "tail": "high", "rank": 3, "attenuation": "clip", "alpha": 0.4}


def test_the_setting_has_all_that_names_it():
    """The rest of `ITAE` is chosen by the notebooks themselves, or measured."""
    assert {field.name for field in fields(ITAE)} == {
        *SETTING, "seed", "blocks", "rows", "select", "substitutes"}


@pytest.mark.parametrize("name", SETTING)
@pytest.mark.parametrize("notebook", ["01_artifact_discovery", "03_clustering"])
def test_every_parameter_and_option_reaches_the_setting(tmp_path, notebook, name):
    given = {name: SETTING[name]}
    values = given if name in DEFAULTS[notebook] else {"options": given}
    assert start(tmp_path, notebook, **values).setting() == ITAE(**given)


def test_the_setting_of_the_ablation_has_its_source_from_the_options(tmp_path):
    options = {"source": "direction", "rank": 2, "alpha": 0.4}
    run = start(tmp_path, "02_itae_ablation", seed=5, options=options)
    assert run.setting() == ITAE(seed=5, **options)


def test_the_setting_has_the_seed_of_the_control(tmp_path):
    run = start(tmp_path, seed=5, options={"control_seed": 8, "kmeans_seed": 1})
    assert run.setting() == ITAE(seed=8)
    assert start(tmp_path, seed=5).setting() == ITAE(seed=5)


def test_loading_follows_parameters_and_options(tmp_path):
    run = start(tmp_path, limit=40, seed=3, options={"image_size": 56, "device": "cpu", "subset_seed": 1})
    backbone, dataset = run.load()
    assert (backbone.name, backbone.image_size, str(backbone.device)) == ("demo", 56, "cpu")
    assert len(dataset) == 40
    assert "seed 1" in dataset.split
    assert run.load_backbone("demo-clean").image_size == 56


def test_results_hold_parameters_options_figures_and_provenance(tmp_path):
    run = start(tmp_path, limit=20, options={"store": "none", "dask": "tcp://x", "num_workers": 2, "device": "cpu"})
    run.load()
    for name in ("first", "second"):
        run.show(ReportFigure(name, "its caption", height=1), name)
    link = run.write(rows=[], headline=[], thresholds={"‖key‖": None}, cover="second", fit_seconds=1.5)
    assert "results.json" in link.data
    found = read_results(tmp_path / "results.json")
    assert (found["notebook"], found["figures"]) == ("03_clustering", ["second", "first"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        OUTPUT_MARK, *(f"{name}.{kind}" for name in ("first", "second") for kind in ("png", "pdf", "svg"))}
    options, about = found["parameters"]["options"], found["provenance"]
    assert (found["parameters"]["limit"], options["device"]) == (20, "cpu")
    assert not {"store", "dask", "num_workers"} & set(options)
    assert (about["device"], about["fit_seconds"], about["backbone"]["kind"]) == ("cpu", 1.5, "embedded")
    assert (about["backbone"]["patch_grid"], len(about["dataset"]["fingerprint"])) == ([7, 7], 64)


def test_a_notebook_that_collects_has_no_options(tmp_path):
    run = start(tmp_path, "04_paper_comparison", results_dir=str(tmp_path))
    run.write(rows=[], headline=[], about={
        "versions": {}, "python": "3", "platform": "x", "date": "2026-01-01", "git": None, "collected": []})
    assert read_results(tmp_path / "results.json")["parameters"] == {
        "results_dir": str(tmp_path), "backbones": DEFAULTS["04_paper_comparison"]["backbones"],
        "output_dir": str(tmp_path)}
