"""Configuration of the documentation site, which `make docs` builds. Nothing is loaded from a network."""

import shutil
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator

import itae_utils

REPORT = Path(__file__).parents[1] / "reports" / "demo-demo-digits"

project = "itae-utils"
copyright = "the authors of itae-utils; MIT licence"
release = version = itae_utils.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
nitpicky = True
# Names of other packages, whose documents are not asked because the build needs no network, and internal classes.
nitpick_ignore_regex = [("py:.*", r"(?!itae_utils).*"), ("py:.*", r".*\.(CapturedTruth|StoredVariant|ArrayKind)")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings write `code`
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "ITAE"
html_math_renderer = "mathml"
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    """Render equations as MathML, which browsers show without a script, and copy the demo's report into the site."""
    app.add_html_math_renderer("mathml", (_mathml(as_block=False), None), (_mathml(as_block=True), None))
    app.connect("build-finished", _copy_report)


def _mathml(as_block: bool) -> Callable[[HTML5Translator, nodes.Node], None]:
    def visit(translator: HTML5Translator, node: nodes.Node) -> None:
        translator.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    return visit


def _copy_report(app: Sphinx, error: Exception | None) -> None:
    if error is not None:
        return
    if not (REPORT / "index.html").exists():
        raise ExtensionError(f"{REPORT} has no report, which is part of the site: run `make report` first")
    shutil.copytree(REPORT, Path(app.outdir) / "report", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ipynb"))
