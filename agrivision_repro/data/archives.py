"""Archives of a data set: list and unpack them without following paths out of the folder."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError)  # the last: a password


def _list_members(path: Path) -> dict[str, int]:  # name → bytes
    "List the files of a tar or zip archive; raise ValueError on links and on paths outside the folder."
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            members = [(m.name, m.size, m.isfile() or m.isdir()) for m in archive]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [(m.filename, m.file_size, True) for m in archive.infolist()]
    else:
        raise ValueError(f"{path} is neither a tar nor a zip archive, or is damaged: get it again")
    for name, _, is_plain in members:
        if not is_plain or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} is refused: its member {name!r} is a link or would land outside the folder")
    return {name: size for name, size, _ in members}


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    "Raise ValueError if an archive cannot be read."
    try:
        yield
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error


def unpack_archive(
    path: str | Path,  # `.tar`, `.tar.gz` or `.zip`
    folder: str | Path,  # must not exist yet
) -> Path:  # the folder
    "Unpack an archive into a new folder, completely or not at all."
    path, folder = Path(path), Path(folder).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pass the path of the archive")
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose a folder that does not")
    with _refusing(path):
        needed = sum(_list_members(path).values())
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        room = f"{path} needs {needed / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB left"
        raise ValueError(f"{room}: free space or choose another disk")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop, _refusing(path):
        shutil.unpack_archive(path, Path(workshop) / "all", **({"filter": "data"} if tarfile.is_tarfile(path) else {}))
        os.rename(Path(workshop) / "all", folder)
    return folder


def nearest_folder(path: Path) -> Path:
    "Return the nearest folder that exists: the path itself or a parent."
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
