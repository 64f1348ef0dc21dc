"""Download an open data set, or unpack its archive, and verify every byte against the pinned git tree."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from agrivision_repro.data.archives import nearest_folder, unpack_archive
from agrivision_repro.data.check import CheckReport, check_data
from agrivision_repro.data.editions import find_edition


def _git_id(
    kind: str,  # "blob" (a file) or "tree" (a folder)
    content: bytes,
) -> str:  # 40 hexadecimal digits
    "Compute git's id of content."
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


_IGNORED = ("._*", ".DS_Store", "Thumbs.db", "desktop.ini", ".git", "packed")  # names of files and folders


_Entries = dict[str, tuple[str, str]]  # name, with "/" after that of a folder → mode, id


def tree_id(entries: _Entries) -> str:
    "Compute the id of a folder from its entries."
    ordered = sorted((os.fsencode(name), mode.encode(), bytes.fromhex(id)) for name, (mode, id) in entries.items())
    return _git_id("tree", b"".join(mode + b" " + name.rstrip(b"/") + b"\0" + id for name, mode, id in ordered))


def read_entries(
    folder: Path,
    executables: bool = True,  # False: count every file as not executable
    count: Callable = lambda: None,  # called once per file
) -> _Entries:
    "Compute the entries of a folder; as in git, a subfolder without files has none."
    entries = {}
    for path in folder.iterdir():
        if any(fnmatchcase(path.name, pattern) for pattern in _IGNORED):
            continue
        if not path.is_dir():
            mode = "100755" if executables and path.stat().st_mode & 0o100 else "100644"
            entries[path.name] = mode, _git_id("blob", path.read_bytes())
            count()
        elif inside := read_entries(path, executables, count):
            entries[f"{path.name}/"] = "40000", tree_id(inside)
    return entries


class PinnedSource(NamedTuple):
    "A data set at one commit of a public git repository."

    repository: str  # URL
    commit: str  # names the archive to download
    tree: str  # id of the root folder
    n_files: int
    parts: dict[str, str]  # entry of the root folder → first seven digits of its id


SOURCES = {  # by edition; no file in them is executable
    "naip-trees": PinnedSource(
        "https://github.com/jonathanventura/urban-tree-detection-data",
        "78e81bdbb484048472e77cbedd3afb49a6b621c6", "d815d2aeda868ece09d525ee90ad9dd39752fedf", 4955,
        {"README.md": "f16c4f7", "csv/": "78e4662", "images/": "5a0b376", "json/": "2f431ff", "scripts/": "062607b",
         "test.txt": "7fc03c9", "test_socal.txt": "daa318a", "train.txt": "344e7cc", "train_socal.txt": "28c972e",
         "val.txt": "c12ed31", "val_socal.txt": "9b44f94"},
    ),
    "ag-net": PinnedSource(
        "https://github.com/ZihengSun/Ag-Net-Dataset",
        "dc54fdfa8ab7028d4436226db75df9fab9a37552", "50ae56abd4d7822d722be1ee4bb7d9bf20fc7f73", 25492,
        {"LICENSE": "3d5358a", "README.md": "199d7fe", "cdlvalue.csv": "badb230", "colormap.py": "2a642cc", "input/": "c1e54e3",
         "input_32bit/": "ab2224a", "input_rgb/": "fa8ec9a", "target/": "859c96d"},
    ),
}  # fmt: skip


def _find_missing(folder: Path, pinned: PinnedSource) -> str:
    "Return the names of the pinned entries that a folder lacks."
    return ", ".join(name for name in pinned.parts if not (folder / name).exists())


def find_differences(folder: Path, pinned: PinnedSource, shows_progress: bool = False) -> str:  # empty: the folder has the pinned tree
    "Return a description of what is missing, additional or different in a folder."
    if missing := _find_missing(folder, pinned):  # checked first, so that a wrong folder is not read
        return f"without {missing}"
    with tqdm(None, "verifying", pinned.n_files, unit="file", disable=not shows_progress) as bar:
        entries = read_entries(folder, False, bar.update)
    if (found := tree_id(entries)) == pinned.tree:
        return ""
    parts = {name: id[:7] for name, (_, id) in entries.items()}
    names = sorted({name for name, _ in parts.items() ^ pinned.parts.items()})
    return f"tree {found[:7]}, wanted {pinned.tree[:7]}: see {', '.join(names[:12])}"


def download(url: str, path: Path, shows_progress: bool = False) -> None:
    "Download a file completely."
    try:
        with urlopen(url, timeout=60) as answer, path.open("wb") as file:
            size = int(answer.headers.get("Content-Length", 0))  # some servers omit it
            with tqdm.wrapattr(answer, "read", size or None, desc="downloading", disable=not shows_progress) as body:
                shutil.copyfileobj(body, file)
            if size and file.tell() != size:
                raise ValueError(f"it ended after {file.tell()} of {size} bytes")
    except (OSError, HTTPException, ValueError) as error:
        remedy = "try again, or download it by other means and pass the file with --source"
        raise OSError(f"{url} cannot be fetched ({str(error) or type(error).__name__}): {remedy}") from error


def _open_source(source: str, room: Path, pinned: PinnedSource, shows_progress: bool = False) -> Path:  # the folder of the data set
    "Download and unpack as far as needed, and find the data set."
    path = Path(source).expanduser()
    if "://" in source:
        download(source, room / "archive", shows_progress)
        path = room / ("archive.tar.gz" if tarfile.is_tarfile(room / "archive") else "archive.zip")  # the URL may lack a suffix
        (room / "archive").rename(path)
    try:
        folder = path if path.is_dir() else unpack_archive(path, room / "unpacked")
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), source)) from error
    for root in (folder, *sorted(folder.iterdir())):
        if not _find_missing(root, pinned):
            return root
    raise ValueError(f"{source} is not a copy of {pinned.repository}: wanted a folder with {', '.join(pinned.parts)}")


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:  # an empty folder on the same disk
    "Yield a hidden folder beside a new one, locked for this process, and remove it at the end."
    hidden = nearest_folder(folder.parent) / f".{folder.name}.part"
    hidden.mkdir(exist_ok=True)
    try:
        with FileLock(hidden / "lock", timeout=0):
            try:
                shutil.rmtree(hidden / "room", ignore_errors=True)
                (hidden / "room").mkdir()
                yield hidden / "room"
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
    except Timeout as error:
        raise OSError(f"{hidden} is in use: another process fetches {folder}, so wait for it") from error


def _collect(source: str, room: Path, pinned: PinnedSource, shows_progress: bool = False) -> Path:  # a folder in `room`
    "Move or copy the files of a source into one folder and verify them."
    root = _open_source(source, room, pinned, shows_progress)
    transfer = os.replace if root.is_relative_to(room) else shutil.copyfile
    try:
        whole = shutil.copytree(root, room / "whole", ignore=shutil.ignore_patterns(*_IGNORED), copy_function=transfer)
    except shutil.Error as error:  # one reason per file
        raise OSError(f"{source} cannot be copied ({error.args[0][0][2]}): free space or choose another disk") from error
    for subfolder, _, _ in os.walk(whole):
        os.chmod(subfolder, 0o755)  # the source's may be read-only
    if differences := find_differences(whole, pinned, shows_progress):
        raise ValueError(f"{source} is not commit {pinned.commit[:7]} of {pinned.repository} ({differences}): get it again")
    return whole


def fetch_data(
    name: str,  # a key of `SOURCES`
    folder: str | Path,  # a new folder; an existing one is kept if every file in it is the pinned one
    source: str | Path = "",  # your own copy: a folder, an archive, or the URL of one; "": GitHub
    n_workers: int = 0,  # processes of the check; 0: one per core
    shows_progress: bool = False,  # progress bars on stderr
) -> CheckReport:
    "Fetch an open data set, completely or not at all, verify every byte, and check it."
    if name not in SOURCES:
        raise ValueError(f"{name!r} cannot be fetched: wanted {' or '.join(SOURCES)}; Agriculture-Vision is available from its authors")
    pinned, edition, folder = SOURCES[name], find_edition(name), Path(folder).expanduser().absolute()
    if not folder.exists():
        with workshop(folder) as room:
            whole = _collect(str(source) or f"{pinned.repository}/archive/{pinned.commit}.tar.gz", room, pinned, shows_progress)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(whole, folder)
    elif differences := find_differences(folder, pinned, shows_progress):
        what = f"{folder} exists, but is not commit {pinned.commit[:7]} of {pinned.repository} ({differences})"
        raise FileExistsError(f"{what}: choose a folder that does not exist, or remove this one")
    print(f"{folder}: all {pinned.n_files} files are those of commit {pinned.commit[:7]}")
    report = check_data(folder, name, n_workers, shows_progress)
    print(report.as_text(), f"{edition.credit} ({pinned.repository})", sep="\n\n")
    return report
