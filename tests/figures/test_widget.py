"""The explorer in JupyterLab: what its kernel answers, the view without a kernel, and both in a real browser."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from itertools import count

import nbformat
import numpy as np
import papermill
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import itae_utils as itae
from itae_utils.analysis.feature_map import feature_map
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.extraction.observation import observe_rows
from itae_utils.figures.explorer import widget as module
from itae_utils.figures.explorer.data import LARGEST
from itae_utils.files import PACKAGE
from itae_utils.method.setting import ATTENUATIONS, ITAE
from itae_utils.report.pages import notebook_page
from tests.browser import open_chromium, open_jupyterlab
from tests.conftest import MadeDataset, array_dataset, as_backbone, tiny_vit
from tests.report.test_pages import NOTEBOOKS, run_of

COUNT = 24
BACKBONE, DATASET = as_backbone(tiny_vit("dinov2")), MadeDataset(COUNT)
SETTING = ITAE("key", "share:10%")
numbers = count()


def explore(dataset=DATASET, setting=SETTING, **options):
    return itae.explore(BACKBONE, dataset, setting, store=None, **options)


@pytest.fixture(scope="module")
def shown():
    return explore()


def ask(shown, *buffers: bytes, **content) -> dict:
    """Send a message as the view does, and return the answer."""
    content["request"] = next(numbers)
    shown._handle_custom_msg(content, list(buffers))
    assert shown.answer["request"] == content["request"]
    return shown.answer


def values_of(array: dict) -> np.ndarray:
    return np.frombuffer(array["data"], np.dtype(array["type"]).newbyteorder("<")).reshape(array["shape"])


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


class TestFeatures:
    @pytest.mark.parametrize("edit", ATTENUATIONS)
    def test_they_are_those_of_extract_features(self, shown, edit):
        rows = observe_rows(BACKBONE, DATASET, np.arange(COUNT), store=None)
        fits = fit_thresholds(BACKBONE, DATASET, store=None)
        for source, share in (("key", 0.2), ("token", 0.9), ("attention", 0.8), ("direction", 0.9)):
            theta = float(np.quantile(rows.statistics[source], share))
            setting = itae.fit_setting(BACKBONE, DATASET, ITAE(source, theta, edit, alpha=0.3), thresholds=fits,
                                       store=None)
            expected = extract_features(BACKBONE, DATASET, {"baseline": None, "itae": setting}, store=None)
            for name, values in shown.features(setting).items():
                assert np.abs(values - expected[name]).max() <= 1e-5, (source, name)
            assert not np.allclose(expected["itae"], expected["baseline"], atol=1e-3)
            answer = ask(shown, setting={"source": source, "theta": theta, "edit": edit, "alpha": 0.3})
            found = feature_map(expected, 3, sample=COUNT, seed=0, kmeans_seed=0, store=None)
            assert np.allclose(values_of(answer["change"]), found.change, atol=1e-5)
            assert answer["neighbours"] == [each.tolist() for each in found.neighbours]
            assert answer["clusters"] == [each.tolist() for each in found.clusters]

    def test_without_theta_nothing_changes(self, shown):
        answer = ask(shown, setting={"source": "value", "theta": None, "edit": "mask", "alpha": 0.1})
        assert values_of(answer["change"]).max() < 1e-6
        assert answer["neighbours"][0] == answer["neighbours"][1]

    def test_a_setting_on_the_other_side_and_of_a_higher_rank_stays_so_for_its_statistic(self):
        shown = explore(setting=ITAE("token", "share:10%", tail="low", rank=2))
        for source, tail in (("token", "low"), ("direction", None)):
            theta = float(np.median(shown.fits[-1, source].values))
            setting = ITAE(source, theta, tail=tail, rank=2)
            expected = extract_features(BACKBONE, DATASET, {"baseline": None, "itae": setting}, store=None)
            found = feature_map(expected, 3, sample=COUNT, seed=0, kmeans_seed=0, store=None)
            answer = ask(shown, setting={"source": source, "theta": theta, "edit": "min", "alpha": 0.1})
            assert np.allclose(values_of(answer["change"]), found.change, atol=1e-5)


class TestData:
    def test_the_panel_holds_the_whole_sample(self, monkeypatch):
        monkeypatch.setattr(module, "MOST_IMAGES", 10)
        data = explore(seed=3).data
        drawn = np.sort(np.random.default_rng(3).permutation(COUNT)[:10])
        assert data["panel"]["numbers"] == data["map"]["numbers"] == drawn.tolist()
        rows = observe_rows(BACKBONE, DATASET, drawn, store=None)
        assert np.allclose(values_of(data["panel"]["statistics"]["key"]), rows.statistics["key"], atol=1e-5)
        assert data["run"]["theta"] == fit_thresholds(BACKBONE, DATASET, seed=3, store=None)[-1, "key"].quantile(0.1)
        assert data["live"] == {"blocks": 3, "images": COUNT, "most": 10, "bytes": 512 * 2**20}

    def test_it_takes_as_many_images_as_fit_into_memory(self, monkeypatch):
        monkeypatch.setattr(module, "MOST_BYTES", 7 * 4 * 24 * (5 + 16) + 100)
        shown = explore()
        assert len(shown.data["panel"]["numbers"]) == 7
        assert sum(inputs.tokens.nbytes for inputs in shown.inputs) <= module.MOST_BYTES

    def test_another_block(self, shown):
        for block in (0, 1, 2):
            answer = ask(shown, block=block)
            rows = observe_rows(BACKBONE, DATASET, np.arange(COUNT), block=block, store=None)
            assert (answer["block"], answer["own"]) == (block, None)
            logits = values_of(answer["panel"]["logits"]).astype(float)
            assert np.allclose(logits, rows.logits - rows.logits.max(axis=-1, keepdims=True), rtol=2**-10)
            assert list(answer["panel"]["statistics"]) == list(rows.statistics) == [
                source["name"] for source in answer["sources"]]
            for source in answer["sources"]:
                values = rows.statistics[source["name"]]
                assert np.allclose(values_of(answer["panel"]["statistics"][source["name"]]), values, atol=1e-5)
                assert source["range"] == pytest.approx([values.min(), values.max()], abs=1e-5)
            key = next(source for source in answer["sources"] if source["name"] == "key")
            assert key["threshold"] == pytest.approx(np.quantile(rows.statistics["key"], 0.1), abs=1e-5)

    def test_a_theta_that_is_a_number_is_that_of_all_blocks(self):
        shown = explore(setting=ITAE("key", 1.5))
        assert {source["threshold"] for source in ask(shown, block=0)["sources"] if source["name"] == "key"} == {1.5}


class TestUpload:
    def test_a_file_is_seen_as_the_backbone_sees_it(self, shown):
        for block in (-1, 1):
            own = ask(shown, png(), block=block)["own"]
            picture = Image.open(io.BytesIO(png()))
            rows = observe_rows(BACKBONE, [picture], np.arange(1), block=block, store=None)
            for name, values in rows.statistics.items():
                assert np.allclose(values_of(own["statistics"][name]), values, atol=1e-5)
            assert values_of(own["logits"]).shape == rows.logits.shape
            seen = Image.open(io.BytesIO(base64.b64decode(own["pictures"][0])))
            assert max(seen.size) == min(LARGEST, BACKBONE.image_size)

    @pytest.mark.parametrize("content", [{}, {"block": 9}, {"block": "last"}, {"setting": {}}, {"setting": 3}, {
        "setting": {"source": "keys", "theta": 1.0, "edit": "min", "alpha": 0.1}}, {
        "setting": {"source": "key", "theta": -1.0, "edit": "min", "alpha": 0.1}}, {
        "setting": {"source": "key", "theta": 0.0, "edit": "substitute", "alpha": 0.1}}])
    def test_a_wrong_message_is_answered_in_one_line(self, shown, content):
        problem = ask(shown, **content)["problem"]
        assert 0 < len(problem) <= 200
        assert "\n" not in problem
        assert "problem" not in ask(shown, block=1)

    @pytest.mark.parametrize("content", ["nonsense", None, 3, [], {"block": 0}])
    def test_nonsense_does_no_harm(self, shown, content):
        shown._handle_custom_msg(content, [])
        assert "problem" not in ask(shown, block=1)

    def test_a_file_that_is_no_image_is_answered_in_one_line(self, shown):
        assert "Pillow does not know its format" in ask(shown, b"text", block=0)["problem"]
        assert "problem" not in ask(shown, png(), block=0)


class TestExplore:
    @pytest.mark.parametrize("setting", [ITAE("key", 1.0, blocks=2), ITAE("key", 1.0, select="random")])
    def test_other_settings_are_refused(self, setting):
        with pytest.raises(ItaeError, match="blocks=1 and select='threshold'"):
            explore(setting=setting)

    @pytest.mark.slow
    def test_without_anywidget_one_line_names_the_extra(self):
        code = ("import sys; sys.modules['anywidget'] = None\nimport itae_utils as itae\n"
                "try: itae.explore(None, None)\nexcept itae.ItaeError as error: print(error)")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert re.fullmatch(r".*anywidget.*pip install 'itae-utils\[lab\]'\n", done.stdout)

    def test_images_of_any_kind(self):
        dataset = array_dataset(30)
        assert explore(dataset).data["map"]["classNames"] == list("abc")
        pictures = [replace(dataset, targets=None)[number][0] for number in range(12)]
        assert explore(pictures).data["map"]["classes"] is None


CODE = """import itae_utils as itae
itae.explore(itae.load_backbone("demo"), itae.load_dataset("digits", limit=40), itae.ITAE("key", 2.4), store=None)"""


def write_notebook(path) -> None:
    path.parent.mkdir(parents=True)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_code_cell(CODE), new_code_cell(CODE)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a report's folder with a notebook that papermill has run."""
    folder = tmp_path_factory.mktemp("report")
    path = folder / NOTEBOOKS[0].name / f"{NOTEBOOKS[0].name}.ipynb"
    write_notebook(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PACKAGE.parent))
        papermill.execute_notebook(path, path, progress_bar=False)
    return folder


