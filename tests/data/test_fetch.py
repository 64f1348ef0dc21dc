"Open data fetched from small git repositories: identical to what git committed, or not there at all."

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
from forked import wait_until

from agrivision_repro.cli.app import main
from agrivision_repro.data import archives, fetch
from agrivision_repro.data.fetch import SOURCES, PinnedSource, fetch_data, find_differences, read_entries, tree_id

NAIP = Path(__file__).resolve().parents[3] / "shared" / "naip-trees"  # 120 chips, beside a developer's checkout only
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="the tests need git; fetching does not")


def git(folder: Path, *words: str, text: bool = True) -> str | bytes:
    "Run git without the user's settings."
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false", "-c", "commit.gpgsign=false"]
    output = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=text).stdout
    return output.strip() if text else output


def commit_all(folder: Path) -> str:
    "Commit all files, and return the commit's id."
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "data")
    return git(folder, "rev-parse", "HEAD")


def write_files(root: Path, *names: str) -> Path:
    "Write small files whose content is their name."
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize(
    "names",
    [
        ["one"],
        ["a/b/c/d", "a/b/e", "a/f", "g"],
        ["a/x", "a.txt", "a-b", "a0", "a b", "ab/x", "a-/x", "A/x", "a./x"],  # "-", ".", "/" and "0" are neighbors in ASCII
        ["ä/ü.txt", "z/日本", "z/é", "zz"],
        [f"{i % 7}/{i}" for i in range(200)],
    ],
)
def test_tree_id_is_gits(names, tmp_path):
    root = write_files(tmp_path, *names, "run.sh", "deep/run.sh")
    (root / "deep/run.sh").chmod(0o755)
    (root / "empty/empty").mkdir(parents=True)  # git does not record it
    (root / "large").write_bytes(bytes(range(256)) * 5000)
    commit_all(root)
    n_calls = []
    assert tree_id(read_entries(root, count=lambda: n_calls.append(1))) == git(root, "rev-parse", "HEAD^{tree}")
    assert len(n_calls) == len(git(root, "ls-files", "-z").strip("\0").split("\0")) == len(names) + 3
    git(root, "update-index", "--chmod=-x", "deep/run.sh")
    assert tree_id(read_entries(root, executables=False)) == git(root, "write-tree")


def write_chips(root: Path) -> Path:
    "Write seven chips in the layout of the data set, one of them without trees, and further files of the repository."
    draw = np.random.default_rng(0)
    write_files(root, "README.md", "scripts/deep/run.sh", "images/.gitkeep", "csv/.gitkeep")
    for i in range(7):
        tifffile.imwrite(root / f"images/city_2020_{i}.tif", draw.integers(0, 256, (32, 32, 4), np.uint8))
        if i != 3:
            (root / f"csv/city_2020_{i}.csv").write_text("x,y\n9,9\n20,5\n")
    for split, chips in {"train": range(4), "val": (4, 5), "test": (6,)}.items():
        (root / f"{split}.txt").write_text("".join(f"city_2020_{i}\n" for i in chips))
    return root


class Upstream:
    "A repository with two commits, and a server of its archives, which `send` may spoil."

    def __init__(self, root: Path):
        self.root, self.send, self.asked = root, send_whole, []
        self.old = commit_all(root)
        (root / "csv/city_2020_5.csv").write_text("x,y\n1,2\n")
        self.commit = commit_all(root)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/trees"

    def archive(self, commit: str, kind: str = "tar.gz", prefix: str = "urban-tree-detection-data-7/") -> bytes:
        "Pack a commit as GitHub does."
        return git(self.root, "archive", f"--format={kind}", f"--prefix={prefix}", commit, text=False)

    def write(self, path: Path, **options) -> Path:
        "Save an archive."
        path.write_bytes(self.archive(**{"commit": self.commit, "kind": path.name.partition(".")[2]} | options))
        return path

    def pinned(self, commit: str = "") -> PinnedSource:
        "Pin a commit by what git says about it."
        commit = commit or self.commit
        rows = [line.split() for line in git(self.root, "ls-tree", commit).splitlines()]
        parts = {name + "/" * (kind == "tree"): id[:7] for _, kind, id, name in rows}
        n_files = len(git(self.root, "ls-tree", "-r", commit).splitlines())
        return PinnedSource(self.url, commit, git(self.root, "rev-parse", commit + "^{tree}"), n_files, parts)


class Answers(BaseHTTPRequestHandler):
    def __init__(self, upstream: Upstream, *rest):
        self.upstream = upstream
        super().__init__(*rest)

    def do_GET(self):
        self.upstream.asked.append(self.path)
        name, _, kind = self.path.rpartition("/")[2].partition(".")
        if kind not in ("tar.gz", "zip", ""):
            return self.send_error(404)
        self.send_response(200)
        self.upstream.send(self, self.upstream.archive(name, kind or "zip"))

    def log_message(self, *words):
        pass


