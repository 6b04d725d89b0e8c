"""Execute notebooks one at a time, each in a kernel of its own that runs the same Python as this process.

A kernel imports the package's libraries before its notebook runs, while the notebook before it does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import DeadKernelError

from itae_utils.environment import for_a_kernel
from itae_utils.files import PACKAGE, in_one_line

LONGEST = 1500  # characters of an error
# With these, nearly everything is imported that notebooks import. An error is left to the notebook, which shows it.
IMPORTS = ("itae_utils.analysis.comparison", "itae_utils.figures.scores", "itae_utils.report.notebook")
IMPORT_SECONDS = 600  # at most, as over a slow network


class _Kernel(AsyncKernelManager):
    """A kernel of this Python, whatever kernels are installed for the user or the system.

    It imports this copy of the package, even if another one is installed, shows no progress bars, and draws figures
    inline.

    Args:
        folder: its working directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        self._client: AsyncKernelClient | None = None
        imports = f"--IPKernelApp.exec_lines=[__import__(name) for name in {IMPORTS}]"
        run_sync(self.start_kernel)(env=for_a_kernel(PACKAGE.parent), cwd=str(folder),
                                    extra_arguments=["--log-level=CRITICAL", imports])

    def client(self, **options: object) -> AsyncKernelClient:
        self._client = super().client(**options)
        return self._client

    def end(self, now: bool) -> None:
        """Ask the kernel to shut down, or kill it now."""
        if run_sync(self.is_alive)():
            run_sync(self.shutdown_kernel)(now=now)
        run_sync(self.cleanup_resources)()
        if self._client is not None:
            self._client.stop_channels()


class Kernels:
    """Kernels for several notebooks in a folder. When one is taken, the next starts and imports libraries meanwhile.

    Args:
        folder: of the notebooks. It is the kernels' working directory, so that relative paths mean the same as in
            JupyterLab.
        count: number of notebooks.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._left, self._next = folder, count, None

    def take(self) -> _Kernel:
        """Return a kernel, which the caller ends."""
        kernel, self._next = self._next or _Kernel(self._folder), None
        self._left -= 1
        if self._left > 0:
            self._next = _Kernel(self._folder)
        return kernel

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._next is not None:
            self._next.end(now=True)


def execute(path: Path, target: Path, parameters: Mapping[str, object], kernels: Kernels) -> str | None:
    """Run the notebook at `path` into `target`; return the error that stopped it in one line, or None."""
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns about parameters that it can't parse
    kernel, interrupted = kernels.take(), False
    try:
        papermill.execute_notebook(
            _literally(path), _literally(target), dict(parameters), kernel_name="python3", km=kernel,
            progress_bar=False, log_output=False, start_timeout=IMPORT_SECONDS,
        )
    except papermill.PapermillExecutionError as failure:
        return f"{in_one_line(f'{failure.ename}: {failure.evalue}', LONGEST)} (cell [{failure.exec_count}])"
    except DeadKernelError as failure:
        return f"the kernel died: {in_one_line(failure, LONGEST)}"
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        kernel.end(now=interrupted)  # in a long computation a kernel that is asked to shut down lives on for seconds
    return None


def _literally(path: Path) -> str:
    """Return a path for papermill, which reads {name} in it as a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")
