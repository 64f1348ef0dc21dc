"A comparison of two runs by their tiles: the counts that are kept, and the intervals that are made of them."

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_in_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision_repro.analysis import significance as paired
from agrivision_repro.analysis.significance import draw_differences, paired_bootstrap, resample_iou, stack_seeds, sum_groups
from agrivision_repro.cli.app import main
from agrivision_repro.data.batches import make_batch, whole_tile
from agrivision_repro.data.readers import UrbanTrees
from agrivision_repro.metrics import MultilabelIoU, tile_overlap
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace, score_again

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def draw_counts(seed: int, n_runs: int = 1, n_tiles: int = 12, n_classes: int = 3) -> np.ndarray:
    "Counts of runs, `(S, N, C, 2)`, one class in a third of the tiles only."
    rng = np.random.default_rng(seed)
    union = rng.integers(1, 10**6, (n_runs, n_tiles, n_classes))
    union[:, n_tiles // 3 :, -1] = 0
    return np.stack([rng.integers(0, union + 1), union], -1)


# what is kept


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A smoke Run that is scored on both modalities."
    workspace = Workspace(tmp_path_factory.mktemp("paired"), device="cpu", precision="float32")
    return workspace, workspace.result(plan_run("smoke", "synthetic", depth=18, channels="nir3"))


def check_sums(counts: np.ndarray, scores: dict) -> None:
    hits, union = counts.sum(0).T
    iou = [h / u if u else None for h, u in zip(hits.tolist(), union.tolist(), strict=True)]
    assert iou == scores["multilabel"]["per_class"]


def test_a_run_keeps_what_its_scores_are_made_of(trained):
    workspace, result = trained
    kept = np.load(result.folder / "tiles.npy", allow_pickle=False)
    assert kept.shape == (2, 4, 7, 2) and kept.dtype == np.int64
    scores = json.loads((result.folder / "scores.json").read_text())["last"]["scores"]
    for k, channels in enumerate(("rgb", "nir3")):
        assert (result.tile_counts(channels) == kept[k]).all()
        check_sums(kept[k], scores[channels])
    assert (result.tile_counts() == kept[1]).all() and (kept[0] != kept[1]).any()
    assert not list(result.folder.path.glob("*.new"))


def test_each_tile_is_its_own_score(trained):
    "Row k is what tile k gives when it is scored alone."
    workspace, result = trained
    feed, model = workspace.feed(result.run, "val", "rgb"), result.model()
    for k, counts in enumerate(result.tile_counts("rgb")):
        planes, view, index = whole_tile(feed.tiles, k)
        sample = type(whole_tile(feed.tiles, k))(torch.from_numpy(planes)[None], torch.tensor(view)[None], torch.tensor([index]))
        batch = make_batch(sample, "rgb", 7)
        with torch.no_grad():
            own = tile_overlap(model(batch.x), batch.targets, batch.valid)
        assert own[0].tolist() == counts.tolist()


def test_the_fields_of_the_tiles(trained):
    workspace, result = trained
    for limit in (0, 3):
        run = replace(result.run, recipe=replace(result.run.recipe, max_val_tiles=limit))
        names = [tile.name for tile in workspace.tiles(run, "val")]
        assert len(names) == (limit or 4) and workspace.fields(run) == [name.split("_")[0] for name in names]


def test_tiles_that_do_not_name_their_field(monkeypatch):
    "Each is drawn by itself."
    run, workspace = plan_run("smoke", "naip-trees"), Workspace()
    monkeypatch.setattr(UrbanTrees, "find_names", lambda self: ["santa_monica_1", "santa_monica_2"] if self.split == "val" else ["chico_1"])
    monkeypatch.setattr(workspace, "open", lambda _source, split: UrbanTrees(Path(), split, run.edition.classes))
    assert workspace.fields(run) == ["santa_monica_1", "santa_monica_2"]


@pytest.fixture
def without(trained):
    "The same Run as one that was scored before the counts were kept."
    _, result = trained
    path = result.folder / "tiles.npy"
    content = path.read_bytes()
    path.unlink()
    yield result, path, content
    path.write_bytes(content)


def test_an_older_run_says_what_to_do_and_the_command_does_it(trained, without, monkeypatch, capsys):
    workspace, (result, path, content) = trained[0], without
    with pytest.raises(ValueError, match=r"tiles.npy is missing: create it with (.*) --data-root DIR, as in training$") as told:
        result.tile_counts()
    command = str(told.value).partition("create it with ")[2].partition(" --data-root")[0].split()
    assert command == ["agrivision", "runs", "--out", str(workspace.out), "score", result.folder.name]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--precision", "float32"])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{result.folder.name}  {result.run.title}" and printed[-1].endswith("scores-last-none.json")
    assert printed[2].startswith("  tested on rgb: multi-label ") and " (was " in printed[2]
    assert path.read_bytes() == content
    path.unlink()
    assert score_again(result.folder, workspace) == result.scores  # its JSON file is there: the counts still come back
    assert path.read_bytes() == content
    path.write_bytes(content + b"?")
    score_again(result.folder, workspace)
    score_again(result.folder, workspace, "best")
    assert path.read_bytes() == content + b"?"  # left alone where it is


@pytest.mark.parametrize("checkpoint, tta", [("best", "none"), ("last", "d4")])
def test_other_scores_leave_no_counts(checkpoint, tta, trained, without):
    "They are of the last weights on tiles as they are, and of nothing else."
    result, path, _ = without
    score_again(result.folder, trained[0], checkpoint, tta)
    assert not path.exists()


DAMAGED = {
    "cut": (lambda content: content[:-3], "is damaged"),
    "empty": (lambda content: b"", "is damaged"),
    "no array": (lambda content: b"x" * 200, "is damaged"),
    "other numbers": (lambda content: content.replace(b"<i8", b"<u8"), r"uint64, wanted \(2, N, 7, 2\) int64"),
    "another shape": (lambda content: content.replace(b"(2, 4, 7, 2)", b"(4, 2, 7, 2)"), r"is \(4, 2, 7, 2\) int64, wanted \(2, N, 7, 2\)"),
}


@pytest.mark.parametrize(("spoil", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_counts(spoil, says, without):
    result, path, content = without
    path.write_bytes(spoil(content))
    with pytest.raises(ValueError, match=rf"{says}.*remove it \(then create it with agrivision runs --out .* score"):
        result.tile_counts()


def test_a_test_input_that_is_none(trained):
    with pytest.raises(ValueError, match="channels is 'rgbn': wanted one of rgb, nir3"):
        trained[1].tile_counts("rgbn")


def test_two_processes_count_as_one(tmp_path):
    "Each process takes its own tiles; both get all, in order, and one that has no tile of its own does, too."
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_in_parts(2 if name == "two" else 1, HELPERS / "sharing.py", tmp_path / name, "--tiles")
    for n in (17, 1):
        wanted = np.load(tmp_path / "one" / f"{n}-0.npy")
        assert wanted.shape == (n, 7, 2) and wanted.dtype == np.int64 and wanted.any((1, 2)).all()
        for rank in (0, 1):
            np.testing.assert_array_equal(np.load(tmp_path / "two" / f"{n}-{rank}.npy"), wanted)
            check_sums(wanted, json.loads((tmp_path / "two" / f"{n}-{rank}.json").read_text()))


# what is made of it


def by_hand(a, b, n_resamples: int, seed: int, absent: float | None = None) -> list[float]:
    "One resample after the other in whole numbers and fractions, with the same draws."
    generator, differences = torch.Generator().manual_seed(seed), []
    for _ in range(n_resamples):
        picks = torch.randint(a.shape[1], (a.shape[1],), generator=generator).tolist()
        sides = []
        for side in (a, b):
            means = []
            for tiles in side.tolist():
                sums = [[sum(tiles[t][c][k] for t in picks) for k in (0, 1)] for c in range(a.shape[2])]
                iou = [Fraction(h, u) if u else absent for h, u in sums]
                iou = [Fraction(x) for x in iou if x is not None]
                means.append(sum(iou) / len(iou))
            sides.append(sum(means) / len(means))
        differences.append(float(100 * (sides[1] - sides[0])))
    return differences


@pytest.mark.parametrize("absent", [None, 0.0, 1.0])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), n_a=st.integers(1, 3), n_b=st.integers(1, 3))
def test_brute_force(absent, seed, n_a, n_b):
    "Classes that a resample lacks, and unequal numbers of seeds, among them."
    a, b = draw_counts(seed, n_a, 4), draw_counts(seed + 1, n_b, 4)
    found = paired_bootstrap(a, b, 40, seed, absent=absent)
    wanted = by_hand(a, b, 40, seed, absent)
    np.testing.assert_allclose(found.resampled, wanted, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose([found.low, found.high], np.quantile(wanted, [0.025, 0.975]), rtol=1e-11, atol=1e-11)
    assert found.share == np.mean(np.sign(wanted) == np.sign(found.difference))


def test_all_resamples_there_are():
    "Three tiles: 27 equally likely draws, whose distribution 40,000 resamples meet."
    a, b = draw_counts(0, 1, 3, 1), draw_counts(1, 1, 3, 1)
    a[..., 1] = b[..., 1] = 10**6
    found = paired_bootstrap(a, b, 40_000)
    each = 100 * (b - a)[0, :, 0, 0] / 10**6
    every = sorted(each[list(picks)].mean() for picks in np.ndindex(3, 3, 3))
    np.testing.assert_allclose(np.unique(found.resampled.round(9)), np.unique(np.round(every, 9)))
    assert found.resampled.mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / 200)
    assert found.difference == pytest.approx(each.mean())


def test_point_and_classes_are_the_metrics():
    "Pixels of all tiles first, then a division: what the metric computes from whole batches."
    rng = torch.Generator().manual_seed(0)
    targets = torch.rand(6, 4, 9, 15, generator=rng) < 0.3
    targets[:, 3] = False
    valid = torch.rand(6, 9, 15, generator=rng) < 0.8
    metrics, counts = [], []
    for shift in (0.0, 1.5):
        logits = torch.randn(targets.shape, generator=rng) + shift * targets
        logits[:, 3] = -1.0
        metrics.append(MultilabelIoU(4))
        tiles = []
        for k in (0, 2, 4):
            pixels = logits[k : k + 2], targets[k : k + 2], valid[k : k + 2]
            metrics[-1].update(*pixels)
            tiles.append(tile_overlap(*pixels))
        counts.append(torch.cat(tiles).numpy())
        hits, predicted, present = metrics[-1].counts()
        assert counts[-1].sum(0).tolist() == torch.stack([hits, predicted + present - hits], -1).tolist()
    found = paired_bootstrap(*counts, 50)
    assert found.difference == pytest.approx(100 * float(metrics[1].compute() - metrics[0].compute()), abs=1e-12)
    wanted = 100 * (metrics[1].per_class() - metrics[0].per_class()).numpy()
    np.testing.assert_allclose(found.per_class[:, 0], wanted, rtol=1e-12)
    assert np.isnan(found.per_class[3]).all() and not np.isnan(found.per_class[:3]).any()


def test_a_training_against_itself():
    a = draw_counts(0, 2)
    found = paired_bootstrap(a, a.copy())
    assert (found.difference, found.low, found.high, found.share) == (0, 0, 0, 0)
    assert not found.resampled.any() and not np.nan_to_num(found.per_class).any()


def test_exchanged_it_is_the_negative():
    a, b = draw_counts(0, 2), draw_counts(1)
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    np.testing.assert_allclose([there.difference, there.low, there.high], [-back.difference, -back.high, -back.low], atol=1e-12)
    assert there.share == back.share and there.low < there.difference < there.high


def test_order_does_not_matter():
    "Of tiles, where each has its name; of seeds; of classes. Without names other tiles are drawn, and little changes."
    a, b = draw_counts(0, 3, 300), draw_counts(1, 3, 300)
    names, order = np.array([f"tile {k:03}" for k in range(300)]), np.random.default_rng(0).permutation(300)
    plain = paired_bootstrap(a, b)
    assert paired_bootstrap(a, b, groups=names) == plain
    mixed = paired_bootstrap(a[:, order], b[:, order], groups=names[order])
    assert mixed == plain and (mixed.resampled == plain.resampled).all()
    unnamed = paired_bootstrap(a[:, order], b[:, order])
    assert unnamed.difference == plain.difference and unnamed != plain
    assert unnamed.low == pytest.approx(plain.low, abs=0.15 * (plain.high - plain.low))
    turned = paired_bootstrap(a[::-1, :, ::-1].copy(), b[::-1, :, ::-1].copy())
    np.testing.assert_allclose(turned.resampled, plain.resampled, atol=1e-11)
    np.testing.assert_allclose(turned.per_class[::-1], plain.per_class, atol=1e-11)


def test_seeds_come_in_any_form():
    a, b = draw_counts(0, 2), draw_counts(1, 1)
    wanted = paired_bootstrap(a, b, 100)
    assert paired_bootstrap(list(a), b[0], 100) == wanted
    assert paired_bootstrap([torch.from_numpy(x) for x in a], torch.from_numpy(b), 100) == wanted
    assert paired_bootstrap(a.astype(np.int32), b, 100, seed=1) != wanted


def test_slices_change_nothing(monkeypatch):
    "However few weights are held at once."
    a, b = draw_counts(0, 1, 50), draw_counts(1, 1, 50)
    wanted = paired_bootstrap(a, b, 101)
    for n in (1, 7 * 50):
        monkeypatch.setattr(paired, "WEIGHTS_AT_ONCE", n)
        assert (paired_bootstrap(a, b, 101).resampled == wanted.resampled).all()


def test_memory_is_bounded():
    "All weights of the paper's size at once would take 71 MB, their picks as much again."
    script = (
        "import resource, numpy as np; from agrivision_repro.analysis.significance import paired_bootstrap; "
        "x = np.ones((2, 1, 4431, 7, 2), int); paired_bootstrap(*x, 1); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "before = peak(); paired_bootstrap(*x, 2000); print((peak() - before) / 1e3)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # MB


def test_the_same_tiles_for_both():
    "What is drawn is decided by seed and number of tiles alone."
    a, b = (sum_groups(stack_seeds(draw_counts(k), "x")) for k in (0, 1))
    both = resample_iou(torch.cat([a, b], 1), 64, 5)
    for k, x in enumerate((a, b)):
        assert torch.equal(both[:, k].nan_to_num(-1), resample_iou(x, 64, 5)[:, 0].nan_to_num(-1))


def test_fields_are_drawn_whole():
    "Tiles of one field add up first: fields of several tiles are the same as one large tile each."
    a, b = draw_counts(0, 2, 12), draw_counts(1, 2, 12)
    fields = ["south", "north", "east"] * 4
    large = [np.stack([x[:, k::3].sum(1) for k in (2, 1, 0)], 1) for x in (a, b)]  # by name: east, north, south
    found, wanted = paired_bootstrap(a, b, 200, groups=fields), paired_bootstrap(*large, 200)
    assert found == wanted and (found.resampled == wanted.resampled).all()
    assert paired_bootstrap(a, b, 200, groups=[{"south": 2, "north": 1, "east": 0}[f] for f in fields]) == found


def draw_tiles(rng, n_fields: int, n_tiles: int, field_luck: float) -> np.ndarray:
    "Counts `(2, N, 2, 2)` of two runs; tiles are hard for both, and the lead of the second varies by tile and by field."
    n = n_fields * n_tiles
    lead = 0.1 + rng.normal(0, 0.2, (n, 2)) + np.repeat(rng.normal(0, field_luck, (n_fields, 1)), n_tiles, 0)
    hard = rng.normal(0, 1, (1, n, 1)) + np.array([1.0, -1.0])
    union = rng.integers(500, 4000, (1, n, 2)) * np.ones((2, 1, 1), int)
    return np.stack([rng.binomial(union, 1 / (1 + np.exp(-hard - np.stack([0 * lead, lead])))), union], -1)


@pytest.mark.parametrize(
    ("n_fields", "n_tiles", "field_luck", "is_grouped", "low", "high"),
    [(200, 1, 0.0, False, 91.5, 97.5), (80, 8, 0.3, True, 91, 97.5), (80, 8, 0.3, False, 20, 80)],
    ids=["tiles", "fields", "fields taken for tiles"],
)
def test_coverage(n_fields, n_tiles, field_luck, is_grouped, low, high):
    "Of 400 intervals 95 % hold the truth (standard deviation 1.1 %); where fields are taken for tiles, far fewer."
    truth = paired_bootstrap(*draw_tiles(np.random.default_rng(0), 400_000 // n_tiles, n_tiles, field_luck), 1).difference
    groups = np.repeat(np.arange(n_fields), n_tiles) if is_grouped else None
    held = 0
    for k in range(1, 401):
        found = paired_bootstrap(*draw_tiles(np.random.default_rng(k), n_fields, n_tiles, field_luck), 400, k, groups)
        held += found.low <= truth <= found.high
    assert low <= held / 4 <= high


def test_two_runs_compared(trained):
    "From two runs to an interval round what the table says."
    workspace, first = trained
    second = workspace.result(replace(first.run, norm="ibn_s"))
    found = paired_bootstrap(first.tile_counts("rgb"), second.tile_counts("rgb"), 500)
    gap = second.score("rgb") - first.score("rgb")
    assert found.difference == pytest.approx(100 * gap, abs=1e-10)
    assert found.low <= found.difference <= found.high and 0 <= found.share <= 1
    with pytest.raises(ValueError, match=r"500 resamples of 1 group\(s\)"):  # the smoke farm is scored on one field
        paired_bootstrap(first.tile_counts("rgb"), second.tile_counts("rgb"), 500, groups=workspace.fields(first.run))


def test_the_picture():
    (ax,) = draw_differences({"paired": np.arange(5.0), "unpaired": np.array([0.0, np.nan, 9.0])}).axes
    assert ax.get_xlabel() == "difference of mIoU, percentage points"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["paired", "unpaired"]


A = draw_counts(0, 2)
BAD = {
    "other tiles": (lambda: (A, A[:, 1:]), {}, r"a and b have counts of \(12, 3, 2\) and \(11, 3, 2\): both must be of the same tiles"),
    "other classes": (lambda: (A, A[:, :, 1:]), {}, "both must be of the same tiles and classes"),
    "seeds that differ": (lambda: (A, [A[0], A[1, 1:]]), {}, r"b has counts of \(11, 3, 2\), \(12, 3, 2\): wanted one or more runs"),
    "no training": (lambda: ([], A), {}, "a has counts of no run: wanted one or more runs, all scored on the same tiles"),
    "shares": (lambda: (A / 2, A), {}, r"a is \(2, 12, 3, 2\) torch.float64: wanted int pixels \(S, N, C, 2\)"),
    "hits alone": (lambda: (A[..., 0], A), {}, r"a is \(1, 2, 12, 3\) torch.int64: wanted int pixels"),
    "exchanged": (lambda: (A, A[..., ::-1]), {}, "b has an intersection below 0 or above its union"),
    "negative": (lambda: (-A[..., ::-1], A), {}, "a has an intersection below 0"),
    "too few groups": (lambda: (A, A), {"groups": "abc"}, "groups has 3 entries for 12 tiles: wanted one per tile"),
    "one field": (lambda: (A, A), {"groups": [0] * 12}, r"2000 resamples of 1 group\(s\): wanted 1 or more of at least 2"),
    "one tile": (lambda: (A[:, :1], A[:, :1]), {}, r"2000 resamples of 1 tile\(s\)"),
    "no resample": (lambda: (A, A), {"n_resamples": 0}, r"0 resamples of 12 tile\(s\): wanted 1 or more"),
}


@pytest.mark.parametrize(("sides", "options", "says"), BAD.values(), ids=BAD)
def test_refusals(sides, options, says):
    with pytest.raises(ValueError, match=says):
        paired_bootstrap(*sides(), **options)
