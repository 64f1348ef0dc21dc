"The open data set fetched from a server of our own that speaks HTTP and git: complete and proved, or not there at all."

import errno
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
from urllib.parse import quote

import numpy as np
import pytest
import tifffile
from filelock import FileLock

from agrivision_repro import check, fetch
from agrivision_repro.cli import main
from agrivision_repro.fetch import COMMIT, PROOF, fetch_naip_trees, git_id

NAIP = Path(__file__).resolve().parents[2] / "shared" / "naip-trees"  # 120 chips, beside a developer's checkout only
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="the server needs git; fetching does not")
pytestmark = needs_git


def git(folder: Path, *words: str) -> str:
    "Run git as nobody in particular."
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit_all(folder: Path) -> str:
    "Commit whatever stands there."
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "chips")
    return git(folder, "rev-parse", "HEAD")


def write_chips(root: Path) -> Path:
    "Seven small chips in the layout of the data set, one of them without trees, and what else stands in the repository."
    for name in ("images", "csv", "scripts/deep"):
        (root / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(7):
        tifffile.imwrite(root / f"images/city_2020_{i}.tif", draw.integers(0, 256, (32, 32, 4), np.uint8))
        if i != 3:
            (root / f"csv/city_2020_{i}.csv").write_text("x,y\n9,9\n20,5\n")
    for split, chips in {"train": range(4), "val": (4, 5), "test": (6,)}.items():
        (root / f"{split}.txt").write_text("".join(f"city_2020_{i}\n" for i in chips))
    (root / "README.md").write_text("## Data ##\r\n")
    (root / "scripts/deep/run.sh").write_text("true\n")
    (root / "scripts/deep/run.sh").chmod(0o755)
    return root


class Upstream:
    "A repository, and a server that gives its archives and its objects."

    def __init__(self, root: Path):
        self.root = root
        (root / ".gitignore").write_text("*.tmp\n")
        self.old = commit_all(root)
        (root / "csv/city_2020_5.csv").write_text("x,y\n1,2\n")
        self.commit = commit_all(root)
        self.asked, self.spoil = [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/trees"

    def archive(self, commit: str, kind: str = "tar.gz") -> bytes:
        "Pack a commit as GitHub does."
        prefix = f"--prefix=urban-tree-detection-data-{commit}/"
        return subprocess.run(["git", "archive", f"--format={kind}", prefix, commit], cwd=self.root, check=True, capture_output=True).stdout

    def write(self, path: Path, commit: str = "", kind: str = "tar.gz") -> Path:
        "Save an archive."
        path.write_bytes(self.archive(commit or self.commit, kind))
        return path

    def files(self) -> dict[str, str]:
        "Say what git itself lists: path → id."
        lines = git(self.root, "ls-tree", "-r", self.commit).splitlines()
        return {line.split("\t")[1]: line.split()[2] for line in lines}

    def fetch(self, folder: Path, source="", **options):
        "Fetch from this server."
        return fetch_naip_trees(folder, source, **{"commit": self.commit, "repository": self.url, "n_workers": 1} | options)


class Answers(BaseHTTPRequestHandler):
    "GET: an archive, which `spoil` may change or cut. POST: git's own answer."

    def __init__(self, upstream: Upstream, *rest):
        self.upstream = upstream
        super().__init__(*rest)

    def do_GET(self):
        self.upstream.asked.append(self.path)
        name = self.path.rsplit("/", 1)[1]
        if not name.endswith((".tar.gz", ".zip")):
            return self.send_error(404)
        kind = "zip" if name.endswith(".zip") else "tar.gz"
        content = self.upstream.archive(name.removesuffix(f".{kind}"), kind)
        self.send_response(200)
        (self.upstream.spoil or send_whole)(self, content)

    def do_POST(self):
        self.upstream.asked.append(self.path)
        assert self.path == "/trees.git/git-upload-pack" and self.headers["User-Agent"].startswith("git/")
        question = self.rfile.read(int(self.headers["Content-Length"]))
        command = ["git", "-c", "uploadpack.allowFilter=true", "upload-pack", "--stateless-rpc", self.upstream.root]
        environment = os.environ | {"GIT_PROTOCOL": self.headers["Git-Protocol"]}
        answer = subprocess.run(command, input=question, env=environment, capture_output=True).stdout
        self.send_response(200)
        send_whole(self, answer)

    def log_message(self, *words):
        pass


def send_whole(handler, content: bytes):
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def send_half(handler, content: bytes):
    "Announce all, send half, hang up."
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


def send_half_unannounced(handler, content: bytes):
    "Send half and hang up, as if that were all."
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
def upstream(running):
    running.asked, running.spoil = [], None
    return running


@pytest.fixture
def refused(tmp_path, upstream):
    "Fetch: it must fail with a line that says all of `contains`, and leave nothing."

    def run(source="", contains=(), error=ValueError, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error) as caught:
            upstream.fetch(tmp_path / "new" / "trees", source, **options)
        message = str(caught.value)
        assert all(words in message for words in contains), message
        assert "\n" not in message
        assert sorted(tmp_path.rglob("*")) == before

    return run


def contents(folder: Path) -> dict[str, bytes]:
    "Give every file of a folder but the proof."
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and PROOF not in p.parts}


def test_fetched_whole(upstream, tmp_path, capsys):
    "Every file that git lists and no other, under git's own ids; checked, counted, credited."
    report = upstream.fetch(tmp_path / "new" / "trees")
    found = {name: git_id("blob", content) for name, content in contents(tmp_path / "new" / "trees").items()}
    assert found == upstream.files() and "scripts/deep/run.sh" in found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trees"]
    assert [census.n_tiles for census in report.splits.values()] == [4, 2, 1] and report.is_trustworthy
    printed = capsys.readouterr().out
    assert "train: 4 tiles" in printed and "Ventura et al. 2024" in printed and "CC BY 4.0" in printed and upstream.url in printed
    trees = sum(path == "/trees.git/git-upload-pack" for path in upstream.asked)
    assert trees == 6 and upstream.asked[-1] == f"/trees/archive/{upstream.commit}.tar.gz"  # a commit, five folders; the archive last


def test_kept_without_asking(upstream, tmp_path, capsys):
    upstream.fetch(tmp_path / "trees")
    (tmp_path / "trees" / "packed").mkdir()  # what is made of it later may stand there
    before, upstream.asked[:] = contents(tmp_path / "trees"), []
    capsys.readouterr()
    upstream.fetch(tmp_path / "trees", repository="http://nowhere.invalid/trees")
    assert upstream.asked == [] and contents(tmp_path / "trees") == before
    assert f"{tmp_path / 'trees'} is the whole commit {upstream.commit[:7]}: kept" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "file URL", "zip URL", "folder"])
