"The table of `20_norms`: each tool with each norm, beside nn.BatchNorm2d."

import copy
import pickle
from functools import cache

import pytest
import torch
from norms import EVERY_NORM
from processes import in_two_processes
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from agrivision_repro.models.deeplab import DeepLabV3Plus
from agrivision_repro.models.norms import LIMITS, TOOLS, InstanceBatchNorm2d, SwitchNorm2d

pytestmark = pytest.mark.filterwarnings("ignore:.*(is deprecated|incorrect|degrees of freedom)")  # TorchScript; an empty batch

COLUMNS = {"BatchNorm2d": nn.BatchNorm2d, "InstanceBatchNorm2d": InstanceBatchNorm2d, "SwitchNorm2d": SwitchNorm2d}
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
CHECKS = {}


def row(tool: str):
    "Register a function that checks one tool with a norm."
    return lambda check: CHECKS.setdefault(tool, check)


def images(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(shape or (4, 3, 16, 16), generator=torch.Generator().manual_seed(1)) + 1


def net_of(norm) -> nn.Sequential:
    "Two convolutions with a norm each, after some steps."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), norm(6))
    for _ in range(3):
        net(images())
    return net


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


def same(one, other, **tolerance) -> None:
    torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def state_of(net: nn.Module) -> dict:
    "A copy of weights and statistics, without the counters of batches."
    return {key: value.clone() for key, value in net.state_dict().items() if "tracked" not in key}


def gradients(net: nn.Module, call) -> dict:
    net.zero_grad()
    call(images()).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@row("train, eval, freeze")
def check_modes(norm):
    net = net_of(norm)
    before, wanted = state_of(net), net.eval()(images())
    net(images() + 1)
    freeze(net)
    same(net.train()(images()), wanted)  # frozen: as in evaluation, also after train()
    assert not any(p.requires_grad for p in net.parameters())
    same(state_of(net), before)
    unfreeze(net)
    net.train()(images() + 1).sum().backward()
    after = net.state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before if "running_mean" in k)
    assert all(p.requires_grad and p.grad is not None for p in net.parameters())


@row("stochastic weight averaging")
def check_update_bn(norm):
    net = norm(8)
    net(images(4, 8, 5, 5) + 9)
    update_bn([images(4, 8, 5, 5), images(4, 8, 5, 5) + 2], nn.Sequential(net))
    (bn,) = batch_norms(nn.Sequential(net))
    same(bn.running_mean, (images(4, 8, 5, 5).mean((0, 2, 3)) + 1)[-bn.num_features :])
    assert round(bn.momentum, 9) == 0.1


@row("moving average of weights")
def check_averages(norm):
    net = net_of(norm)
    averaged, ema = AveragedModel(net, use_buffers=True), ModelEmaV3(net, decay=0.5)
    averaged.update_parameters(net)
    start = state_of(net)
    for value in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
        value.data += 2
    averaged.update_parameters(net)
    ema.update(net)
    for moved in (averaged.module, ema.module):
        same(state_of(moved), {key: value + 1 for key, value in start.items()})


def share_batch(rank: int, names: list[str]) -> dict:
    "Convert each norm and run this process's part of the batch; an error is a result too."
    results = {}
    for name in names:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(COLUMNS[name](8)))
        assert all(isinstance(bn, nn.SyncBatchNorm) for bn in batch_norms(net))
        x = images(5, 8, 4, 3)[slice(0, 2) if rank == 0 else slice(2, 5)].requires_grad_()
        try:
            y = net(x)
            y.square().sum().backward()
            results[name] = {"y": y.detach(), "x": x.grad, "mean": batch_norms(net)[0].running_mean, "var": batch_norms(net)[0].running_var}
        except ValueError as error:
            results[name] = str(error)
    return results


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> list[dict]:
    return in_two_processes(share_batch, tmp_path_factory.mktemp("shared"), list(COLUMNS))