@pytest.mark.slow
class TestWithoutAKernel:
    def test_papermill_gets_html_and_no_state_of_a_widget(self, folder):
        (path,) = folder.rglob("*.ipynb")
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            assert set(cell.outputs[-1].data) == {"text/html", "text/plain"}
        assert "anywidget" not in str(notebook.metadata)
        assert HTMLExporter().from_notebook_node(notebook)[0].count("\nmount({") == 2

    def test_a_page_of_the_report_shows_both_views_side_by_side(self, folder):
        path = notebook_page(run_of(NOTEBOOKS[0]), NOTEBOOKS, folder)
        with open_chromium() as browser:
            page = browser.new_page()
            page.goto(path.as_uri())
            views = page.locator(".itae-explorer")
            assert views.count() == 2
            for place, theta in enumerate(("0", "100")):
                assert views.nth(place).locator(".strip button").count() == 40
                views.nth(place).get_by_role("spinbutton", name="θ").fill(theta)
            for view, artifacts in zip(views.all(), (0, 49), strict=True):
                view.locator(f".strip [aria-pressed=true][aria-label*=': {artifacts} artifacts']").wait_for()
            assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((each) => each.id)).size"
                                 " === document.querySelectorAll('[id]').length")


def run_first_cell(page) -> None:
    """Run a cell until it has a number: what JupyterLab is told before its kernel is connected is lost."""
    prompt = page.locator(".jp-CodeCell .jp-InputPrompt").first
    for _ in range(120):
        if prompt.inner_text() == "[ ]:":
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(1000)
        if re.search(r"\d", prompt.inner_text()):
            return
    pytest.fail("the cell does not run")