def send_whole(handler, content: bytes, n_bytes: int | None = None):
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:n_bytes])


def send_half(handler, content: bytes):
    "Announce all bytes, send half of them, hang up."
    send_whole(handler, content, len(content) // 2)


def send_half_unannounced(handler, content: bytes):
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def send_slowly(handler, content: bytes):
    "Send half, then nothing for a minute."
    send_half(handler, content)
    handler.wfile.flush()
    time.sleep(60)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    upstream = Upstream(write_chips(tmp_path_factory.mktemp("upstream") / "repository"))
    yield upstream
    upstream.server.shutdown()


@pytest.fixture
def upstream(running, monkeypatch):
    running.asked, running.send = [], send_whole
    monkeypatch.setitem(SOURCES, "naip-trees", running.pinned())
    return running


fetch_trees = partial(fetch_data, "naip-trees", n_workers=1)


@pytest.fixture
def refused(tmp_path, upstream):
    "Fetch: it must fail with one line that contains all of `says`, and leave nothing."

    def run(source, *says, error=ValueError):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error) as caught:
            fetch_trees(tmp_path / "new" / "trees", source)
        message = str(caught.value)
        assert all(words in message for words in says) and "\n" not in message, message
        assert sorted(tmp_path.rglob("*")) == before

    return run


def is_commit(folder: Path, upstream: Upstream) -> bool:
    "Compare a folder with a checkout, byte for byte and without a hash."
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    names = git(upstream.root, "ls-tree", "-r", "--name-only", upstream.commit).splitlines()
    return files == {name: git(upstream.root, "show", f"{upstream.commit}:{name}", text=False) for name in names}


def test_fetched_and_kept(upstream, tmp_path, capsys):
    "The server is asked once for the pinned archive; the files are the commit's, checked, counted and credited."
    report = fetch_trees(tmp_path / "new" / "trees")
    assert upstream.asked == [f"/trees/archive/{upstream.commit}.tar.gz"]
    assert is_commit(tmp_path / "new/trees", upstream) and [p.name for p in (tmp_path / "new").iterdir()] == ["trees"]
    assert [report.describe(split)["tiles"] for split in report.labeled] == [4, 2, 1] and report.is_trustworthy
    printed = capsys.readouterr().out
    assert "train: 4 tiles" in printed and "Ventura et al. 2024" in printed and "CC BY 4.0" in printed and upstream.url in printed
    write_files(tmp_path / "new/trees", "packed/x.npy", ".DS_Store", "images/._city_2020_0.tif", "csv/Thumbs.db", "desktop.ini")
    for path in (tmp_path / "new/trees").rglob("*"):
        path.chmod(0o755)  # as on disks without an executable bit
    fetch_trees(tmp_path / "new" / "trees")
    assert len(upstream.asked) == 1
    assert f"trees: all {upstream.pinned().n_files} files are those of commit {upstream.commit[:7]}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tar.gz", "no top folder", "tar", "zip", "file URL", "URL of a zip", "clone", "folder above"])
def test_a_copy_of_ones_own(kind, upstream, tmp_path):
    copies = tmp_path / "my copies"
    copies.mkdir()
    source = {
        "tar.gz": lambda: upstream.write(copies / "copy.tar.gz"),
        "no top folder": lambda: upstream.write(copies / "copy.tar.gz", prefix=""),
        "tar": lambda: upstream.write(copies / "copy.tar"),
        "zip": lambda: upstream.write(copies / "copy.zip"),
        "file URL": lambda: upstream.write(copies / "copy.tar.gz").as_uri(),
        "URL of a zip": lambda: f"{upstream.url}/zip/{upstream.commit}",
        "clone": lambda: upstream.root,
        "folder above": lambda: archives.unpack_archive(upstream.write(copies / "copy.zip"), copies / "unpacked"),
    }[kind]()
    fetch_trees(tmp_path / "trees", source)
    assert is_commit(tmp_path / "trees", upstream)
    assert len(upstream.asked) == (kind == "URL of a zip")


def copy_upstream(upstream: Upstream, folder: Path) -> Path:
    return shutil.copytree(upstream.root, folder, ignore=shutil.ignore_patterns(".git"))


