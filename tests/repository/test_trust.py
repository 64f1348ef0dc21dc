"What SECURITY.md and THIRD_PARTY_LICENSES.md say is so."

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for path in (ROOT / "agrivision_repro").rglob("*.py") if path.name != "_modidx.py")


def test_every_dependency_has_a_license():
    from list_licenses import PAGE, list_dependencies, listed, name_license

    known = listed(PAGE.read_text())
    assert list(known) == list_dependencies() and "torch" in known and "ray" in known
    assert not [name for name, license in known.items() if license in ("", "not stated")]
    assert known["typer"] == name_license("typer")


def test_a_dependency_without_a_row_is_named(tmp_path, monkeypatch):
    import list_licenses

    page = tmp_path / "THIRD_PARTY_LICENSES.md"
    page.write_text(re.sub(r"^\| torch \|.*\n", "", list_licenses.PAGE.read_text(), flags=re.MULTILINE))
    monkeypatch.setattr(list_licenses, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["list_licenses.py", "--check"])
    with pytest.raises(SystemExit, match="THIRD_PARTY_LICENSES.md lacks torch: run tools/list_licenses.py"):
        list_licenses.main()


def calls(path: Path) -> dict[str, list[ast.Call]]:
    "Collect the calls of a module by the dotted name of what is called."
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run(path):
    "No eval, no pickle; PyTorch and NumPy read tensors and numbers only."
    found = calls(path)
    assert not found.keys() & {"eval", "exec", "compile", "pickle.load", "pickle.loads", "os.system", "joblib.load", "yaml.load"}
    for call in found.get("torch.load", []):
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"
    for call in found.get("np.load", []):
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("allow_pickle", "False") == "False"
    assert not any(k.arg == "shell" for name in found if name.startswith("subprocess.") for call in found[name] for k in call.keywords)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name in ("cli", "report")], ids=lambda path: path.stem)
def test_notebooks_and_pages_are_utf_8(path):
    "Whatever the system's own encoding is."
    found = [call for name, own in calls(path).items() if name.endswith((".read_text", ".write_text")) for call in own]
    assert all({k.arg: ast.unparse(k.value) for k in call.keywords}.get("encoding") == "'utf-8'" for call in found)


def test_every_url_that_is_fetched_is_told():
    "The hosts of the code's URLs that data or weights come from stand in THIRD_PARTY_LICENSES.md or SECURITY.md."
    from agrivision_repro.data.fetch import SOURCES
    from agrivision_repro.models.backbones import IMAGENET_URLS

    told = (ROOT / "THIRD_PARTY_LICENSES.md").read_text() + (ROOT / "SECURITY.md").read_text()
    for url in IMAGENET_URLS.values():
        assert url.split("/")[2] in told and re.search(r"-[0-9a-f]{8}\.pth$", url)
    assert all(source.repository.startswith("https://github.com/") for source in SOURCES.values()) and "GitHub" in told
    for name in re.findall(r"`backbones\.(\w+)`", told):
        assert name in (ROOT / "agrivision_repro/models/backbones.py").read_text()
