"""Files of weights: which files a path names, and what they hold, read without running any code.

A path may be a file, a folder, the cache of the hub, an index or one part of several. Files are read by their content,
not by their ending. What is no file of weights is named in the error.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
# Folders hold these in this order of preference, which is that of `transformers`.
STANDARD = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
            "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|adapter_model).*")
LONGEST_HEADER = 100_000_000  # bytes, of safetensors: its length stands before it
ADAPTER = "adapter_config.json"
# First bytes and endings, both in small letters, what such a file is, and the remedy.
AGAIN = "download it again"
KINDS: list[tuple[tuple[bytes, ...], tuple[str, ...], str, str]] = [
    ((b"version https://git-lfs",), (), "a Git LFS pointer, not the weights",
     "run `git lfs pull` in its folder, or download the file itself"),
    ((b"<!doctype", b"<html", b"<?xml"), (".html",), "a web page", "download the file itself, not its page"),
    ((b"gguf",), (".gguf",), "a GGUF file", "download model.safetensors instead"),
    ((b"\x89hdf",), (".h5", ".hdf5", ".keras", ".pb", ".tflite"), "a TensorFlow or Keras file",
     "download model.safetensors instead"),
    ((), (".msgpack", ".npz"), "a JAX or Flax file", "download model.safetensors instead"),
    ((b"\x08",), (".onnx",), "an ONNX file", "save the state_dict() of the PyTorch model that it was exported from"),
    ((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!", b"\x28\xb5\x2f\xfd"), (".zip",), "an archive",
     "unpack it and give the file in it"),
]


def refused(path: Path, what: str, remedy: str) -> ItaeError:
    """Return the error for a checkpoint; the word that helps comes first and the whole path last."""
    place = "" if str(path) == path.name else f" ({str(path)!r})"
    return ItaeError(f"checkpoint {path.name!r} {what}: {remedy}{place}")


def weight_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files that hold the weights of `path`, and what was chosen, in words.

    Raises:
        ItaeError: there is no such file, the folder has no weights or several, or a part is missing.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise refused(path, "does not exist", "give a file of weights, or a folder with model.safetensors; "
                      "URLs and names of a hub are not downloaded")
    if path.name.endswith(".index.json"):
        return _of_index(path), []
    if PART.fullmatch(path.name):
        files = _of_part(path)
        return files, [f"all {len(files)} parts read"] if len(files) > 1 else []
    return [path], []


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    snapshots = folder / "snapshots" if folder.name != "snapshots" else folder
    if snapshots.is_dir():  # the hub's cache: refs/main holds the name of the snapshot that is in use
        main = snapshots.parent / "refs/main"
        found = [snapshots / main.read_text().strip()] if main.is_file() else sorted(snapshots.iterdir())
        if len(found) != 1 or not found[0].is_dir():
            raise refused(folder, "holds no snapshot that is in use", "give one of the folders in snapshots")
        return _in_folder(found[0])
    names = {path.name for path in folder.iterdir() if path.is_file()}
    weights = sorted(filter(_has_weights, names))
    chosen = next((name for name in STANDARD if name in names), None)
    if chosen is None:  # parts without an index, or one file of any name
        sets = sorted({match.expand(r"\1-*-of-\3\4") if (match := PART.fullmatch(name)) else name for name in weights})
        if len(sets) > 1:
            raise refused(folder, f"holds several files of weights, {some(sets)}", "give one of the files")
        if not sets:
            raise _no_weights(folder, names)
        chosen = weights[0]
    files, _ = weight_files(folder / chosen)
    left = [name for name in weights if name not in {file.name for file in files}]
    alone = not left and chosen in STANDARD
    return files, [] if alone else [f"{files[0].name} taken" + (f", {some(left)} left out" if left else "")]


def _has_weights(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not NO_WEIGHTS.fullmatch(name)


def _kind(name: str, head: bytes = b"") -> tuple[str, str] | None:
    """Return what a file is and the remedy, if it is known to be no file of torch or safetensors."""
    name, head = name.lower(), head.lstrip().lower()
    return next(((what, remedy) for starts, endings, what, remedy in KINDS
                 if head.startswith(starts) or name.endswith(endings)), None)


def _no_weights(folder: Path, names: set[str]) -> ItaeError:
    if ADAPTER in names:
        return refused(folder, "holds a LoRA adapter, not the model",
                       "merge it with merge_and_unload() and save the model's state_dict()")
    for name in sorted(names):
        if kind := _kind(name):
            return refused(folder, f"holds no weights but {kind[0]}, {name}", kind[1])
    if any(path.suffix == ".distcp" for path in folder.iterdir()):
        return refused(folder, "holds a distributed checkpoint", "join it to one file with "
                       "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`")
    below = [str(path.relative_to(folder)) for path in sorted(folder.glob("*/*")) if _has_weights(path.name)]
    where = f"give one of {some(below)}" if below else "give a folder with model.safetensors, or a file"
    return refused(folder, "holds no weights", where)


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(index, f"is no index of parts ({type(error).__name__})", AGAIN) from error
    return _complete(index, files)


def _of_part(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    stem, _, count, ending = match.groups()
    return _complete(path, [path.with_name(f"{stem}-{number:05}-of-{count}{ending}")
                            for number in range(1, int(count) + 1)], f"is part {int(match[2])} of {int(count)}, and ")


def _complete(path: Path, files: list[Path], role: str = "names parts, and ") -> list[Path]:
    if missing := [file.name for file in files if not file.is_file()]:
        raise refused(path, f"{role}{some(missing)} is missing", "download all parts into one folder")
    return files


def some(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_file(path: Path) -> dict:
    """Return what a file of weights holds: names and tensors, or nested mappings of them, mapped into memory.

    Objects of a .pth file that are no plain data, such as a trainer's settings, are left out; no code of theirs is run.

    Raises:
        ItaeError: the file is not readable, is of another kind, is cut, or is no mapping.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
            return load_file(path)
        _check_kind(path, head, size)
        content = _load_pickle(path)
    except ItaeError:
        raise
    except OSError as error:
        raise refused(path, "can't be read", error.strerror or in_one_line(error)) from error
    except SafetensorError as error:
        raise refused(path, f"is cut off or damaged, {size:,} bytes", AGAIN) from error
    except Exception as error:  # zipfile and pickle have no common exception class
        kind = "a plain pickle" if head.startswith(b"\x80") else "no file of weights"
        remedy = f"{AGAIN}, or write it with torch.save(model.state_dict(), FILE)"
        raise refused(path, f"is cut off, damaged or {kind}", f"{remedy} ({type(error).__name__})") from error
    if not isinstance(content, dict) or not content:
        raise refused(path, "holds no state dict", "save a model's state_dict()")
    return content