def test_files_of_operating_systems_stay_out(upstream, tmp_path):
    "Such files in a read-only source are not copied, and the copy can be written to."
    copy = write_files(copy_upstream(upstream, tmp_path / "copy"), ".DS_Store", "images/._a.tif", "Thumbs.db", "packed/a", ".git/HEAD")
    for folder in (copy, copy / "images"):
        folder.chmod(0o555)
    try:
        fetch_trees(tmp_path / "trees", copy)
    finally:
        for folder in (copy, copy / "images"):
            folder.chmod(0o755)
    assert is_commit(tmp_path / "trees", upstream)
    assert all(folder.stat().st_mode & 0o200 for folder in (tmp_path / "trees", tmp_path / "trees/images"))


def flip(path: Path, position: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


FAULTS = {
    "flipped bit": (lambda copy: flip(copy / "images/city_2020_2.tif", -1), "see images/)"),
    "line ends": (lambda copy: (copy / "csv/city_2020_2.csv").write_bytes(b"x,y\r\n9,9\r\n20,5\r\n"), "see csv/)"),
    "missing file": (lambda copy: (copy / "images/city_2020_2.tif").unlink(), "see images/)"),
    "missing folder": (lambda copy: shutil.rmtree(copy / "csv"), "csv/"),
    "extra file": (lambda copy: write_files(copy, "scripts/deep/more.txt"), "see scripts/)"),
    "extra at the root": (lambda copy: write_files(copy, "more/a"), "see more/)"),
    "other name": (lambda copy: (copy / "val.txt").rename(copy / "validation.txt"), "val.txt"),
    "two swapped": (lambda copy: (copy / "val.txt").write_bytes((copy / "test.txt").read_bytes()), "see val.txt)"),
    "file for a folder": (lambda copy: (shutil.rmtree(copy / "scripts"), write_files(copy, "scripts")), "see scripts, scripts/)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_named(fault, upstream, tmp_path, refused):
    "As a folder, as an archive, and in place, where nothing is changed."
    spoil, says = FAULTS[fault]
    copy = copy_upstream(upstream, tmp_path / "copy")
    assert find_differences(copy, upstream.pinned()) == ""
    spoil(copy)
    refused(copy, str(copy), upstream.url, says)
    with tarfile.open(tmp_path / "copy.tar.gz", "w:gz") as archive:
        archive.add(copy, "top")
    refused(tmp_path / "copy.tar.gz", "copy.tar.gz is no", upstream.url, says)
    before = read_entries(copy)
    with pytest.raises(FileExistsError, match=f"copy exists, but is not commit {upstream.commit[:7]} .*: choose a folder that") as caught:
        fetch_trees(copy)
    assert says in str(caught.value) and read_entries(copy) == before


def test_another_commit_is_refused(upstream, tmp_path, refused, monkeypatch):
    old = upstream.pinned(upstream.old)
    archive = upstream.write(tmp_path / "old.tar.gz", commit=upstream.old)
    refused(archive, f"is not commit {upstream.commit[:7]}", f"tree {old.tree[:7]}, wanted {upstream.pinned().tree[:7]}", "see csv/)")
    monkeypatch.setitem(SOURCES, "naip-trees", old)
    fetch_trees(tmp_path / "trees", archive)


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize("half", [True, False])
def test_damaged_archive(kind, half, upstream, tmp_path, refused):
    path = upstream.write(tmp_path / f"bad.{kind}")
    middle = path.stat().st_size // 2
    if half:
        path.write_bytes(path.read_bytes()[:middle])
    else:
        flip(path, middle, 0xFF)
    refused(path, "bad.", error=(ValueError, OSError))


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "images/../../out.txt"])
def test_archive_that_writes_outside(name, tmp_path, refused):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    refused(tmp_path / "bad.tar", "bad.tar is refused", "would land outside the folder")


def test_sources_that_are_none(upstream, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", f"empty is not a copy of {upstream.url}: wanted a folder with README.md, csv/, images/")
    refused(tmp_path / "none.zip", "none.zip is missing: pass the path of the archive", error=FileNotFoundError)
    remedy = "try again, or download it by other means and pass the file with --source"
    refused("ftps://nowhere.invalid/x", "cannot be fetched", remedy, error=OSError)
    refused("http://127.0.0.1:9/x.zip", "x.zip cannot be fetched", remedy, error=OSError)
    refused(f"{upstream.url}/page.html", "page.html cannot be fetched (HTTP Error 404", remedy, error=OSError)
    with pytest.raises(ValueError, match="'agrivision-2020' cannot be fetched: wanted naip-trees or ag-net"):
        fetch_data("agrivision-2020", tmp_path / "new")


@pytest.mark.parametrize(("send", "says"), [(send_half, "bytes): try again"), (send_half_unannounced, "is damaged")])
def test_connection_lost(send, says, upstream, refused):
    upstream.send = send
    refused("", f"{upstream.url}/archive/{upstream.commit}.tar.gz", says, error=(OSError, ValueError))


def test_no_room(upstream, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        refused("", f"{upstream.commit}.tar.gz needs", "free space or choose another disk")

    def fails(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfile", fails)
    refused(upstream.root, "No space left on device): free space or choose another disk", error=OSError)


SCRIPT = """import sys
from agrivision_repro.data.fetch import *
SOURCES["naip-trees"] = {}
fetch_data("naip-trees", sys.argv[1], n_workers=1)"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_halfway(stop, upstream, tmp_path):
    "Two processes never fetch one folder. Ctrl-C leaves nothing; what a kill leaves is removed by the next attempt."
    upstream.send = send_slowly
    words = [sys.executable, "-c", SCRIPT.format(upstream.pinned()), tmp_path / "trees"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((tmp_path / ".trees.part/room/archive").exists)
    with pytest.raises(OSError, match=r"\.trees\.part is in use: another process fetches .*trees, so wait"):
        fetch_trees(tmp_path / "trees")
    process.send_signal(stop)
    process.wait(30)
    assert [path.name for path in tmp_path.iterdir()] == ([] if stop == signal.SIGINT else [".trees.part"])
    upstream.send = send_whole
    fetch_trees(tmp_path / "trees")
    assert [path.name for path in tmp_path.iterdir()] == ["trees"]


def run(monkeypatch, *words):
    "Run the command in this process, and return its exit code."
    monkeypatch.setattr(sys, "argv", ["agrivision", "data", "fetch", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_command(upstream, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in ([], ["--out", "~/naip-trees"]):  # the second one verifies the first
        assert run(monkeypatch, "naip-trees", "--workers", "1", *words) == 0
        assert "0 faults" in capsys.readouterr().out and is_commit(tmp_path / "naip-trees", upstream)
    assert run(monkeypatch, "naip-trees", "--out", tmp_path / "new", "--source", "~/none.zip") == 2
    assert capsys.readouterr().err == f"agrivision: {tmp_path / 'none.zip'} is missing: pass the path of the archive\n"
    assert run(monkeypatch, "agrivision-2020", "--out", tmp_path / "new") == 2
    assert "wanted naip-trees or ag-net; Agriculture-Vision is available from its authors" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["naip-trees"]


PINNED = {
    "naip-trees": "jonathanventura/urban-tree-detection-data/archive/78e81bdbb484048472e77cbedd3afb49a6b621c6",
    "ag-net": "ZihengSun/Ag-Net-Dataset/archive/dc54fdfa8ab7028d4436226db75df9fab9a37552",
}


@pytest.mark.parametrize("name", SOURCES)
def test_pinned_archive_is_asked_for(name, tmp_path, monkeypatch):
    "GitHub's archive of the pinned commit is what is downloaded; ids have 40 digits, those of entries seven."
    monkeypatch.setattr(fetch, "find_edition", lambda name: None)
    monkeypatch.setattr(fetch, "urlopen", lambda url, timeout: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(OSError) as caught:
        fetch_data(name, tmp_path / "new")
    assert str(caught.value).startswith(f"https://github.com/{PINNED[name]}.tar.gz cannot be fetched (no network): try again")
    assert not any(tmp_path.iterdir())
    source = SOURCES[name]
    assert len(source.tree) == 40 and int(source.tree, 16) and all(len(id) == 7 and int(id, 16) for id in source.parts.values())


@pytest.mark.skipif(not NAIP.is_dir(), reason="the NAIP chips are not beside this checkout")
def test_real_chips(tmp_path, monkeypatch):
    "120 real chips, committed, packed and fetched; they are a sample of the pinned commit, and no substitute for it."
    commit = SOURCES["naip-trees"].commit
    assert f"urban-tree-detection-data @ {commit[:7]})" in (NAIP / "README.md").read_text()
    root = shutil.copytree(NAIP, tmp_path / "repository", copy_function=shutil.copyfile)
    root.chmod(0o755)
    with pytest.raises(ValueError, match="is not a copy of https://github.com/jonathanventura/.*wanted a folder with README.md, csv/"):
        fetch_trees(tmp_path / "trees", root)
    entries = read_entries(root, executables=False)
    commit_all(root)
    parts = {name: id[:7] for name, (_, id) in entries.items()}
    monkeypatch.setitem(SOURCES, "naip-trees", PinnedSource("", commit, git(root, "rev-parse", "HEAD^{tree}"), 0, parts))
    report = fetch_trees(tmp_path / "trees", root)
    assert [report.describe(s)["tiles"] for s in report.labeled] == [80, 20, 20] and report.is_trustworthy and len(report.faults) == 4
