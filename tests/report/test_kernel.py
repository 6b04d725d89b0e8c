import json
import os
import sys
from pathlib import Path

import pytest

from itae_utils.files import PACKAGE
from itae_utils.report.kernel import Kernels
from itae_utils.report.kernel import execute as execute_in
from tests.tiny_notebooks import PARAMETERS, write_notebook


def execute(path: Path, target: Path, parameters: dict) -> str | None:
    with Kernels(path.parent, 1) as kernels:
        return execute_in(path, target, parameters, kernels)


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


def test_the_next_kernel_starts_and_imports_while_a_notebook_runs(tmp_path):
    """And it is killed if it is not needed."""
    mark = "import os, sys, pathlib\n" \
           "pathlib.Path('seen').write_text(f\"{os.getpid()} {'itae_utils.report.notebook' in sys.modules}\")"
    path = write_notebook(tmp_path, "01_first", mark, measure=False)
    with Kernels(tmp_path, 3) as kernels:
        assert execute_in(path, tmp_path / "out.ipynb", {}, kernels) is None
        first, has_imported = (tmp_path / "seen").read_text().split()
        assert has_imported == "True"
        ahead = [kernels._next.provisioner.pid]
        assert execute_in(path, tmp_path / "out.ipynb", {}, kernels) is None
        assert (tmp_path / "seen").read_text() == f"{ahead[0]} True"
        ahead.append(kernels._next.provisioner.pid)
    assert len({int(first), *ahead}) == 3
    for ended in (int(first), *ahead):
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)


def test_the_last_notebook_starts_no_further_kernel(tmp_path):
    path = write_notebook(tmp_path, "01_first", "x = 1", measure=False)
    with Kernels(tmp_path, 1) as kernels:
        assert execute_in(path, tmp_path / "out.ipynb", {}, kernels) is None
        assert kernels._next is None