def _check_kind(path: Path, head: bytes, size: int) -> None:
    """Refuse what is known to be no file of torch."""
    if not size:
        raise refused(path, "is empty, 0 bytes", AGAIN)
    if kind := _kind(path.name, head):
        raise refused(path, f"is {kind[0]}", kind[1])
    if path.suffix == ".safetensors" and head.startswith((b"PK", b"\x80")):
        raise refused(path, "is a file of torch.save, not of safetensors", "rename it to end in .pth")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise refused(path, f"is cut off or damaged, {size:,} bytes", AGAIN)
        inside = {name.rpartition("/")[2] for name in zipfile.ZipFile(path).namelist()}
        if "constants.pkl" in inside:
            raise refused(path, "is a TorchScript program",
                          "save its weights: torch.save(torch.jit.load(FILE).state_dict(), NEW)")
        if "data.pkl" not in inside:
            raise refused(path, "is a zip archive, not weights", "unpack it and give the file in it")
    elif b"\0" not in head and head.isascii():
        remedy = "give its folder" if path.suffix == ".json" else "give a file of weights"
        raise refused(path, f"is a text of {size:,} bytes, not weights", remedy)


class _LeftOut(list):
    """Stands for any object of a checkpoint that is no plain data; its own code is neither imported nor run."""

    def __new__(cls, *_args: object) -> _LeftOut:
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        pass


class _LeftOutDict:
    """The same for objects that torch fills like a dict."""

    def __new__(cls, *_args: object) -> OrderedDict:
        return OrderedDict()


def _load_pickle(path: Path) -> object:
    """Return the content of a torch file, read by torch's unpickler for plain tensors."""
    zipped = zipfile.is_zipfile(path)
    load = partial(torch.load, path, map_location="cpu", weights_only=True, mmap=zipped)
    try:
        return load()
    except pickle.UnpicklingError as error:
        foreign = (torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else  # the older format
                   re.findall(r"Unsupported global: GLOBAL ([\w.]+)", str(error)))
        if not foreign:
            raise
    stubs = [(_LeftOutDict if name.lower().endswith("dict") else _LeftOut, name) for name in foreign]
    with suppress(pickle.UnpicklingError, TypeError, ValueError), torch.serialization.safe_globals(stubs):
        if isinstance(content := load(), dict):
            return content
    raise refused(path, f"holds Python objects, {some(sorted(foreign))}, not a state dict of tensors",
                  "save model.state_dict() instead, since code in a file is never run")


def read_config(path: Path, file: Path) -> dict:
    """Return the config.json `file` of the checkpoint `path`."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(path, f"needs a config.json that can be read ({type(error).__name__})",
                      "give a folder with config.json and model.safetensors") from error
    return config if isinstance(config, dict) else {}
