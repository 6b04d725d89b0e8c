"""The explorer in a real browser: what it shows equals Python's numbers, and nothing is loaded from anywhere."""

import base64
import io
import json
import math
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from itae_utils.analysis.feature_map import FeatureMap
from itae_utils.extraction.observation import Rows, observe_rows
from itae_utils.figures.explorer import data as explorer
from itae_utils.figures.explorer.data import as_json, explorer_data, panel_size
from itae_utils.figures.explorer.page import MISSING, explorer_html, script_hashes
from itae_utils.method.artifacts import select_artifacts
from itae_utils.method.attention import attenuated_logits
from itae_utils.method.setting import ATTENUATIONS, ITAE
from itae_utils.method.statistics import cls_attention
from itae_utils.method.thresholds import ThresholdFit
from itae_utils.report.pages import notebook_page
from tests.browser import open_chromium
from tests.conftest import MadeDataset, as_backbone, tiny_vit
from tests.report.test_pages import NOTEBOOKS, run_of

COUNT, SIDES = 40, {"query": "low", "key": "low", "value": "low", "token": "high", "direction": "high",
                    "attention": "high"}
NASTY = "</script><img src=x onerror=alert(1)> & <b>"


class NamedDataset(MadeDataset):
    """Pictures from files, one of which has a name that is HTML."""

    def __init__(self) -> None:
        super().__init__(COUNT)
        self.names = [f"{number:02}.png" for number in range(COUNT - 1)] + [f"{NASTY}.png"]
        self.classes = ["cats", "dogs", NASTY]


