"One contract for every model, and the norms over several processes."

import shutil
import sys

import pytest
import segmentation_models_pytorch
import timm
import torch
from forked import run
from norms import EVERY_NORM
from processes import in_two_processes
from torch import nn
from torch.optim.swa_utils import update_bn

from agrivision_repro.models.backbones import DEPTHS, NORMS, branch_spreads, create_backbone
from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.models.norms import InstanceBatchNorm2d, SwitchNorm2d, recalibrate, sync_norms
from agrivision_repro.runs.plan import make_up_batch
from agrivision_repro.runs.run import Run, build_loss, build_model
from agrivision_repro.training.engine import make_engine
from agrivision_repro.training.loop import Trainer
from agrivision_repro.training.schedule import Recipe

TINY = 1 / 16  # of the width


@pytest.mark.parametrize("in_chans", [3, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_contract(depth, norm, in_chans):
    "Forward, backward, state-dict round trip, half precision, batch of one, odd sizes."
    torch.manual_seed(0)
    model = DeepLabV3Plus(3, depth, norm, in_chans=in_chans, width=TINY)
    odd = torch.randn(1, in_chans, 45, 67)
    model(odd).square().mean().backward()  # in training, a batch of one
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    torch.manual_seed(1)
    twin = DeepLabV3Plus(3, depth, norm, in_chans=in_chans, width=TINY)
    twin.load_state_dict(model.state_dict())
    model, twin = model.eval(), twin.eval()
    wanted = model(odd)
    assert wanted.shape == (1, 3, 45, 67)
    torch.testing.assert_close(twin(odd), wanted, rtol=0, atol=0)

    limit = wanted.std().item() * (2 if norm == "gn" else 0.5)  # untrained, groups of two channels and few pixels amplify rounding
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(odd).float(), wanted, rtol=0, atol=limit)
    assert twin.bfloat16()(odd.bfloat16()).isfinite().all()


BACKWARD = """
import torch
from agrivision_repro.models.backbones import create_backbone

torch.set_num_threads(1)
net = create_backbone(18, width=1 / 16).to(memory_format=torch.channels_last)
for _ in range(20):
    net(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)).square().mean().backward()
"""


def test_gradients_of_narrow_nets_leave_memory_alone():
    "oneDNN writes past its workspace in strided 1×1 convolutions of few channels; seen on CPUs with AVX2 and without AVX-512."
    done = run(sys.executable, "-c", BACKWARD)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("norm", NORMS)
def test_options_of_deeplab(norm):
    x = torch.randn(2, 4, 64, 64)
    for options in ({"output_stride": 8}, {"multigrid": False}, {"low_level": 3}):
        assert DeepLabV3Plus(5, 50, norm, width=TINY, **options)(x).shape == (2, 5, 64, 64)
    dilations = [block.conv2.dilation[0] for block in create_backbone(50, norm, output_stride=8).layer4]
    assert dilations == [4, 8, 16]  # the authors' at output stride 8
    assert {b.conv2.dilation for b in create_backbone(50, norm, output_stride=8).layer3} == {(2, 2)}


def results_of(model: nn.Module, way, x: torch.Tensor) -> dict:
    "Output, gradients and buffers of one training step, from the same start each time."
    start = {key: value.clone() for key, value in model.state_dict().items()}
    model.zero_grad()
    out = way(x)
    out.square().mean().backward()
    found = {"out": out.detach()} | {k: p.grad.clone() for k, p in model.named_parameters()}
    found |= {f"buffer {k}": b.clone() for k, b in model.state_dict().items() if "running" in k or "tracked" in k}
    model.load_state_dict(start)
    return found


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_layout_and_capture_change_no_result(norm):
    torch.manual_seed(0)
    model = DeepLabV3Plus(3, 18, norm, width=TINY).double()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    x = torch.randn(2, 4, 64, 64).double()
    plain = results_of(model, model, x)
    captured = torch.compile(model, backend="aot_eager", fullgraph=True)  # the whole graph; code is made for the norms below
    for way, layout in ((model, torch.channels_last), (captured, torch.contiguous_format)):
        torch.testing.assert_close(results_of(model, way, x.to(memory_format=layout)), plain, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_every_layer_keeps_channels_last(norm):
    "One that does not slows down all that follow: IBN-b's instance norms once did, by a fifth."
    model = create_backbone(18, norm, width=1 / 4).to(memory_format=torch.channels_last)
    lost = []

    def look(name, output):
        if not output.is_contiguous(memory_format=torch.channels_last):
            lost.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, x, y, name=name: look(name, y))
    model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert not lost


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_norms_change_no_result():
    torch.manual_seed(0)
    model = nn.Sequential(SwitchNorm2d(8), nn.ReLU(inplace=True), InstanceBatchNorm2d(8), SwitchNorm2d(8, statistics="in+bn")).double()
    x = torch.randn(3, 8, 9, 11).double()
    torch.testing.assert_close(results_of(model, torch.compile(model), x), results_of(model, model, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", [InstanceBatchNorm2d, SwitchNorm2d])
def test_norms_keep_the_methods_of_every_module(norm):
    "No attribute hides one, as `half` once did."
    hidden = {name for name in vars(norm(4)) if callable(getattr(nn.Module, name, None))}
    assert not hidden
    assert {p.dtype for p in norm(4).half().parameters()} == {torch.float16}


def test_update_bn_averages_the_batch_half_of_ibn_a():
    "PyTorch's tool sets momentum to None; so may a user."
    torch.manual_seed(0)
    ours, theirs = InstanceBatchNorm2d(8), nn.BatchNorm2d(4)
    batches = [torch.randn(4, 8, 5, 5) + k for k in range(3)]
    update_bn(batches, nn.Sequential(ours))
    update_bn([x[:, 4:] for x in batches], nn.Sequential(theirs))
    torch.testing.assert_close(ours.BN.state_dict(), theirs.state_dict())
    synced = sync_norms(nn.Sequential(nn.BatchNorm2d(4, momentum=None)))
    for x in batches:
        synced(x[:, 4:])
    torch.testing.assert_close(synced[0].state_dict(), theirs.state_dict())


@pytest.mark.parametrize("norm", [InstanceBatchNorm2d, SwitchNorm2d])
def test_an_empty_batch_changes_no_statistics(norm):
    module = norm(4)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert module(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_sync_norms_leaves_other_batch_norms_alone():
    "timm's BatchNormAct2d has an activation; norms without weights or running statistics cannot be converted."
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x)
    torch.testing.assert_close(sync_norms(model)(x), wanted, rtol=0, atol=0)
    for norm in (nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)):
        wanted = nn.BatchNorm2d(3)(x)
        torch.testing.assert_close(sync_norms(nn.Sequential(norm))(x), wanted)


def test_in_other_libraries():
    x = torch.randn(2, 4, 64, 64)
    features = timm.create_model("resnet101_ibn_s", features_only=True, in_chans=4, output_stride=16)
    assert [tuple(f.shape[1:]) for f in features(x)] == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 4, 4)]
    unet = segmentation_models_pytorch.Unet("tu-resnet50_ibn_a", in_channels=4, encoder_weights=None, classes=7)
    assert unet(x).shape == (2, 7, 64, 64)
    assert sum(isinstance(m, InstanceBatchNorm2d) for m in unet.modules()) == 13


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"depth": 35}, "depth is 35: wanted one of 18, 26, 34, 50, 101"),
        ({"norm": "sn"}, "norm is 'sn': wanted one of bn, ibn_a, ibn_b, ibn_s, gn"),
        ({"output_stride": 32}, "output_stride is 32: wanted one of 16, 8"),
        ({"in_chans": 5}, "in_chans is 5: wanted one of 3, 4"),
        ({"low_level": 2}, "low_level is 2: wanted one of 1, 3"),
        ({"depth": 18, "pretrained": True}, "no ImageNet weights for depth 18 with bn: wanted one of resnet50_bn, resnet101_bn"),
        ({"width": 0.5, "pretrained": True}, "set width=1 or pretrained=False"),
    ],
)
def test_what_does_not_exist(choices, says):
    with pytest.raises(ValueError, match=says):
        DeepLabV3Plus(3, **choices)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"input is \(1, 3, 64, 64\): wanted \(B, 4, H, W\)"):
        DeepLabV3Plus(3, 18, width=TINY)(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"input is \(2, 6, 4, 4\): wanted \(B, 8, H, W\)"):
        SwitchNorm2d(8)(torch.randn(2, 6, 4, 4))