def test_a_copy_of_ones_own(kind, upstream, tmp_path):
    source = {
        "tar.gz": lambda: upstream.write(tmp_path / "my copy.tar.gz"),
        "zip": lambda: upstream.write(tmp_path / "copy.zip", kind="zip"),
        "file URL": lambda: "file://" + quote(str(upstream.write(tmp_path / "my copy.tar.gz"))),
        "zip URL": lambda: f"{upstream.url}/archive/{upstream.commit}.zip",
        "folder": lambda: upstream.root,  # a clone: its .git stays out
    }[kind]()
    upstream.fetch(tmp_path / "trees", source)
    assert {name: git_id("blob", content) for name, content in contents(tmp_path / "trees").items()} == upstream.files()


def test_without_network(upstream, tmp_path):
    "A fetched folder, and an archive of it, carry their proof to a machine that reaches no server."
    upstream.fetch(tmp_path / "trees")
    with tarfile.open(tmp_path / "trees.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "trees", "trees")
    for source in ("trees", "trees.tar.gz"):
        upstream.fetch(tmp_path / f"from {source}", tmp_path / source, repository="http://nowhere.invalid/trees")
        assert contents(tmp_path / f"from {source}") == contents(tmp_path / "trees")


def spoilt_copy(upstream: Upstream, folder: Path, fault: str) -> Path:
    "A copy with a fault."
    copy = shutil.copytree(upstream.root, folder, ignore=shutil.ignore_patterns(".git"))
    image = copy / "images/city_2020_2.tif"
    if fault == "a bit":
        content = bytearray(image.read_bytes())
        content[-1] ^= 1
        image.write_bytes(content)
    elif fault == "line ends":
        (copy / "csv/city_2020_2.csv").write_bytes(b"x,y\r\n9,9\r\n20,5\r\n")
    elif fault == "missing":
        image.unlink()
    elif fault == "many":
        shutil.rmtree(copy / "csv")
    return copy


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("a bit", "images/city_2020_2.tif differs: get it again"),
        ("line ends", "csv/city_2020_2.csv differs: get it again"),
        ("missing", "images/city_2020_2.tif is missing: get it again"),
        ("many", "csv/city_2020_0.csv is missing, csv/city_2020_1.csv is missing, csv/city_2020_2.csv is missing and 3 more"),
    ],
)
def test_wrong_content_is_named(fault, says, upstream, tmp_path, refused):
    copy = spoilt_copy(upstream, tmp_path / "copy", fault)
    refused(copy, [f"{copy} is not commit {upstream.commit[:7]} of {upstream.url}", says])
    with tarfile.open(tmp_path / "copy.tar.gz", "w:gz") as archive:
        archive.add(copy, "top")
    refused(tmp_path / "copy.tar.gz", [says])


