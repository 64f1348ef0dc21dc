"Figure 1 is what the networks do: the traced steps against the authors' wiring, and against blocks that were changed."

from collections import Counter
from copy import deepcopy
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet50

from agrivision_repro.models.backbones import DEPTHS, NORMS, create_backbone
from agrivision_repro.models.norms import sync_norms
from agrivision_repro.report.kernels import forked_kernels
from agrivision_repro.study.blocks import (
    count_sites,
    draw_blocks,
    find_new,
    find_paths,
    norm_sites,
    paper_blocks,
    paper_nets,
    replay_steps,
    trace_steps,
)

TABLES = Path(__file__).resolve().parents[2] / "nbs" / "tables"
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # a stage


def labels(steps):
    return [step.label for step in steps]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", (18, 50))
def test_every_traced_block_computes_what_the_block_computes(depth, norm):
    torch.manual_seed(0)
    net = create_backbone(depth, norm, width=1 / 16)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 64, 12, 12)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            wanted = block(x)
            torch.testing.assert_close(replay_steps(block, trace_steps(block), x), wanted, rtol=0, atol=0)
            x = wanted


RESIDUAL = ["1×1 conv 256→64", "BN 64", "ReLU", "3×3 conv 64→64", "BN 64", "ReLU", "1×1 conv 64→256", "BN 256"]


@pytest.mark.parametrize("depth", (50, 101))
@pytest.mark.parametrize(
    "net, first, after",
    [
        ("ResNet{}", "BN 64", ["ReLU"]),
        ("IBN-Net{}-a", "IN 32 | BN 32", ["ReLU"]),
        ("IBN-Net{}-b", "BN 64", ["IN 256", "ReLU"]),
        ("IBN-Net{}-s", "SwitchNorm 64", ["ReLU"]),
    ],
)
def test_last_block_of_layer1(depth, net, first, after):
    paths = find_paths(paper_blocks(depth)[net.format(depth)])
    assert labels(paths.residual) == [RESIDUAL[0], first, *RESIDUAL[2:]]
    assert labels(paths.identity) == [] and paths.join.label == "+"
    assert labels(paths.after) == after


@pytest.mark.parametrize("depth", (50, 101))
def test_sites_are_the_authors(depth):
    "resnet.py:28-34, 107-108, 132, 144-149 of the authors' code."
    counts = count_sites(paper_nets(depth))
    found = {net: {} for net in counts.net}
    for row in counts[counts.kind != "BN"].itertuples():
        found[row.net][row.stage, row.place, row.kind] = row.sites
    first = {(f"layer{k}", "as first norm"): n for k, n in enumerate(BLOCKS[depth][:3], 1)}
    assert found[f"ResNet{depth}"] == {}
    assert found[f"IBN-Net{depth}-a"] == {(*where, "IN+BN"): n for where, n in first.items()}
    assert found[f"IBN-Net{depth}-s"] == {(*where, "SwitchNorm"): n for where, n in first.items()}
    layers = {(f"layer{k}", "after the addition", "IN"): 1 for k in (1, 2)}
    assert found[f"IBN-Net{depth}-b"] == layers | {("stem", "in the stem", "IN"): 1}
    sums = counts[counts.kind == "SwitchNorm"][["sites", "channels"]].sum().tolist()
    assert sums == {50: [13, 2_240], 101: [30, 6_592]}[depth]


@pytest.mark.parametrize("depth", DEPTHS)
def test_ibn_b_stands_in_last_blocks_alone(depth):
    sites = norm_sites(paper_nets(depth)[f"IBN-Net{depth}-b"])
    inside = sites[sites.kind.eq("IN") & sites.stage.ne("stem")]
    last = sites.groupby("stage").block.max()
    assert inside.block.tolist() == [last["layer1"], last["layer2"]]


@pytest.mark.parametrize("norm", NORMS)
def test_no_norm_is_missed(norm):
    "As many sites as the model has norms, counted without tracing."
    net = create_backbone(50, norm, width=1 / 16)
    kinds = Counter(type(m).__name__ for m in net.modules())
    halves = kinds["InstanceBatchNorm2d"]  # has one of each inside
    n_norms = kinds["BatchNorm2d"] + kinds["InstanceNorm2d"] + kinds["SwitchNorm2d"] + kinds["GroupNorm"] - halves
    assert len(norm_sites(net)) == n_norms


