import json
import sys

from itae_utils.files import PACKAGE
from itae_utils.report.kernel import execute
from tests.tiny_notebooks import PARAMETERS, write_notebook


def test_a_failing_notebook_in_a_folder_with_braces(tmp_path):
    """Braces in a path are no parameters, and a kernel ends by itself: its exit handlers run."""
    folder = tmp_path / "a {seed} {b"
    path = write_notebook(
        folder, "01_first", "import atexit, pathlib\natexit.register(pathlib.Path('ended').touch)",
        "print('SEED', seed)\nraise ValueError('a\\n b')", parameters=PARAMETERS, measure=False)
    target = folder / "{out}.ipynb"
    assert execute(path, target, {"seed": 7}) == "ValueError: a b (cell [4])"
    assert "SEED 7" in target.read_text(encoding="utf-8")
    assert (folder / "ended").exists()


def test_the_kernel_is_this_python_with_this_package(tmp_path, monkeypatch):
    """Not another kernel of the same name, another copy of the package, or a backend without inline figures."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    other = tmp_path / "other" / "itae_utils" / "__init__.py"
    for path in (spec, other):
        path.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/python", "{connection_file}"], "display_name": "x", "language": "x"}))
    other.touch()
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    path = write_notebook(
        tmp_path, "01_first",
        "import os, sys, itae_utils\n"
        "print([sys.executable, itae_utils.__file__, os.getcwd(), os.environ['MPLBACKEND']])",
        measure=False)
    target = tmp_path / "out.ipynb"
    assert execute(path, target, {}) is None
    seen = [str(sys.executable), str(PACKAGE / "__init__.py"), str(tmp_path), "module://matplotlib_inline.backend_inline"]
    assert str(seen) in "".join(json.loads(target.read_text(encoding="utf-8"))["cells"][-1]["outputs"][0]["text"])