@dataclass
class Case:
    """A page of a tiny ViT, and what Python knows of its images."""

    path: Path
    rows: Rows
    found: FeatureMap
    data: dict
    theta: float

    def expected(self, image: int, head: int | None, itae: ITAE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return artifacts (N,), and attention before and after (N,), of one image."""
        place = [self.rows.indices.tolist().index(image)]
        values = torch.from_numpy(self.rows.statistics[itae.source][place])
        artifacts = select_artifacts(values, itae.thresholds[-1], itae, block=2, image_numbers=(image,))
        logits = torch.from_numpy(self.rows.logits[place])[:, :, None]
        both = logits, attenuated_logits(logits, artifacts, itae)
        maps = [cls_attention(each, values.shape[1])[0] for each in both]
        before, after = (each.mean(dim=0) if head is None else each[head] for each in maps)
        return artifacts[0].numpy(), before.numpy(), after.numpy()


def made_map(count: int, seed: int = 0) -> FeatureMap:
    """Return random points, clusters and neighbours of `count` images; a third of the images change their cluster."""
    rng = np.random.default_rng(seed)
    points, clusters = rng.normal(size=(2, count, 2)), rng.integers(0, 3, count)
    neighbours = [np.array([rng.permutation(np.delete(np.arange(count), i))[:5] for i in range(count)]) for _ in "ab"]
    moved = np.where(np.arange(count) % 3 == 0, (clusters + 1) % 3, clusters)
    return FeatureMap(np.arange(count), tuple(points), (clusters, moved), tuple(neighbours), rng.random(count))


def fits_of(rows: Rows) -> dict[str, ThresholdFit]:
    return {source: ThresholdFit(None, math.nan, math.nan, "one mode", rows.statistics[source], side)
            for source, side in SIDES.items()}


def write_page(folder: Path, *outputs: str) -> Path:
    """Write a page of the report that shows HTML, as its notebooks do."""
    run = run_of(NOTEBOOKS[0])
    (folder / run.notebook.name).mkdir(parents=True)
    cells = [new_code_cell("show()", outputs=[new_output("display_data", {"text/html": html})]) for html in outputs]
    notebook = new_notebook(cells=[new_markdown_cell("# What moves?\n\n## 1. A part"), *cells])
    nbformat.write(notebook, folder / run.notebook.name / f"{run.notebook.name}.ipynb")
    return notebook_page(run, NOTEBOOKS, folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    backbone, dataset = as_backbone(tiny_vit("registers")), NamedDataset()
    rows = observe_rows(backbone, dataset, np.arange(COUNT), store=None)
    theta = float(np.quantile(rows.statistics["key"], 0.1))
    found = made_map(COUNT)
    data = explorer_data(backbone, dataset, ITAE("key", theta), fits_of(rows), found, store=None)
    path = write_page(tmp_path_factory.mktemp("explorer"), explorer_html(as_json(data)))
    return Case(path, rows, found, data, theta)


@pytest.fixture(scope="module")
def browser():
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page of a file, and fails the test if the page reports an error."""
    contexts, errors = [], []

    def opened(path: Path, address: str = "", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{path.as_uri()}{address}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def drawn(page) -> None:
    """Wait until the view has drawn what was set."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def state_of(page) -> dict:
    """Return the state that the view saves, with its numbers."""
    drawn(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the state as JSON").click()
    return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))


def choose(page, **fields: object) -> None:
    for label, value in fields.items():
        page.get_by_role("combobox", name=label, exact=True).select_option(str(value))


def set_theta(page, theta: float) -> None:
    page.get_by_role("spinbutton", name="θ").fill(repr(theta))


def middle_of(page, locator) -> tuple[float, float]:
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


class TestNumbers:
    @pytest.mark.parametrize("edit", ATTENUATIONS)
    def test_attention_before_and_after_equals_pythons(self, case, open_page, edit):
        page = open_page(case.path, f"#edit={edit}&image=7")
        for source, share in (("key", 0.1), ("key", 0.6), ("token", 0.3), ("direction", 0.2), ("attention", 0.05),
                              ("value", 1.0)):
            values = case.rows.statistics[source]
            theta = float(np.quantile(values, share if SIDES[source] == "low" else 1 - share))
            choose(page, Statistic=source)
            set_theta(page, theta)
            for head in (None, 1):
                choose(page, Head="mean" if head is None else head)
                if edit == "scale":
                    page.get_by_role("spinbutton", name="α").fill("0.3")
                state = state_of(page)
                assert (state["source"], state["edit"], state["head"]) == (source, edit, head)
                itae = ITAE(source, theta, edit, alpha=0.3)
                for name, expected in zip(("artifacts", "before", "after"), case.expected(7, head, itae), strict=True):
                    assert np.abs(np.array(state[name]) - expected).max() <= 1e-3, (name, source, share, head)
                assert state["share"] == pytest.approx(share, abs=2e-3)

    @pytest.mark.parametrize(("source", "away"), [("key", 0), ("key", -1e-9), ("token", 0), ("token", 1e-9)])
    def test_a_patch_on_theta_is_an_artifact_in_float32(self, case, open_page, source, away):
        theta = float(case.rows.statistics[source][7, 3]) + away
        page = open_page(case.path, f"#image=7&source={source}&theta={theta!r}")
        artifacts, _, _ = case.expected(7, None, ITAE(source, theta))
        assert artifacts[3]
        assert np.array_equal(np.array(state_of(page)["artifacts"], dtype=bool), artifacts)

    def test_an_image_without_artifacts_and_one_without_normal_patches_stay_as_they_are(self, case, open_page):
        page = open_page(case.path, "#image=3&edit=spread")
        for theta, count in ((0.0, 0), (1e6, 16)):
            set_theta(page, theta)
            state = state_of(page)
            assert sum(state["artifacts"]) == count
            assert state["before"] == state["after"]

    def test_a_sample_keeps_the_share_of_a_rare_mode(self, case):
        source = next(each for each in case.data["sources"] if each["name"] == "key")
        assert sum(source["counts"]) == source["patches"] == case.rows.statistics["key"].size


class TestTheta:
    def count(self, page) -> int:
        return int(re.search(r"(\d+) artifacts?,", page.locator(".strip button[aria-pressed=true]").get_attribute(
            "aria-label"))[1])

    def test_dragging_the_handle_changes_the_artifacts(self, case, open_page):
        page = open_page(case.path, "#image=5&order=count")
        drawn(page)
        x, y = middle_of(page, page.get_by_role("slider"))
        page.mouse.move(x, y)
        page.mouse.down()
        found = set()
        for step in (40, 160, 320):
            page.mouse.move(x + step, y, steps=4)
            drawn(page)
            theta = page.get_by_role("spinbutton", name="θ").input_value()
            expected = int((case.rows.statistics["key"][5] <= np.float32(theta)).sum())
            assert self.count(page) == expected
            assert f"theta={theta}" in page.url
            found.add(expected)
        page.mouse.up()
        assert len(found) == 3
        page.mouse.move(x, y)
        drawn(page)
        assert self.count(page) == expected, "the handle moves only while it is held"

    def test_the_keyboard_moves_the_handle(self, case, open_page):
        page = open_page(case.path)
        handle = page.get_by_role("slider")
        handle.focus()
        for key, sign in (("ArrowRight", 1), ("PageDown", -1)):
            before = float(handle.get_attribute("aria-valuenow"))
            page.keyboard.press(key)
            drawn(page)
            assert sign * (float(handle.get_attribute("aria-valuenow")) - before) > 0
        page.keyboard.press("End")
        drawn(page)
        assert "100 % of the patches" in handle.get_attribute("aria-valuetext")

    def test_the_map_says_when_theta_is_not_that_of_the_run(self, case, open_page):
        page = open_page(case.path)
        note = page.locator(".elsewhere")
        drawn(page)
        assert not note.is_visible()
        set_theta(page, case.theta * 1.5)
        drawn(page)
        assert note.is_visible()
        page.get_by_role("button", name="Back to the run").click()
        drawn(page)
        assert not note.is_visible()
        assert state_of(page)["theta"] == case.theta

    def test_numbers_that_are_not_valid_do_not_stay(self, case, open_page):
        page = open_page(case.path, "#edit=scale&alpha=0.3&theta=-1")
        assert state_of(page)["theta"] == case.theta
        for name, wrong, kept in (("θ", "-3", repr(case.theta)), ("α", "1", "0.3")):
            field = page.get_by_role("spinbutton", name=name)
            field.fill(wrong)
            field.press("Tab")
            assert field.input_value() == kept
        assert state_of(page)["alpha"] == 0.3

    def test_a_link_to_a_section_keeps_the_view(self, case, open_page):
        page = open_page(case.path, "#image=3&theta=1.5")
        page.get_by_role("navigation", name="Contents").get_by_role("link").click()
        page.wait_for_url("**#section-1")
        state = state_of(page)
        assert (state["image"], state["theta"]) == (3, 1.5)
        page.evaluate("location.hash = '#image=4'")
        page.wait_for_function("location.hash === '#image=4'")
        state = state_of(page)
        assert (state["image"], state["theta"]) == (4, case.theta)

    def test_each_statistic_keeps_its_own_theta(self, case, open_page):
        page = open_page(case.path)
        set_theta(page, 1.25)
        choose(page, Statistic="token")
        assert state_of(page)["theta"] is None
        choose(page, Statistic="key")
        assert state_of(page)["theta"] == 1.25

    def test_theta_to_picture_is_fast_for_256_patches_and_12_heads(self, browser, open_page, tmp_path):
        data = big_data(images=128, heads=12, side=16)
        page = open_page(write_page(tmp_path, explorer_html(as_json(data))))
        times = page.evaluate(MEASURE)
        print(f"from θ to the picture: median {np.median(times):.1f} ms, longest {max(times):.1f} ms")
        assert np.median(times) <= 150  # three times the promise, for busy machines


MEASURE = """async () => {
  const field = document.querySelector(".theta-panel input"), times = [];
  for (let i = 0; i < 30; i++) {
    const start = performance.now();
    field.value = 1 + i / 40;
    field.dispatchEvent(new Event("input"));
    await new Promise((done) => requestAnimationFrame(() => { const channel = new MessageChannel();
      channel.port1.onmessage = done; channel.port2.postMessage(0); }));
    times.push(performance.now() - start);
  }
  return times.slice(5);
}"""


def big_data(images: int, heads: int, side: int) -> dict:
    """Return random data of a given size for the view, without a model."""
    rng, patches = np.random.default_rng(0), side * side
    rows = Rows(np.arange(images), (side, side), {source: rng.gamma(9, 0.2, (images, patches)).astype(np.float32)
                                                  for source in SIDES}, rng.normal(size=(images, heads, patches + 1)))
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(picture, "jpeg")
    jpeg = base64.b64encode(picture.getvalue()).decode()
    found, array = made_map(images), explorer._array
    sources = [explorer.source_data(source, fit, ITAE("key", 1.0)) for source, fit in fits_of(rows).items()]
    on_map = explorer._map(MadeDataset(images), found, [jpeg] * images)
    panel = {"numbers": list(range(images)), "pictures": [jpeg] * images,
             "logits": array(rows.logits - rows.logits.max(axis=-1, keepdims=True), "float16"),
             "statistics": {source: array(values, "float32") for source, values in rows.statistics.items()}}
    run = {"source": "key", "theta": 1.0, "edit": "min", "alpha": 0.1}
    return {"grid": [side, side], "run": run, "sources": sources, "panel": panel, "map": on_map}


class TestImagePanel:
    def values(self, page) -> dict[str, float]:
        drawn(page)
        pairs = page.locator(".readout dl > div").all()
        return {pair.locator("dt").inner_text(): pair.locator("dd").inner_text() for pair in pairs}

    def at(self, page, patch: int) -> dict[str, float]:
        box = page.locator(".pictures canvas").first.bounding_box()
        return {"x": box["width"] * (patch % 4 + 0.5) / 4, "y": box["height"] * (patch // 4 + 0.5) / 4}

    def check(self, case, page, image: int, patch: int) -> None:
        shown = self.values(page)
        assert float(shown["‖key‖₂"]) == float(f"{case.rows.statistics['key'][image, patch]:.4g}")
        before = case.expected(image, None, ITAE("key", case.theta))[1][patch]
        assert float(shown["share before"].removesuffix(" %")) == pytest.approx(100 * before, rel=0.06)
        assert f"Row {patch // 4}, column {patch % 4}" in page.locator(".readout").inner_text()

    def test_pointing_reads_a_patch_and_a_click_pins_it(self, case, open_page):
        page = open_page(case.path, "#image=2")
        drawn(page)
        canvas = page.locator(".pictures canvas")
        canvas.nth(0).hover(position=self.at(page, 6))
        self.check(case, page, 2, 6)
        canvas.nth(2).click(position=self.at(page, 9))
        page.mouse.move(0, 0)
        self.check(case, page, 2, 9)
        assert "pinned" in page.locator(".readout").inner_text()
        assert state_of(page)["patch"] == 9

    def test_a_tap_and_the_keyboard_do_the_same(self, case, open_page):
        page = open_page(case.path, "#image=2", has_touch=True, viewport={"width": 390, "height": 800})
        drawn(page)
        page.locator(".pictures canvas").first.tap(position=self.at(page, 5))
        self.check(case, page, 2, 5)
        page.locator(".pictures canvas").first.focus()
        for key in ("ArrowDown", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        self.check(case, page, 2, 10)
        assert state_of(page)["patch"] == 10

    def test_the_strip_is_sorted_and_shows_another_image(self, case, open_page):
        page = open_page(case.path)
        counts = (case.rows.statistics["key"] <= np.float32(case.theta)).sum(axis=1)
        held = (case.rows.statistics["attention"] * (case.rows.statistics["key"] <= np.float32(case.theta))).sum(axis=1)
        for order, values in (("count", counts), ("change", case.found.change), ("attention", held)):
            choose(page, Order=order)
            drawn(page)
            names = [each.get_attribute("aria-label") for each in page.locator(".strip button").all()]
            places = [COUNT - 1 if NASTY in name.split(":")[0] and ".png" in name and not name[:2].isdigit()
                      else int(name[:2]) for name in names]
            assert sorted(places) == list(range(COUNT))
            assert np.all(np.diff(np.asarray(values, dtype=np.float64)[places]) <= 1e-6), order
        page.locator(".strip button").nth(4).click()
        assert state_of(page)["image"] == places[4]

    def test_the_tab_key_passes_the_strip_in_one_step(self, case, open_page):
        page = open_page(case.path, "#image=4")
        drawn(page)
        buttons = page.locator(".strip button")
        page.get_by_role("combobox", name="Order").focus()
        page.keyboard.press("Tab")
        focused = "document.activeElement.ariaLabel"
        assert page.evaluate(focused).startswith("04")
        place = next(i for i, each in enumerate(buttons.all()) if each.get_attribute("aria-label").startswith("04"))
        page.keyboard.press("ArrowRight" if place < COUNT - 1 else "ArrowLeft")
        neighbour = buttons.nth(place + 1 if place < COUNT - 1 else place - 1)
        assert page.evaluate(focused) == neighbour.get_attribute("aria-label")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('.strip') === null")


class TestMap:
    def test_a_line_around_points_fills_the_sheet(self, case, open_page):
        page = open_page(case.path)
        canvas = page.locator(".maps canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        places = self.places(page, case, 0)
        right = [i for i, (x, _) in enumerate(places) if x > box["width"] / 2]
        middle, width, height = box["width"] / 2, box["width"] - 2, box["height"] - 2
        corners = [(width, 2), (width, height), (middle, height), (middle, 2), (width, 2)]
        page.mouse.move(box["x"] + width, box["y"] + 2)
        page.mouse.down()
        for x, y in corners:
            page.mouse.move(box["x"] + x, box["y"] + y, steps=3)
        page.mouse.up()
        drawn(page)
        assert 0 < len(right) < COUNT
        assert page.locator(".sheet button").count() == len(right)
        page.get_by_role("button", name="Clear").click()
        assert page.locator(".sheet button").count() == 0

    def places(self, page, case, side: int) -> np.ndarray:
        """Return where the points are on a canvas, in CSS pixels: centred, on one scale for both axes."""
        box = page.locator(".maps canvas").nth(side).bounding_box()
        points = case.found.points[side] * (1, -1)
        low, high = points.min(axis=0), points.max(axis=0)
        size = np.array([box["width"], box["height"]])
        return size / 2 + (points - (low + high) / 2) * ((size - 24) / (high - low)).min()

    def test_an_images_neighbours_before_and_after(self, case, open_page):
        page = open_page(case.path, "#pick=11")
        drawn(page)
        before, after = (each[11].tolist() for each in case.found.neighbours)
        for row, own, other, mark in ((0, before, after, "lost"), (1, after, before, "gained")):
            items = page.locator(".neighbours").nth(row).locator("button")
            names = [item.get_attribute("aria-label") for item in items.all()]
            marked = {place for place, name in zip(own, names, strict=True) if name.endswith(mark)}
            assert marked == set(own) - set(other)
        page.locator(".neighbours").first.locator("button").first.click()
        assert state_of(page)["pick"] == before[0]

    def test_a_click_on_a_point_shows_its_image_in_both_panels(self, case, open_page):
        page = open_page(case.path)
        x, y = self.places(page, case, 1)[17]
        canvas = page.locator(".maps canvas").nth(1)
        canvas.hover(position={"x": x, "y": y})
        drawn(page)
        assert page.locator(".tip").is_visible()
        canvas.click(position={"x": x, "y": y})
        state = state_of(page)
        assert (state["pick"], state["image"]) == (17, 17)

    def test_the_picture_beside_a_point_stays_inside_a_narrow_window(self, case, open_page):
        page = open_page(case.path, viewport={"width": 390, "height": 800})
        drawn(page)
        for x, y in self.places(page, case, 0)[::4]:
            page.locator(".maps canvas").first.hover(position={"x": x, "y": y})
            box = page.locator(".tip").bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390

    def test_the_keyboard_moves_over_the_map(self, case, open_page):
        page = open_page(case.path, "#pick=11")
        drawn(page)
        page.locator(".maps canvas").first.focus()
        places = self.places(page, case, 0)
        page.keyboard.press("ArrowRight" if places[11][0] < places[:, 0].max() else "ArrowLeft")
        page.keyboard.press("Enter")
        assert state_of(page)["pick"] not in (11, None)

    def test_images_whose_cluster_changed_are_listed(self, case, open_page):
        page = open_page(case.path)
        page.get_by_role("button", name="whose cluster changed").click()
        assert page.locator(".sheet button").count() == case.found.moved.sum()


class TestAddress:
    def test_it_holds_the_state(self, case, open_page):
        page = open_page(case.path, "#image=12&theta=2.5&head=2&scale=linear&edit=scale&alpha=0.25&patch=3&frames=0")
        state = state_of(page)
        given = {"image": 12, "theta": 2.5, "head": 2, "scale": "linear", "edit": "scale", "alpha": 0.25, "patch": 3,
                 "frames": False}
        assert state | given == state
        again = open_page(case.path, f"#{page.url.partition('#')[2]}")
        assert state_of(again) == state

    def test_what_is_not_valid_is_ignored(self, case, open_page):
        plain = state_of(open_page(case.path))
        nonsense = "#image=999&theta=x&head=-1&scale=log&edit=none&alpha=2&patch=16&pick=1e9&colour=red&other=1"
        assert state_of(open_page(case.path, nonsense)) == plain

    def test_a_new_address_in_an_open_page_is_followed(self, case, open_page):
        page = open_page(case.path)
        page.evaluate("location.hash = 'image=9&head=1'")
        page.locator(".strip [aria-pressed=true][aria-label^='09']").wait_for()
        assert (state_of(page)["image"], state_of(page)["head"]) == (9, 1)


class TestPage:
    def test_no_request_leaves_it_and_no_other_script_runs(self, case, open_page, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"http://127.0.0.1:{server.getsockname()[1]}"
            html = explorer_html(as_json(case.data)).replace("</div>", "</div><script>window.foreign = 1</script>", 1)
            others = (f"<img src='{place}/x.png'><img src=x onerror='window.foreign = 2'>"
                      f"<link rel=stylesheet href={place}><script src={place}></script>")
            page = open_page(write_page(tmp_path, html, others))
            drawn(page)
            assert page.locator(".strip button").count() == COUNT
            assert page.evaluate("window.foreign") is None
            assert page.evaluate("(place) => fetch(place).then(() => 'sent', () => 'refused')", place) == "refused"
            server.settimeout(0.5)
            with pytest.raises(TimeoutError):
                server.accept()

    def test_names_are_text(self, case, open_page):
        assert NASTY not in case.path.read_text(encoding="utf-8")
        page = open_page(case.path, f"#image={COUNT - 1}")
        drawn(page)
        assert NASTY in page.locator(".image-panel .summary").inner_text()
        assert NASTY in page.locator(".legend").inner_text()
        assert page.locator("img[src=x]").count() == 0

    def test_without_javascript_it_says_what_is_missing(self, case, open_page):
        page = open_page(case.path, java_script_enabled=False)
        assert page.get_by_text(MISSING).is_visible()
        assert not open_page(case.path).get_by_text(MISSING).is_visible()

    @pytest.mark.parametrize("width", [1280, 390])
    def test_nothing_is_wider_than_the_window(self, case, open_page, width):
        page = open_page(case.path, "#pick=11&patch=3", viewport={"width": width, "height": 800})
        page.get_by_role("button", name="whose cluster changed").click()
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = page.evaluate("""() => [...document.querySelectorAll(
                ".itae-explorer :is(p, button, label, figcaption, h3, li)")]
            .filter((each) => each.offsetParent && !each.matches(".unseen") && each.scrollWidth > each.clientWidth + 1)
            .map((each) => each.outerHTML.slice(0, 200))""")
        assert not cut

    def test_it_has_no_accessibility_faults(self, case, open_page):
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        page = open_page(case.path, "#pick=11&patch=3")
        page.get_by_role("button", name="whose cluster changed").click()
        set_theta(page, 2.0)
        drawn(page)
        faults = [fault for fault in axe.Axe().run(page).response["violations"] if fault["impact"] != "minor"]
        assert not [(fault["id"], [node["html"] for node in fault["nodes"][:2]]) for fault in faults]

    def test_the_panel_is_saved_as_a_picture(self, case, open_page):
        page = open_page(case.path, "#image=12", viewport={"width": 390, "height": 800})
        drawn(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as PNG").click()
        assert download.value.suggested_filename == "itae-12.png"
        picture = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
        white = (picture[20:80] == 255).all(axis=(0, 2))  # columns, above the words
        spans = np.diff(np.flatnonzero(np.diff(np.r_[True, white, True])))[::2]
        assert len(spans) == 3
        assert np.ptp(spans) <= 1, "the maps are as large as the image"


class TestData:
    def test_arrays_and_pictures(self, case):
        panel, on_map = case.data["panel"], case.data["map"]
        logits = np.frombuffer(panel["logits"]["data"], "<f2").reshape(panel["logits"]["shape"])
        assert logits.shape == case.rows.logits.shape
        assert np.abs(logits.max(axis=-1)).max() == 0
        spread = case.rows.logits - case.rows.logits.max(axis=-1, keepdims=True)
        assert np.allclose(logits, spread, rtol=2**-10)
        assert Image.open(io.BytesIO(base64.b64decode(panel["pictures"][0]))).size == (32, 32)
        assert len(on_map["pictures"]) == COUNT

    @pytest.mark.parametrize(("heads", "tokens", "jpeg"), [(6, 257, 15_000), (12, 257, 15_000), (24, 1370, 20_000)])
    def test_as_many_images_as_fit_into_a_page(self, heads, tokens, jpeg):
        used = 2_700_000
        count = panel_size(jpeg, tokens, heads, tokens - 1, 6, used)
        each = jpeg + 4 / 3 * (2 * heads * tokens + 24 * (tokens - 1))
        assert used + count * each <= 7_850_000
        assert count == explorer.MOST_IN_PANEL or used + (count + 1) * each > 7_850_000
        assert count >= 20

    def test_json_can_stand_in_a_script(self):
        text = as_json({"name": f"{NASTY}\u2028<!--"})
        assert json.loads(text) == {"name": f"{NASTY}\u2028<!--"}
        assert not set("<>&\u2028") & set(text)

    def test_only_the_explorers_own_script_is_let_through(self):
        own = explorer_html("{}")
        assert len(script_hashes(own)) == 1
        assert not script_hashes(own.replace("const ", "var ", 1))
        assert not script_hashes('<script type="module">alert(1)</script>')