def make_norms(sync: bool) -> nn.Sequential:
    torch.manual_seed(0)
    both = SwitchNorm2d(6, statistics="in+bn", sync=sync)
    norms = nn.Sequential(SwitchNorm2d(6, sync=sync), InstanceBatchNorm2d(6, sync=sync), both).double()
    for parameter in norms.parameters():
        nn.init.normal_(parameter)
    return norms


def run_norms(norms: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> dict:
    x = x.clone().requires_grad_()
    y = norms(x)
    y.backward(gradient)
    return {"y": y.detach(), "gx": x.grad, **{k: p.grad for k, p in norms.named_parameters()}, **dict(norms.named_buffers())}


def run_part(rank: int, parts: list) -> dict:
    return run_norms(make_norms(sync=True), *parts[rank])


def test_two_processes_are_one(tmp_path):
    "Each holds a part of the batch, of unequal size; the joined batch in one process is the truth."
    generator = torch.Generator().manual_seed(3)
    x, gradient = (torch.randn(5, 6, 4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    parts = [(x[:2], gradient[:2]), (x[2:], gradient[2:])]
    first, second = in_two_processes(run_part, tmp_path, parts)
    for key, wanted in run_norms(make_norms(sync=False), x, gradient).items():
        if key in ("y", "gx"):
            got = torch.cat([first[key], second[key]])
        elif "running" in key or "tracked" in key:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
            got = first[key]
        else:  # a parameter's gradient is the sum over processes
            got = first[key] + second[key]
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("norm", NORMS)
def test_branches_speak(norm):
    "Right after the start and after a short run, each branch has at least a tenth of the spread of the identity beside it."
    recipe = Recipe(8, 8, 14, lr=0.05, batch_size=4, width=1 / 8, pretrained=False)
    kind = Run(recipe, channels="rgb", norm=norm, lovasz=1.0)
    trainer = Trainer(build_model(kind), build_loss(kind), recipe, seed=0, engine=make_engine("cpu", "float32"))
    batch = make_up_batch(kind, 64, 4, torch.device("cpu"))
    for n_steps in (0, recipe.iterations):
        for _ in range(n_steps):
            trainer.step([batch])
        recalibrate(trainer.bare_model, [batch.x])
        table = branch_spreads(trainer.bare_model.eval(), batch.x)
        assert len(table) == 33 and table.ratio.min() > 0.1, f"after {n_steps} steps: {table.nsmallest(3, 'ratio')}"
        trainer.bare_model.train()


def test_timm_registry_starts_branches_too():
    model = timm.create_model("resnet50_ibn_a", channels=(8, 16, 32, 64), num_classes=3)
    assert all((block.bn3.weight == 1).all() for block in (*model.layer1, *model.layer4))
