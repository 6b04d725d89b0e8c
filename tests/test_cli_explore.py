"""`itae explore` writes a page that shows Python's numbers, also of a few images and of files with awkward names."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from click.testing import CliRunner
from PIL import Image

from itae_utils import cli
from itae_utils.analysis.feature_map import feature_map, map_points
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.features import extract_features
from itae_utils.method.attention import attention_map
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import qkv_norms
from itae_utils.models.backbones import load_backbone
from tests.browser import open_chromium
from tests.figures.test_explorer import drawn, middle_of
from tests.test_cli import read_features

NAMES = ["a b.png", "it's \"q\".png", "<img src=x onerror=alert(1)>.png", "صورة جميلة.png", "&amp;.png", "{{ x }}.png",
         "$x_1$ `*b*`.png", "7.png", "8.png", "9.png"]


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Run a command that must refuse its input in one line, and return the line."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    return result.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Ten digits as files, below a folder whose name would end a script."""
    folder = tmp_path_factory.mktemp("explore") / "</script><b>"
    (folder / "sub").mkdir(parents=True)
    digits = load_dataset("digits")
    paths = [folder / "sub" / name if number else folder / name for number, name in enumerate(NAMES)]
    for number, path in enumerate(paths):
        digits[number][0].resize((30 + number, 40)).save(path)
    return paths


def data_of(page: Path) -> dict:
    """Return the data in a page's script."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r"^mount\((.*)\);$", text, re.MULTILINE)
    return json.loads(found)


def numbers(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["data"]), f"<f{2 if array['type'] == 'float16' else 4}").reshape(
        array["shape"])


def tensor_of(backbone, dataset) -> torch.Tensor:
    return torch.stack([backbone.transform(dataset[index][0]) for index in range(len(dataset))])


class Outline(HTMLParser):
    """The tags of a page, and the text of each kind of tag."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag] = self.texts.get(tag, "") + data


class TestNumbers:
    def test_the_page_of_files_holds_pythons_numbers(self, photos, tmp_path):
        page = tmp_path / "new" / "page.html"
        result = run("explore", *photos, "--threshold", "share:8%", "--output", page)
        assert result.exit_code == 0, result.output
        assert list(page.parent.iterdir()) == [page]
        data, backbone, dataset = data_of(page), load_backbone("demo"), load_dataset(photos)
        inputs = tensor_of(backbone, dataset)
        keys = qkv_norms(backbone.model, inputs)["key"].flatten(1).numpy()
        assert data["panel"]["numbers"] == data["map"]["numbers"] == list(range(10))
        np.testing.assert_allclose(numbers(data["panel"]["statistics"]["key"]), keys, rtol=1e-5)
        theta = float(np.quantile(keys, 0.08))
        assert data["run"] == {"source": "key", "theta": pytest.approx(theta, rel=1e-5), "edit": "min", "alpha": 0.1}
        weights = np.exp(numbers(data["panel"]["logits"]).astype(float))
        shares = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)[:, -49:]
        expected = attention_map(backbone.model, inputs).flatten(1).numpy()
        assert np.abs(shares - expected).max() < 1e-3
        features = extract_features(backbone, dataset, {"baseline": None, "itae": ITAE("key", theta)}, store=None)
        found = feature_map(features, 5, sample=800, seed=0, kmeans_seed=0, store=None)
        for points, other in zip(data["map"]["points"], found.points, strict=True):
            np.testing.assert_allclose(numbers(points), other, atol=1e-2)
        assert data["map"]["clusters"] == [each.tolist() for each in found.clusters]
        np.testing.assert_allclose(numbers(data["map"]["change"]), found.change, atol=1e-5)
        assert (data["map"]["names"], data["map"]["classes"]) == (dataset.names, None)
        said, threshold = result.stdout.splitlines()
        assert said == f"{page}: {page.stat().st_size / 1e6:.1f} MB, 10 of 10 images with their attention"
        assert threshold == f"θ = {theta:.4g} on the norm of the key: 8.2 % of the sample's patches lie at or below it"

    def test_a_data_set_with_a_limit_a_sample_and_a_setting(self, tmp_path):
        page = tmp_path / "page.html"
        result = run("explore", "--limit", 60, "--sample", 40, "--source", "token", "--threshold", 20, "--attenuation",
                     "spread", "--batch-size", 7, "--output", page)
        assert result.exit_code == 0, result.output
        data, dataset = data_of(page), load_dataset("digits", limit=60)
        assert len(data["map"]["numbers"]) == len(data["panel"]["numbers"]) == 40
        assert data["map"]["classes"] == dataset.targets[data["map"]["numbers"]].tolist()
        assert (data["run"]["source"], data["run"]["theta"], data["run"]["edit"]) == ("token", 20, "spread")
        assert "40 of 60 images" in result.stdout
        assert "θ = 20 on the norm of the token" in result.stdout

    def test_a_folder_with_names_that_are_html(self, photos, tmp_path):
        page = tmp_path / "page.html"
        assert run("explore", "--dataset", photos[0].parent, "--limit", 5, "--output", page).exit_code == 2
        assert run("explore", "--dataset", photos[1].parent, "--limit", 5, "--output", page).exit_code == 0
        assert set(data_of(page)["map"]["names"]) <= set(NAMES[1:])
        assert Outline(page).texts["title"] == "Attention artifacts of demo on sub"