def test_another_version_is_refused(upstream, tmp_path, refused):
    refused(upstream.write(tmp_path / "old.tar.gz", upstream.old), ["csv/city_2020_5.csv differs"])
    upstream.fetch(tmp_path / "old", tmp_path / "old.tar.gz", commit=upstream.old)
    with pytest.raises(FileExistsError, match="is not the whole commit .* lacks the commit .*: name a folder that does not exist"):
        upstream.fetch(tmp_path / "old")


def test_what_the_commit_does_not_name_stays_out(upstream, tmp_path):
    copy = spoilt_copy(upstream, tmp_path / "copy", "")
    (copy / "images/more.tif").write_bytes(b"?")
    (copy / "virus.sh").write_text("false\n")
    upstream.fetch(tmp_path / "trees", copy)
    assert contents(tmp_path / "trees").keys() == upstream.files().keys()


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize("place", ["half", "a byte"])
def test_damaged_archive(kind, place, upstream, tmp_path, refused):
    path = upstream.write(tmp_path / f"bad.{kind}", kind=kind)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if place == "half":
        del content[middle:]
    else:
        content[middle] ^= 0xFF
    path.write_bytes(content)
    refused(path, error=(ValueError, OSError))


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "images/../../out.txt"])
def test_archive_that_writes_outside(name, tmp_path, refused):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    refused(tmp_path / "bad.tar", ["bad.tar is refused", "would land outside the folder"])


