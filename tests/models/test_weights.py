"ImageNet weights: full-size files under the public key names, served from a local folder; and files that must be refused."

import hashlib
import os

import pytest
import timm
import torch
from authors import backbone_state, fill

from agrivision_repro.models import backbones
from agrivision_repro.models.backbones import IMAGENET_URLS, create_backbone, fetch_checkpoint, load_imagenet, make_resnet
from agrivision_repro.study.paper import PAPER_NORMS


def publish(folder, name: str, payload: object) -> str:
    "Save a checkpoint under the name that its SHA-256 asks for; return its address."
    path = folder / name
    torch.save(payload, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"{name}-{digest[:8]}.pth").as_uri()


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> dict:
    "Six files as published, classifier included, filled by name; IBN-s has none of its own."
    folder, found = tmp_path_factory.mktemp("served"), {}
    classifier = {"fc.weight": fill("fc.weight", [1000, 2048]), "fc.bias": fill("fc.bias", [1000])}
    for depth in (50, 101):
        for norm in ("bn", "ibn_a", "ibn_b"):
            found[depth, norm] = publish(folder, f"resnet{depth}_{norm}", backbone_state(depth, norm) | classifier)
        found[depth, "ibn_s"] = found[depth, "ibn_a"]
    return found


@pytest.fixture
def served(urls, monkeypatch, tmp_path):
    monkeypatch.setattr(backbones, "IMAGENET_URLS", urls)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


@pytest.mark.parametrize("norm", PAPER_NORMS)
@pytest.mark.parametrize("depth", [50, 101])
def test_every_variant(depth, norm, served, caplog):
    with caplog.at_level("INFO", logger="agrivision_repro.models.backbones"):
        model = create_backbone(depth, norm, in_chans=4, pretrained=True)
    own, public = model.state_dict(), backbone_state(depth, "ibn_a" if norm == "ibn_s" else norm)
    stem = public.pop("conv1.weight")
    torch.testing.assert_close(own.pop("conv1.weight"), torch.cat([stem, stem[:, :1]], 1))
    fresh = own.keys() - public.keys()
    for key in own.keys() - fresh:
        torch.testing.assert_close(own[key], public[key], msg=key)
    is_switched = [key.split(".")[0] in ("layer1", "layer2", "layer3") and key.split(".")[2] == "bn1" for key in fresh]
    assert all(is_switched) and bool(fresh) == (norm == "ibn_s")
    assert set(model.imagenet_report.fresh) == fresh
    assert {"fc.weight", "fc.bias"} <= set(model.imagenet_report.skipped)  # a backbone has no classifier
    assert f"{len(own) + 1 - len(fresh)} tensors loaded" in caplog.text and f"{len(fresh)} left fresh" in caplog.text


def test_timm_starts_from_the_same_file(served):
    model = timm.create_model("resnet50_ibn_a", pretrained=True, in_chans=4)
    torch.testing.assert_close(model.conv1.weight[:, 3], fill("conv1.weight", [64, 3, 7, 7])[:, 0])
    torch.testing.assert_close(model.fc.bias, fill("fc.bias", [1000]))
    with pytest.raises(ValueError, match="in_chans of a pretrained model is 5: wanted one of 3, 4"):
        timm.create_model("resnet50_ibn_a", pretrained=True, in_chans=5)


def test_the_cache_is_used(urls, served):
    url = urls[50, "bn"]
    fetch_checkpoint(url)
    (cached,) = served.iterdir()
    before = cached.stat().st_mtime_ns
    fetch_checkpoint(url)
    assert cached.name == url.rsplit("/", 1)[1] and cached.stat().st_mtime_ns == before


def test_no_network(served, monkeypatch):
    url = IMAGENET_URLS[101, "ibn_b"].replace("https://github.com", "file:///nowhere")
    with pytest.raises(ValueError) as error:
        fetch_checkpoint(url)
    assert all(words in str(error.value) for words in (url, "resnet101_ibn_b-c55f6dba.pth", str(served), "by hand"))
    assert not any(served.iterdir())


def test_file_put_there_by_hand_is_checked(served):
    served.mkdir(parents=True)
    (served / "resnet50_ibn_a-d9d0bb7b.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"has SHA-256 [0-9a-f]{8}…, wanted d9d0bb7b…: delete it"):
        fetch_checkpoint(IMAGENET_URLS[50, "ibn_a"])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_code_in_a_checkpoint_never_runs(is_legacy, served, tmp_path):
    path = tmp_path / "bad"
    torch.save({"conv1.weight": Hostile(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not is_legacy)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="contains more than tensors or is damaged"):
        fetch_checkpoint(path.rename(tmp_path / f"bad-{digest[:8]}.pth").as_uri())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("is_wrapped", "says"),
    [(True, "no key of the checkpoint matches: it has module.conv1.weight"), (False, r"is \(32, 64, 1, 1\) in the checkpoint")],
)
def test_wrong_checkpoints(is_wrapped, says, served, tmp_path, monkeypatch):
    model = make_resnet(50, "bn")
    state = model.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    narrow = {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"][:32]}
    url = publish(tmp_path, "wrong", wrapped if is_wrapped else narrow)
    monkeypatch.setitem(backbones.IMAGENET_URLS, (50, "bn"), url)
    with pytest.raises(ValueError, match=says):
        load_imagenet(model, 50, "bn")
