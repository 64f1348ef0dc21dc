"A trained model of the smallest scale, on four channels."

import pytest
from rasters import needs_rasterio, run_command

from agrivision_repro.predict import scenes
from agrivision_repro.predict.windows import load_predictor
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace


@pytest.fixture(params=[pytest.param("rasterio", marks=needs_rasterio), "tifffile"])
def reader(request, monkeypatch):
    "Both libraries that read TIFFs."
    if request.param == "tifffile":
        monkeypatch.setattr(scenes, "find_rasterio", lambda: None)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("out"), device="cpu", precision="float32")


@pytest.fixture(scope="session")
def result(workspace):
    return workspace.result(plan_run("smoke", "synthetic", depth=18))


@pytest.fixture(scope="session")
def predictor(result):
    return load_predictor(result, device="cpu", precision="float32")


@pytest.fixture(scope="session")
def test_set(workspace, result):
    (found,) = workspace.root(result.run.source).glob("**/test")
    return found


@pytest.fixture(scope="session")
def shared(result, tmp_path_factory):
    "A folder of the command."
    folder = tmp_path_factory.mktemp("shared") / "model"
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, "share", result.folder.name, folder, "--results", result.folder.path.parents[1]) == 0
    return folder


@pytest.fixture(scope="session")
def forms(shared, result, tmp_path_factory):
    "The names of a Run, a folder and two exported files."
    home, found = tmp_path_factory.mktemp("exported"), [result.folder.name, shared]
    for name in ("net.pt2", "net.onnx"):
        if name == "net.onnx":
            pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
        with pytest.MonkeyPatch.context() as patch:
            assert run_command(patch, "export", result.folder.name, home / name, "--results", result.folder.path.parents[1]) == 0
        found.append(home / name)
    return found