def test_sources_that_are_none(upstream, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", ["holds no folder images: wanted a copy of https://github.com/"])
    refused(tmp_path / "none.zip", ["none.zip is missing"], FileNotFoundError)
    refused("ftps://nowhere.invalid/x", ["cannot be fetched", "--source"], OSError)
    refused(f"{upstream.url}/page.html", ["page.html cannot be fetched (HTTP Error 404", "--source"], OSError)


@pytest.mark.parametrize("spoil", [send_half, send_half_unannounced])
def test_connection_lost(spoil, upstream, refused):
    upstream.spoil = spoil
    says = ["bytes): try again"] if spoil is send_half else ["is damaged"]
    refused("", [f"{upstream.url}/archive/{upstream.commit}.tar.gz", *says], error=(OSError, ValueError))


def test_server_out_of_reach(refused):
    refused(
        "", ["http://127.0.0.1:9/trees.git/git-upload-pack cannot be fetched", "--source"], OSError, repository="http://127.0.0.1:9/trees"
    )


def test_commit_that_the_server_does_not_have(refused, upstream):
    refused("", ["cannot be fetched (ERR ", "not our ref 7777"], OSError, commit="7" * 40)
    assert all("archive" not in path for path in upstream.asked)  # nothing long was downloaded


def test_server_that_lies(upstream, tmp_path, refused, monkeypatch):
    "Another commit under the name of this one: found by its hash."
    true = fetch.ask_for
    monkeypatch.setattr(fetch, "ask_for", lambda url, name: true(url, upstream.old if name == upstream.commit else name))
    refused("", [f"gave something else than the commit {upstream.commit}"])


def test_no_room(upstream, tmp_path, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(check.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        refused("", ["make room or name another disk", f"{upstream.commit}.tar.gz needs"])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*paths):
        raise full

    monkeypatch.setattr(fetch.os, "replace", fails)
    refused("", ["No space left on device"], OSError)


SCRIPT = """
import sys
from agrivision_repro.fetch import fetch_naip_trees
folder, commit, repository = sys.argv[1:]
fetch_naip_trees(folder, commit=commit, repository=repository, n_workers=1)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_midst(stop, upstream, tmp_path):
    "While it downloads: Ctrl-C leaves nothing; a kill leaves no data set, and its leavings go at the next attempt."
    upstream.spoil = send_slowly
    words = [sys.executable, "-c", SCRIPT, tmp_path / "trees", upstream.commit, upstream.url]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, until = tmp_path / ".trees.part/room/archive", time.monotonic() + 60
    while not part.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert part.exists()
    with pytest.raises(OSError, match=r"\.trees\.part is in use: another process fetches .*trees, so wait"):
        upstream.fetch(tmp_path / "trees")
    process.send_signal(stop)
    process.wait(30)
    assert [path.name for path in tmp_path.iterdir()] == ([] if stop == signal.SIGINT else [".trees.part"])
    upstream.spoil = None
    upstream.fetch(tmp_path / "trees")
    assert [path.name for path in tmp_path.iterdir()] == ["trees"]


def test_a_folder_that_stands_there(upstream, tmp_path):
    "One that another process uses, one that is not whole, one that no fetch made: each is left as it is."
    (tmp_path / ".trees.part").mkdir()
    with FileLock(tmp_path / ".trees.part/lock"), pytest.raises(OSError, match="is in use"):
        upstream.fetch(tmp_path / "trees")
    upstream.fetch(tmp_path / "trees")
    (tmp_path / "trees/csv/city_2020_0.csv").write_text("x,y\n")
    before = contents(tmp_path / "trees")
    with pytest.raises(FileExistsError, match=r"exists, but is not the whole commit \w{7} \(csv/city_2020_0.csv differs\): name a folder"):
        upstream.fetch(tmp_path / "trees")
    assert contents(tmp_path / "trees") == before
    mine = spoilt_copy(upstream, tmp_path / "mine", "")
    with pytest.raises(FileExistsError, match="lacks the commit"):
        upstream.fetch(mine)
    assert not (mine / PROOF).exists()


def run(monkeypatch, *words):
    "Run the command in this process; give its exit code."
    monkeypatch.setattr(sys, "argv", ["agrivision", "data", "fetch", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_command(upstream, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "fetch_naip_trees", partial(fetch_naip_trees, commit=upstream.commit, repository=upstream.url))
    assert run(monkeypatch, "naip-trees", "--out", tmp_path / "trees", "--workers", "1") == 0
    assert "0 faults" in capsys.readouterr().out
    assert run(monkeypatch, "naip-trees", "--out", tmp_path / "new", "--source", tmp_path / "none.zip", "--workers", "1") == 2
    assert capsys.readouterr().err == f"agrivision: {tmp_path / 'none.zip'} is missing: name the archive\n"
    assert run(monkeypatch, "agrivision-2020", "--out", tmp_path / "new") == 2
    assert "'agrivision-2020' cannot be fetched: wanted naip-trees" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not NAIP.is_dir(), reason="the NAIP chips are not beside this checkout")
def test_real_chips(tmp_path, monkeypatch):
    "120 real chips, committed, served and fetched; the sample says that it was drawn from the commit that is pinned."
    assert f"urban-tree-detection-data @ {COMMIT[:7]})" in (NAIP / "README.md").read_text()
    root = shutil.copytree(NAIP, tmp_path / "repository", copy_function=shutil.copyfile)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    upstream = Upstream(root)
    report = upstream.fetch(tmp_path / "trees")
    upstream.server.shutdown()
    assert contents(tmp_path / "trees").keys() == upstream.files().keys()
    assert [census.n_tiles for census in report.splits.values()] == [80, 20, 20] and not report.faults
