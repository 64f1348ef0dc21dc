"A trained model of the smallest scale, on four channels."

import pytest
from rasters import needs_rasterio

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
    return workspace.result(plan_run("smoke", "synthetic"))


@pytest.fixture(scope="session")
def predictor(result):
    return load_predictor(result, device="cpu", precision="float32")


@pytest.fixture(scope="session")
def test_set(workspace, result):
    (found,) = workspace.root(result.run.source).glob("**/test")
    return found
