import asyncio

import jupyter_client
import pytest

from itae_utils.report.kernel import _kernel_class, execute, kernel_of_this_python
from tests.tiny_notebooks import PARAMETERS, write_notebook


def test_names_with_braces_are_names(tmp_path):
    folder = tmp_path / "a {seed} {b"
    folder.mkdir()
    path = write_notebook(folder, "01_first", "print('SEED', seed)", "print('NEVER')\nraise ValueError('a\\n b')",
                          parameters=PARAMETERS, measure=False)
    target = folder / "{out}.ipynb"
    with kernel_of_this_python():
        error = execute(path, target, {"seed": 7})
    assert error == "ValueError: a b (cell [4])"
    assert "SEED 7" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(("error", "killed"), [(KeyboardInterrupt, True), (ValueError, False)])
def test_a_kernel_is_killed_only_on_an_interrupt(monkeypatch, error, killed):
    asked = []

    async def shutdown_kernel(self, now=False, restart=False):
        asked.append(now)

    monkeypatch.setattr(jupyter_client.AsyncKernelManager, "shutdown_kernel", shutdown_kernel)
    kernel = _kernel_class()()
    asyncio.run(kernel.shutdown_kernel())
    with pytest.raises(error):  # noqa: PT012 as nbclient does it
        try:
            raise error
        finally:
            asyncio.run(kernel.shutdown_kernel())
    asyncio.run(kernel.shutdown_kernel(now=True))
    assert asked == [False, killed, True]
