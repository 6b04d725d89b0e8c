"""Public names that import their module on first use, because importing torch takes seconds."""

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package.

    Args:
        package: the package's name.
        modules: the public names by module, such as {"data.datasets": ["load_dataset"]}.
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    public = sorted(module_of)

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: public, public