def test_a_changed_block_gives_another_graph():
    block = create_backbone(50, "ibn_b").layer1[-1]
    steps = trace_steps(block)
    exchanged = deepcopy(block)
    exchanged.bn1, exchanged.act1 = exchanged.act1, exchanged.bn1
    assert labels(trace_steps(exchanged))[1:4] == ["1×1 conv 256→64", "ReLU", "BN 64"]
    assert find_new(steps, steps) == set() and find_new(trace_steps(exchanged), steps) == {"bn1"}

    before_addition = deepcopy(block)  # IBN-b as §3.1 could be read
    before_addition.downsample, before_addition.act3 = block.act3.IN, block.act3.act
    paths = find_paths(trace_steps(before_addition))
    assert labels(paths.identity) == ["IN 256"] and labels(paths.after) == ["ReLU"]
    assert labels(find_paths(steps).after) == ["IN 256", "ReLU"]

    after_relu = deepcopy(block)
    after_relu.act3 = nn.Sequential(block.act3.act, block.act3.IN)
    assert labels(find_paths(trace_steps(after_relu)).after) == ["ReLU", "IN 256"]


def test_another_librarys_block_and_synced_norms_are_the_same():
    "torchvision's block uses one ReLU three times; synced batch norms are batch norms."
    net = create_backbone(50, "bn")
    ours = trace_steps(net.layer1[-1])
    theirs = trace_steps(resnet50().layer1[-1])
    assert labels(theirs) == labels(ours) and labels(find_paths(theirs).residual) == RESIDUAL
    assert labels(trace_steps(sync_norms(net).layer1[-1])) == labels(ours)


class Deaf(nn.Module):
    "Computes a norm and does not use it."

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        self.norm(x)
        return self.act(x) + x


def test_a_block_that_would_be_drawn_wrong_is_refused():
    with pytest.raises(ValueError, match="the output of BN 4 is unused"):
        find_paths(trace_steps(Deaf()))
    with pytest.raises(ValueError, match="0 steps have several inputs"):
        find_paths(trace_steps(nn.Sequential(nn.Conv2d(1, 1, 1))))
    with pytest.raises(ValueError, match="stage is 5: wanted one of 1, 2, 3, 4"):
        paper_blocks(50, 5)


@pytest.mark.parametrize("depth, stage", [(101, 1), (18, 2), (50, 4)])
def test_no_text_overlaps_and_none_leaves_its_box(depth, stage):
    blocks = paper_blocks(depth, stage) | {"first block of layer2": trace_steps(paper_nets(depth)[f"ResNet{depth}"].layer2[0])}
    figure = draw_blocks(blocks, "a note")
    figure.canvas.draw()
    ax = figure.axes[0]
    texts = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert not any(a.overlaps(b) for k, a in enumerate(texts) for b in texts[:k])
    assert min(t.get_fontsize() for t in [*ax.texts, *figure.legends[0].texts]) >= 8
    boxes = [p.get_window_extent() for p in ax.patches if p.get_width]
    inside = [t for t in texts if any(b.x0 < t.x0 and t.x1 < b.x1 and b.y0 < t.y0 and t.y1 < b.y1 for b in boxes)]
    steps = [step for own in blocks.values() for step in own[1:]]
    assert len(inside) == sum(len(step.label.split(" | ")) for step in steps)


@pytest.mark.parametrize("name, parameters", [("fig1_blocks", {"depth": 50}), ("fig_schedule", {"recipes": ["paper", "shipped"]})])
def test_notebook_runs_and_leaves_its_files(name, parameters, tmp_path):
    run = {"progress_bar": False, "kernel_name": "python3"}
    with forked_kernels():
        papermill.execute_notebook(str(TABLES / f"{name}.ipynb"), str(tmp_path / "ran.ipynb"), {"out": str(tmp_path), **parameters}, **run)
    (folder,) = (path.parent for path in tmp_path.rglob("tables"))
    written = {p.name for kind in ("tables", "figures") for p in (folder / kind).iterdir()}
    assert {f"{name}.png", f"{name}.csv", f"{name}.md", f"{name}.html"} <= written
    assert len(Image.open(folder / "figures" / f"{name}.png").info["Description"]) > 40
    assert len(nbformat.read(TABLES / f"{name}.ipynb", as_version=4).cells) <= 8
    header = (folder / "tables" / f"{name}.md").read_text().splitlines()[0]
    assert ("IBN-Net50-s" if name == "fig1_blocks" else "| Paper: §5 | Here: paper | Here: shipped |") in header