@pytest.mark.slow
def test_in_jupyterlab_features_follow_theta(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    write_notebook(tmp_path / "files/try.ipynb")
    backbone, dataset = itae.load_backbone("demo"), itae.load_dataset("digits", limit=40)
    keys = observe_rows(backbone, dataset, np.arange(40), store=None).statistics["key"]
    theta = float(np.quantile(keys, 0.3))
    features = extract_features(backbone, dataset, {"baseline": None, "itae": ITAE("key", theta)}, store=None)
    found = feature_map(features, 10, sample=40, seed=0, kmeans_seed=0, store=None)
    with open_jupyterlab(tmp_path / "files") as address, open_chromium() as browser:
        page, requests, errors = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
        page.set_default_timeout(120_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda opened: requests.append(opened.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/try.ipynb")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        run_first_cell(page)
        view = page.locator(".itae-explorer")
        view.locator(".strip button").first.wait_for()

        def counts() -> list[int]:
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            labels = view.locator(".strip button").evaluate_all("(all) => all.map((each) => each.ariaLabel)")
            found = dict(map(int, re.match(r"Image (\d+).*: (\d+) artifact", label).groups()) for label in labels)
            return [found[number] for number in range(40)]

        assert counts() == (keys <= np.float32(2.4)).sum(axis=1).tolist()
        view.get_by_role("spinbutton", name="θ").fill(repr(theta))
        assert counts() == (keys <= np.float32(theta)).sum(axis=1).tolist()
        assert "computes" in view.locator(".elsewhere").inner_text()
        view.get_by_text("are those of this setting").wait_for()
        assert f"List the {found.moved.sum()} image" in view.locator(".map-panel button").first.inner_text()
        view.get_by_role("combobox", name="Order").select_option("change")
        assert counts() == (keys <= np.float32(theta)).sum(axis=1).tolist()
        label = view.locator(".strip button").first.get_attribute("aria-label")
        assert int(re.match(r"Image (\d+)", label)[1]) == found.change.argmax()
        assert label.endswith(f"{found.change.max():.3f}")

        handle = view.get_by_role("slider")
        handle.focus()
        page.keyboard.press("ArrowUp")  # a key of JupyterLab's, too
        assert sum(counts()) >= (keys <= np.float32(theta)).sum()
        assert float(handle.get_attribute("aria-valuenow")) > theta

        block = view.get_by_role("combobox", name="Block of 6")
        block.focus()
        block.select_option(index=1)  # a value could also match a label
        view.get_by_text("Block 2 is shown above").wait_for()
        assert page.evaluate("document.activeElement.value") == "1", "the focus stays where it was"
        assert view.get_by_role("spinbutton", name="θ").input_value() == repr(2.4)
        chooser = view.locator("input[type=file]")
        chooser.set_input_files({"name": "my own.png", "mimeType": "image/png", "buffer": png()})
        view.locator(".strip [aria-pressed=true][aria-label^='my own.png']").wait_for()
        chooser.set_input_files({"name": "bad.png", "mimeType": "image/png", "buffer": b"text"})
        view.get_by_text("bad.png: can't read this image (Pillow does not know its format)").wait_for()
        chooser.set_input_files({"name": "large.png", "mimeType": "image/png", "buffer": bytes(8_000_001)})
        view.get_by_text("large.png is larger than 8 MB").wait_for()
        block.select_option(index=5)
        view.get_by_text("Block 2 is shown above").wait_for(state="hidden")
        assert view.locator(".strip button").count() == 41
        assert not view.locator(".elsewhere").is_visible(), "at the run's θ again"
    assert requests
    assert not errors
    assert not [url for url in requests if not re.match(r"(data|blob):|(http|ws)://127\.0\.0\.1:", url)]
