"A user's mistake is one line that names it and its remedy, an exit code, and nothing half-written."

import os
import shutil
import subprocess
import sys

import pytest
from forked import AGRIVISION, Forked, agrivision, wait_until
from PIL import Image

from agrivision_repro.cli.app import main
from agrivision_repro.cli.options import read_value
from agrivision_repro.data.synthetic_files import SyntheticConfig, write_synthetic


def test_the_shell_completes():
    "What `agrivision --install-completion` sets up."
    environment = os.environ | {"_AGRIVISION_COMPLETE": "complete_bash", "COMP_WORDS": "agrivision data ch", "COMP_CWORD": "2"}
    assert subprocess.run([AGRIVISION], env=environment, capture_output=True, text=True).stdout.split() == ["check"]


@pytest.fixture
def mistake(monkeypatch, capsys):
    "Run the command in this process: it must fail with one line that says all of `contains`, and write nothing."

    def run(out, *words, contains):
        monkeypatch.setattr(sys, "argv", ["agrivision", "reproduce", "--device", "cpu", "--out", str(out), *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line]
        assert stop.value.code == 2, printed
        assert len(lines) == 1 and lines[0].startswith("agrivision: "), printed
        assert all(words in lines[0] for words in contains), printed
        assert not out.exists()

    return run


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("farm") / "farm", SyntheticConfig(64, 2, 1, 1))


@pytest.fixture
def tree(farm, tmp_path):
    return shutil.copytree(farm, tmp_path / "tree")


REAL = ["--scale", "smoke", "--data", "agrivision-2020", "--data-root"]


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["--sclae", "smoke"], ["--sclae"]),
        (["--scale", "huge"], ["scale is 'huge'", "smoke, laptop, workstation, paper"]),
        (["--data", "agrivision"], ["data is 'agrivision'", "naip-trees"]),
        (["--seeds", "1,x"], ["seeds are '1,x'"]),
        (["-p", "lamda2=0"], ["unknown parameter 'lamda2=0'", "lambda2"]),
        (["-p", "lambda2=much"], ["wanted float"]),
        (["-p", "seeds=0,x"], ["seeds are '0,x'"]),
        (["-p", "report=elsewhere"], ["unknown parameter 'report=elsewhere'"]),
        (["table7"], ["no table table7", "table1_modality"]),
        (["--device", "tpu"], ["device is 'tpu'"]),
        (["--data", "naip-trees"], ["--data-root"]),
        (["--data", "naip-trees", "--data-root", "/nowhere/at/all"], ["/nowhere/at/all is not a folder"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith(("-", "table")) else "",
)
def test_bad_parameter(words, contains, tmp_path, mistake):
    mistake(tmp_path / "out", "--scale", "smoke", *words, contains=contains)


def test_another_layout(tmp_path, mistake):
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    mistake(tmp_path / "out", *REAL, tmp_path / "data", contains=["lacks train/images/rgb", "it contains: pictures"])


def plant(tree, fault):
    "Damage one NIR image, or a label folder; give the words that must name it."
    nir = sorted((tree / "train/images/nir").glob("*.jpg"))[3]
    if fault == "absent":
        nir.unlink()
    elif fault == "truncated":
        nir.write_bytes(nir.read_bytes()[:200])
    elif fault == "size":
        Image.new("L", (32, 64)).save(nir)
    elif fault == "colour":
        Image.new("RGB", (64, 64)).save(nir)
    elif fault == "labels":
        shutil.rmtree(tree / "train/labels/waterway")
        return "train/labels/waterway"
    return str(nir)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("absent", "is missing: unpack it again"),
        ("truncated", "cannot be read"),
        ("size", "is 64×32 pixels, but the tile's RGB image is 64×64"),
        ("colour", "wanted L bytes"),
        ("labels", "lacks train/labels/waterway"),
    ],
)
def test_bad_data(fault, says, tree, tmp_path, mistake):
    name = plant(tree, fault)
    mistake(tmp_path / "out", *REAL, tree, contains=[name, says])


def test_a_mistake_in_the_shell():
    "The same through the installed command, which starts as a shell starts it."
    done = subprocess.run([AGRIVISION, "reproduce", "--sclae", "smoke"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--sclae" in done.stderr


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    "SIGKILL when some runs are finished: those are not repeated, and the report is made."
    out = tmp_path / "out"
    words = ["reproduce", "table3_losses", "--scale", "smoke", "--device", "cpu", "--out", out]
    process = Forked(AGRIVISION, *words)
    wait_until(lambda: len(list(out.glob("runs/*/scores.json"))) >= 2, 120)
    process.kill()
    process.wait()
    finished = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("runs/*/scores.json")}
    assert 2 <= len(finished) < 5
    assert not (out / "index.html").exists()
    assert agrivision(*words).returncode == 0
    again = {p.parent.name: p.stat().st_mtime_ns for p in out.glob("runs/*/scores.json")}
    assert len(again) == 5 and finished.items() <= again.items()
    page = (out / "index.html").read_text()
    assert "<script" not in page and 'src="http' not in page and "IBN-Net101-a" in page


def test_runs_from_any_folder(tmp_path):
    "The notebook is found, and relative --out is the caller's."
    done = agrivision("reproduce", "fig_schedule", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "index.html").is_file()
    assert done.stdout.strip() == f"report: {tmp_path / 'here' / 'index.html'}"


def test_a_warning_is_one_line(farm, tmp_path):
    "Tiles of one's own without boundaries and masks."
    mine = tmp_path / "mine"
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            shutil.copytree(farm / split / folder, mine / split / folder)
    done = agrivision("data", "check", mine, "--data", "classes:waterway")
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("checking ")]  # without progress bars
    assert len(lines) == 2 and all(line.startswith("agrivision: ") for line in lines), done.stderr
    assert "lacks boundaries/ or masks/: the pixels that they would mask count as valid" in lines[0]


def test_booleans_are_read_in_either_case():
    assert [read_value(text) for text in ("true", "False", "truth", "0.5")] == [True, False, "truth", 0.5]