@row("several processes")
def check_processes(norm, shared):
    parts = [results[norm.__name__] for results in shared]
    if isinstance(parts[0], str):
        raise ValueError(parts[0])
    x, net = images(5, 8, 4, 3).requires_grad_(), norm(8)
    y = net(x)
    y.square().sum().backward()
    same(torch.cat([part["y"] for part in parts]), y.detach())
    same(torch.cat([part["x"] for part in parts]), x.grad)
    for part in parts:
        same([part["mean"], part["var"]], [batch_norms(net)[0].running_mean, batch_norms(net)[0].running_var])


@row("empty batch")
def check_empty(norm):
    net = norm(8)
    net(images(4, 8, 5, 5))
    before = state_of(net)
    assert net(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 5, 5)
    same(state_of(net), before, rtol=0, atol=0)


@row("weight decay")
def check_weight_decay(norm):
    net = net_of(norm)
    groups = param_groups_weight_decay(net, 0.1)
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert {id(p) for p in decayed} == {id(net[0].weight), id(net[3].weight)}


@row("copies")
def check_copies(norm):
    net = net_of(norm)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same(twin.state_dict(), net.state_dict(), rtol=0, atol=0)
        same(twin.eval()(images()), net.eval()(images()), rtol=0, atol=0)
        twin.train()(images() + 1)
        assert not torch.equal(batch_norms(twin)[0].running_mean, batch_norms(net)[0].running_mean)
        twin.load_state_dict(net.state_dict())
        net.train()


@row("torch.func")
def check_func(norm):
    net = net_of(norm).eval()
    weights = dict(net.named_parameters())

    def loss(weights, x):
        return functional_call(net, weights, (x,)).square().mean()

    same(grad(loss)(weights, images()), gradients(net, net))
    biases = {name: p for name, p in weights.items() if name.endswith("bias")}
    same(grad(loss)(biases, images()), {name: g for name, g in gradients(net, net).items() if name in biases})
    each = vmap(grad(lambda weights, x: loss(weights, x[None])), (None, 0))(weights, images())
    same({name: g.mean(0) for name, g in each.items()}, gradients(net, net))
    x, direction = images().double(), torch.ones(4, 3, 16, 16, dtype=torch.float64)
    net.double()
    slope = (net(x + 1e-6 * direction) - net(x - 1e-6 * direction)) / 2e-6
    same(jvp(net, (x,), (direction,))[1], slope, rtol=1e-4, atol=1e-6)


@row("second derivatives")
def check_second(norm):
    for net in (norm(2).double(), norm(2).double().eval()):
        assert torch.autograd.gradgradcheck(net, images(2, 2, 2, 2).double().requires_grad_())


@row("FX")
def check_fx(norm):
    net = net_of(norm)
    features = create_feature_extractor(copy.deepcopy(net), {"1": "first", "4": "last"})
    same(features.train()(images())["last"], net.train()(images()), rtol=0, atol=0)
    same(features.eval()(images())["last"], net.eval()(images()), rtol=0, atol=0)
    same(features.state_dict(), net.state_dict(), rtol=0, atol=0)


def check_sizes(net: nn.Module, exported) -> None:
    "Compare an exported model with its source on several batch and image sizes."
    with torch.no_grad():
        for x in (images(), images(2, 3, 21, 30), images(1, 3, 8, 9)):
            same(exported(x), net(x))


@row("torch.jit.trace")
def check_trace(norm):
    net = net_of(norm).eval()
    check_sizes(net, torch.jit.trace(net, images()))


@row("torch.jit.script")
def check_script(norm):
    net = net_of(norm).eval()
    check_sizes(net, torch.jit.script(net))


@row("torch.export")
def check_export(norm):
    net = net_of(norm).eval()
    check_sizes(net, export(net, (images(),), dynamic_shapes=(DYNAMIC,)).module())


def onnx_of(net: nn.Module | ExportedProgram, x: torch.Tensor, path):
    "Export a model, or one that is exported already, and return a function that runs it in onnxruntime."
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@row("ONNX")
def check_onnx(norm, tmp_path):
    net = net_of(norm).eval()
    check_sizes(net, onnx_of(net, images(), tmp_path / "net.onnx"))


