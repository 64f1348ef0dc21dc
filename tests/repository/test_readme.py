"Whoever copies from README gets what it says."

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.+?)^```", README, re.MULTILINE | re.DOTALL)


def write_tiles(root: Path) -> None:
    "Two classes of someone's own, in the layout that README names."
    rng = np.random.default_rng(0)
    for split, n in {"train": 4, "val": 2}.items():
        for i in range(n):
            pixels = {"images/rgb": (64, 64, 3), "images/nir": (64, 64), "labels/road": (64, 64), "labels/roof": (64, 64)}
            for folder, shape in pixels.items():
                values = rng.integers(0, 256, shape, np.uint8) if "images" in folder else rng.choice(np.array([0, 255], np.uint8), shape)
                path = root / split / folder / f"{split.upper()}{i}_0-0-64-64.{'jpg' if 'images' in folder else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)


def test_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiles(tmp_path / "mine")
    names: dict = {}
    assert len(SNIPPETS) == 4
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    assert 0 <= names["metric"].compute() <= 1
    assert len(names["features"].feature_info) == 5 and names["classifier"].num_classes == 6
    assert len(names["table"]) == 34 and names["table"]["divergence"].gt(0).all()
    assert names["result"].run.norm == "ibn_s" and list(tmp_path.glob("out/runs/*/scores.json"))


@pytest.mark.parametrize("line", [line for line in re.findall(r"^(?:\.venv/bin/)?agrivision .+$", README, re.MULTILINE)])
def test_commands_exist(line):
    "Every command that README shows, with options that the command knows."
    from typer.main import get_command
    from typer.testing import CliRunner

    from agrivision_repro.cli.app import app

    words = line.partition("#")[0].split()[1:]
    group, depth = get_command(app), 0
    while words[depth:] and words[depth] in getattr(group, "commands", {}):
        group, depth = group.commands[words[depth]], depth + 1
    assert depth, line
    said = CliRunner().invoke(app, [*words[:depth], "--help"]).output
    assert all(option in said for option in words if option.startswith("-")), (line, said)