class TestPage:
    def test_awkward_names_are_text(self, photos, tmp_path):
        page = tmp_path / "page.html"
        assert run("explore", *photos[1:4], "--output", page).exit_code == 0
        outline = Outline(page)
        tags = [tag for tag, _ in outline.tags]
        assert (tags.count("script"), tags.count("img"), tags.count("b")) == (1, 0, 0)
        assert photos[1].parent.as_posix() in outline.texts["section"]
        assert "**" not in outline.texts["section"], "Markdown is rendered"
        assert ("html", {"lang": "en"}) in outline.tags
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in outline.tags
        assert outline.texts["h1"] == outline.texts["title"] == "Attention artifacts of demo on image files"
        (policy,) = [each["content"] for tag, each in outline.tags if tag == "meta" and "http-equiv" in each]
        assert re.match(r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src", policy)

    @pytest.mark.parametrize(("count", "has_map"), [(1, False), (2, False), (3, False), (4, True)])
    def test_a_few_images(self, photos, tmp_path, count, has_map):
        page = tmp_path / "page.html"
        result = run("explore", *photos[:count], "--output", page)
        assert result.exit_code == 0, result.output
        data = data_of(page)
        assert (data["map"]["points"] is not None) == has_map
        assert data["run"]["theta"] is None
        assert f"no θ on the norm of the key: {49 * count} patches are too few" in result.stdout
        assert ("on the map" in Outline(page).texts["section"]) == has_map

    def test_equal_images_have_no_map_and_say_nothing_on_stderr(self, photos, tmp_path, recwarn):
        paths = [tmp_path / f"{number}.png" for number in range(5)]
        for path in paths:
            path.write_bytes(photos[0].read_bytes())
        result = run("explore", *paths, "--output", tmp_path / "page.html")
        assert (result.exit_code, result.stderr) == (0, "")
        assert data_of(tmp_path / "page.html")["map"]["points"] is None
        assert not [each for each in recwarn if "distinct" in str(each.message)]

    def test_an_unreadable_image_and_one_given_twice(self, photos, tmp_path):
        page, bad = tmp_path / "page.html", tmp_path / "bad.png"
        bad.write_text("no image")
        command = ("explore", photos[0], bad, photos[1], photos[0], "--output", page)
        assert str(bad) in refused(*command)
        assert not page.exists()
        result = run(*command, "--on-error", "skip")
        assert result.exit_code == 0, result.output
        assert "2 of 2 images" in result.stdout
        assert "Paths that are given again: 1.\n1 of 3 images can't be read" in result.stdout
        common = os.path.commonpath([photos[0].parent, tmp_path])
        assert data_of(page)["map"]["names"] == [os.path.relpath(path, common) for path in photos[:2]]

    def test_home_is_expanded(self, photos, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        Image.open(photos[0]).save(tmp_path / "a.png")
        assert run("explore", "~/a.png", "--output", "~/page.html").exit_code == 0
        assert data_of(tmp_path / "page.html")["map"]["names"] == ["a.png"]


@pytest.mark.parametrize(("arguments", "said"), [
    (("{photo}", "--dataset", "digits"), "image files and --dataset"), (("{folder}",), "imagefolder:{folder}"),
    (("{folder}/nowhere.png",), "no file {folder}/nowhere.png"), (("{photo}", "--split", "train"), "split='train'"),
    (("{photo}", "--label-column", "x"), "label_column='x'"), (("--output", "page.txt"), "must end in .html"),
    (("--output", "page"), "must end in .html"), (("--output", "a.html"), "is a folder"),
    (("--output", "file/page.html"), "can't be made"),
    (("--sample", "0"), "sample=0"), (("{photo}", "--backbone", "demoo"), "did you mean demo"),
    (("{photo}", "--source", "direction", "--rank", "999"), "rank=999"),
    (("{photo}", "--threshold", "share:60%"), "threshold='share:60%'")])
def test_bad_input_is_one_line_and_writes_nothing(photos, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.html").mkdir()
    (tmp_path / "file").touch()
    names = {"photo": photos[0], "folder": photos[0].parent}
    before = sorted(tmp_path.rglob("*"))
    assert said.format(**names) in refused("explore", *(each.format(**names) for each in arguments))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def browser():
    with open_chromium() as browser:
        yield browser


class TestInABrowser:
    @pytest.fixture
    def opened(self, browser, photos, tmp_path):
        """Return a function that opens the page of some images, and the requests that left it."""
        requests, errors, contexts = [], [], []

        def opened(count: int, width: int = 1280, *options: str):
            assert run("explore", *photos[:count], *options, "--output", tmp_path / "page.html").exit_code == 0
            contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
            page = contexts[-1].new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text))
            page.on("request", lambda request: requests.append(request.url))
            page.goto((tmp_path / "page.html").as_uri())
            page.locator(".strip button").first.wait_for()
            drawn(page)
            return page

        yield opened
        assert not errors
        assert [url for url in requests if not url.startswith("data:")] == [
            (tmp_path / "page.html").as_uri()] * len(contexts)
        for context in contexts:
            context.close()

    @pytest.mark.parametrize("count", [1, 3, 10])
    def test_the_handle_gives_a_theta_where_there_was_none(self, opened, photos, count):
        page = opened(count)
        assert "There is no θ" in page.locator(".share").inner_text()
        field = page.get_by_role("spinbutton", name="θ")
        assert field.input_value() == ""
        x, y = middle_of(page, page.get_by_role("slider"))
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 600, y, steps=3)
        page.mouse.up()
        drawn(page)
        theta, backbone, dataset = float(field.input_value()), load_backbone("demo"), load_dataset(photos[:count])
        keys = qkv_norms(backbone.model, tensor_of(backbone, dataset))["key"].flatten(1).numpy()
        counts = (keys <= np.float32(theta)).sum(axis=1).tolist()
        page.get_by_role("combobox", name="Order").select_option("count")
        drawn(page)
        assert f"theta={theta}" in page.url
        labels = [each.get_attribute("aria-label") for each in page.locator(".strip button").all()]
        assert [int(re.search(r": (\d+) artifact", label)[1]) for label in labels] == sorted(counts, reverse=True)
        assert max(counts) > 4
        assert page.locator(".maps canvas").count() == (2 if count == 10 else 0)
        assert page.get_by_text("There is no map: it needs at least 4 images").count() == (0 if count == 10 else 1)

    @pytest.mark.parametrize("width", [1280, 390])
    @pytest.mark.parametrize("count", [3, 10])
    def test_nothing_is_clipped_and_axe_finds_nothing(self, opened, width, count):
        page = opened(count, width, "--threshold", "share:8%")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("""[...document.querySelectorAll('p, h1, h2, h3, li, dd, button, label, select')].filter(
            (each) => !each.closest('.unseen, .strip') && each.scrollWidth > each.clientWidth + 1).length""") == 0
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