@row("channels_last")
def check_layout(norm):
    net = norm(8)
    x = images(4, 8, 5, 6)
    y = net(x.to(memory_format=torch.channels_last))
    same(y, net(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


@row("half precision")
def check_half(norm):
    net = net_of(norm)
    wanted = net(images())
    with torch.autocast("cpu", torch.bfloat16):
        same(net(images()).float(), wanted, rtol=0.05, atol=0.1)
    half = copy.deepcopy(net).bfloat16()(images().bfloat16())
    assert half.dtype == torch.bfloat16
    same(half.float(), wanted, rtol=0.05, atol=0.1)


@row("checkpointing")
def check_checkpointing(norm):
    net = net_of(norm)
    same(gradients(net, lambda x: checkpoint(net, x, use_reentrant=False)), gradients(net, net))


@row("torch.compile")
def check_compile(norm):
    net, twin = net_of(norm), net_of(norm)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    same(gradients(twin, compiled), gradients(net, net))
    same(twin.state_dict(), net.state_dict())
    twin.eval(), net.eval()
    with torch.no_grad():
        same(compiled(images()), net(images()))


def test_every_row_has_a_check():
    assert CHECKS.keys() == TOOLS.keys()
    assert LIMITS.keys() <= {(tool, norm) for tool in TOOLS for norm in COLUMNS}


@pytest.mark.parametrize("norm", COLUMNS)
@pytest.mark.parametrize("tool", TOOLS)
def test_cell(tool, norm, request):
    check = CHECKS[tool]
    fixtures = {name: request.getfixturevalue(name) for name in check.__code__.co_varnames[1 : check.__code__.co_argcount]}
    if (tool, norm) not in LIMITS:
        check(COLUMNS[norm], **fixtures)
        return
    with pytest.raises((TypeError, ValueError), match="use torch.export|to be on GPU"):
        check(COLUMNS[norm], **fixtures)


class PublicSwitchNorm(nn.Module):
    "Parameters and buffers of the public SwitchNorm2d, in its order and shapes."

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(1, channels, 1, 1)), nn.Parameter(torch.rand(1, channels, 1, 1))
        self.mean_weight, self.var_weight = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.rand(1, channels, 1))


def test_switch_norm_exchanges_checkpoints_with_the_public_one():
    theirs, ours, back = (nn.Sequential(make(6)) for make in (PublicSwitchNorm, SwitchNorm2d, PublicSwitchNorm))
    ours.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.state_dict())
    same(dict(back.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert torch.equal(ours[0].BN.weight, theirs[0].weight.flatten())
    with torch.device("meta"):
        assigned = nn.Sequential(SwitchNorm2d(6))
    assigned.to_empty(device="cpu").load_state_dict(theirs.state_dict(), assign=True)
    same(assigned.eval()(images(2, 6, 4, 4)), ours.eval()(images(2, 6, 4, 4)), rtol=0, atol=0)
    kept = ours.state_dict(keep_vars=True)
    assert {id(p) for p in ours.parameters()} <= {id(value) for value in kept.values()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.Sequential(PublicSwitchNorm(5)).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "0.running_mean"})


@cache
def deeplab(norm: str) -> tuple[nn.Module, ExportedProgram]:
    "A net of each norm, and itself exported for any size."
    torch.manual_seed(0)
    net = DeepLabV3Plus(3, 18, norm, width=1 / 16).eval()
    return net, export(net, (images(2, 4, 64, 64),), dynamic_shapes=(DYNAMIC,))


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_deeplab_exports_with_dynamic_sizes(norm):
    net, program = deeplab(norm)
    run, logits = program.module(), create_feature_extractor(net, {"interpolate": "logits"})
    with torch.no_grad():
        for x in (images(2, 4, 64, 64), images(1, 4, 80, 50)):
            same(run(x), net(x))
            same(logits(x)["logits"], net(x))


@pytest.mark.parametrize("norm", EVERY_NORM)
def test_deeplab_in_onnxruntime(norm, tmp_path):
    net, program = deeplab(norm)
    run, exact = onnx_of(program, images(2, 4, 64, 64), tmp_path / "net.onnx"), copy.deepcopy(net).double()
    with torch.no_grad():
        for x in (images(2, 4, 64, 64), images(1, 4, 80, 50), images(3, 4, 96, 64)):
            same(run(x), exact(x.double()).float())  # eager's own rounding is as large as the runtime's
