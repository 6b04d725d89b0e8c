import asyncio
import json
import sys

import jupyter_client
import pytest

from itae_utils.files import PACKAGE
from itae_utils.report.kernel import _Kernel, execute
from tests.tiny_notebooks import PARAMETERS, write_notebook


def test_names_with_braces_are_names(tmp_path):
    folder = tmp_path / "a {seed} {b"
    folder.mkdir()
    path = write_notebook(folder, "01_first", "print('SEED', seed)", "print('NEVER')\nraise ValueError('a\\n b')",
                          parameters=PARAMETERS, measure=False)
    target = folder / "{out}.ipynb"
    assert execute(path, target, {"seed": 7}) == "ValueError: a b (cell [4])"
    assert "SEED 7" in target.read_text(encoding="utf-8")


def test_the_kernel_is_this_python_with_this_package_whatever_is_installed(tmp_path, monkeypatch):
    """Another kernel of the same name, another copy of the package, and a backend without inline figures."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/python", "{connection_file}"], "display_name": "x", "language": "x"}))
    (tmp_path / "other" / "itae_utils").mkdir(parents=True)
    (tmp_path / "other" / "itae_utils" / "__init__.py").write_text("")
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


@pytest.mark.parametrize(("error", "killed"), [(KeyboardInterrupt, True), (ValueError, False)])
def test_a_kernel_is_killed_only_on_an_interrupt(monkeypatch, error, killed):
    asked = []

    async def shutdown_kernel(self, now=False, restart=False):
        asked.append(now)

    monkeypatch.setattr(jupyter_client.AsyncKernelManager, "shutdown_kernel", shutdown_kernel)
    with pytest.raises(error):  # noqa: PT012 as nbclient does it
        try:
            raise error
        finally:
            asyncio.run(_Kernel().shutdown_kernel())
    asyncio.run(_Kernel().shutdown_kernel())
    assert asked == [killed, False]