class TestExtractMap:
    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_columns_are_the_points_of_the_map_and_the_paths(self, photos, tmp_path, suffix):
        output, folder = tmp_path / f"features.{suffix}", photos[1].parent
        result = run("extract", "--dataset", folder, "--threshold", "share:8%", "--map", "--output", output)
        assert result.exit_code == 0, result.output
        arrays, _ = read_features(output)
        assert set(arrays) == {"baseline", "itae", "names", "x", "y", "itae_x", "itae_y", "path"}
        features = {name: arrays[name] for name in ("baseline", "itae")}
        found = feature_map(features, 4, sample=800, seed=0, kmeans_seed=0, store=None)
        assert not np.array_equal(found.points[0], found.points[1])
        for prefix, points in zip(("", "itae_"), found.points, strict=True):
            np.testing.assert_array_equal(np.stack([arrays[f"{prefix}x"], arrays[f"{prefix}y"]], axis=1), points)
        assert [Path(path) for path in arrays["path"]] == [folder / name for name in arrays["names"]]
        assert sorted(arrays["path"]) == sorted(map(str, photos[1:]))

    def test_images_that_are_no_files_have_no_path_and_without_map_nothing_is_added(self, tmp_path):
        for options, expected in ((("--map",), {"x", "y", "itae_x", "itae_y"}), ((), set())):
            result = run("extract", "--limit", 20, *options, "--output", tmp_path / "f.npz")
            assert result.exit_code == 0, result.output
            arrays, _ = read_features(tmp_path / "f.npz")
            assert set(arrays) == {"baseline", "itae", "targets", *expected}
        x, y = map_points(arrays["baseline"], arrays["itae"], seed=0, store=None)[0].T
        run("extract", "--limit", 20, "--map", "--output", tmp_path / "f.npz")
        arrays, _ = read_features(tmp_path / "f.npz")
        assert np.array_equal(arrays["x"], x)
        assert np.array_equal(arrays["itae_y"], y), "without θ both maps are equal"

    @pytest.mark.parametrize(("limit", "most"), [(3, 10_000), (20, 19)])
    def test_too_few_and_too_many_images_are_refused_before_they_are_read(self, tmp_path, monkeypatch, limit, most):
        monkeypatch.setattr("itae_utils.analysis.feature_map.MOST_IN_TSNE", most)
        monkeypatch.setattr("itae_utils.extract_features", None)
        assert f"--map of {limit} images: use 4 to {most:,}" in refused(
            "extract", "--limit", limit, "--map", "--output", tmp_path / "f.npz")

    def test_equal_images_are_refused(self, photos, tmp_path):
        (tmp_path / "equal").mkdir()
        for number in range(5):
            (tmp_path / "equal" / f"{number}.png").write_bytes(photos[0].read_bytes())
        assert "the same features" in refused("extract", "--dataset", tmp_path / "equal", "--map", "--output",
                                              tmp_path / "f.npz")
        assert not (tmp_path / "f.npz").exists()

    def test_a_path_that_is_not_utf_8_is_refused(self, photos, tmp_path):
        (tmp_path / "photos").mkdir()
        for number in range(4):
            (tmp_path / "photos" / f"{number}\udcff.png").write_bytes(photos[number].read_bytes())
        command = ("extract", "--dataset", tmp_path / "photos", "--output", tmp_path / "f.parquet")
        assert "UTF-8: rename" in refused(*command, "--map")
        assert run(*command).exit_code == 0
