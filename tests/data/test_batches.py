"Batches: the same samples whoever reads them and whenever, views exact on labels, choices that reach the training."

from dataclasses import replace

import numpy as np
import pytest
import torch
from trees import FARM

from agrivision_repro.data.batches import (
    AUGMENTATIONS,
    IMAGENET,
    SampleStream,
    Statistics,
    dataset_statistics,
    make_batch,
    rare_class_weights,
    read_ahead,
    training_loader,
    zoom_and_shift,
)
from agrivision_repro.data.editions import open_tiles
from agrivision_repro.data.pack import count_tiles, pack_split
from agrivision_repro.data.synthetic_files import write_synthetic
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return open_tiles("synthetic", write_synthetic(tmp_path_factory.mktemp("farm") / "farm", FARM), "train")


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_samples_depend_on_position_alone(augmentation, tiles, tmp_path):
    "From files and from a pack, one thread or many, from the start or resumed, whole or in micro-batches: the same bytes."
    weights = rare_class_weights(count_tiles(tiles, n_workers=1))
    sources = tiles, pack_split(tiles, tmp_path / "packed", n_workers=1)
    streams = [SampleStream(source, 5, 48, augmentation, weights) for source in sources]
    loads = [list(training_loader(stream, 4, 0, 12)) for stream in streams]
    loads.append(list(training_loader(streams[1], 4, 0, 7)) + list(training_loader(streams[0], 4, 7, 12)))
    halves = list(training_loader(streams[0], 4, 0, 12, micro_batches=(0, 1), n_micro_batches=2))
    loads.append([type(a)(*(torch.cat(pair) for pair in zip(a, b, strict=True))) for a, b in zip(halves[::2], halves[1::2], strict=True)])
    for other in loads[1:]:
        for ours, theirs in zip(loads[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any((batch.view != torch.tensor([1.0, 0, 0])).any() for batch in loads[0]) == (augmentation == "zoom_shift")


def test_zoom_and_shift_by_hand():
    "Every output pixel of the nearest view, worked out one by one; the image's borders fade to black."
    rng = np.random.default_rng(0)
    side, views = 17, np.float32([[1.7, 0.2, -0.3], [0.4, -0.1, 0.05], [1.0, 1.0, 0.0]])
    x = rng.integers(1, 255, (3, 2, side, side), np.uint8)
    found = zoom_and_shift(torch.from_numpy(x), torch.from_numpy(views), "nearest").numpy()
    for b, (zoom, down, right) in enumerate(views.astype(float)):
        for row in range(side):
            for column in range(side):
                r, c = ((k - side / 2 - shift * side) / zoom + side / 2 for k, shift in ((row, down), (column, right)))
                if min(abs(r % 1 - 0.5), abs(c % 1 - 0.5)) < 1e-3:
                    continue  # a tie
                is_inside = 0 <= round(r) < side and 0 <= round(c) < side
                wanted = x[b, :, round(r), round(c)] if is_inside else [0, 0]
                np.testing.assert_array_equal(found[b, :, row, column], wanted)
    smooth = zoom_and_shift(torch.full((1, 1, side, side), 200, dtype=torch.uint8), torch.tensor([[0.5, 0.0, 0.0]]), "bilinear")
    assert smooth.max() == 200 and smooth[0, 0, 0].max() == 0


def test_a_view_moves_labels_with_the_image(tiles):
    "Where a batch is valid, NIR's own label stays on it; outside there is no label and nothing valid."
    stream = SampleStream(tiles, 3, augmentation="zoom_shift")
    samples = next(training_loader(stream, 12, 0, 1))
    marked = samples._replace(planes=samples.planes.clone())
    marked.planes[:, :4] = (samples.planes[:, 4:5] > 0) * 200
    before = marked.planes.clone()
    batch = make_batch(marked, "rgbn", 7, statistics=Statistics((0.0,) * 4, (1 / 255,) * 4))
    assert torch.equal(marked.planes, before)  # the samples themselves are left alone
    moved = (samples.view != torch.tensor([1.0, 0, 0])).any(1)
    assert 0 < moved.sum() < 12
    labelled = batch.targets[:, 1:].any(1)
    assert not (labelled & (batch.x[:, 3] == 0) & batch.valid)[~moved].any()
    for k in moved.nonzero()[:, 0]:
        share = (labelled[k] == (batch.x[k, 3] > 100)).float().mean()
        assert share > 0.9  # they differ along edges, where the image is interpolated
        assert not batch.valid[k][batch.targets[k].sum(0) == 0].any()


def test_rare_tiles_come_more_often(tiles):
    counts = count_tiles(tiles, n_workers=1)
    weights = rare_class_weights(counts)
    shows = counts["pixels"].to_numpy()[:, 1:] > 0
    shows_rarest = shows[:, shows.mean(0).argmin()]
    seen = [SampleStream(tiles, 0, weights=weights)[k].index for k in range(50 * len(tiles))]
    times = np.bincount(seen, minlength=len(tiles)) / 50
    np.testing.assert_allclose(times, weights * len(tiles) / weights.sum(), atol=0.1)
    assert times[shows_rarest].mean() > 1.2 * times[~shows_rarest].mean()


def test_statistics_of_the_data_set(tiles):
    own = dataset_statistics(count_tiles(tiles, n_workers=2))
    pixels = np.concatenate([tile.image[:, tile.valid] for tile in tiles], 1) / 255
    np.testing.assert_allclose(own, [pixels.mean(1), pixels.std(1)], rtol=1e-9)


@pytest.mark.parametrize(
    "choice", [{"statistics": "dataset"}, {"sampler": "rare"}, {"augmentation": "zoom_shift"}, {"augmentation": "none"}]
)
def test_choices_reach_the_training(choice, tmp_path_factory):
    "Each changes the weights that a training ends with, and the record says which it was."
    workspace = Workspace(tmp_path_factory.getbasetemp() / "choices", device="cpu")
    run = plan_run("smoke", "synthetic")
    chosen = replace(run, **choice) if "statistics" in choice else replace(run, recipe=replace(run.recipe, **choice))
    usual, other = workspace.result(run), workspace.result(chosen)
    assert usual.folder != other.folder
    assert (usual.folder / "history.csv").read_text() != (other.folder / "history.csv").read_text()
    assert (other.statistics == IMAGENET) == ("statistics" not in choice)


@pytest.mark.parametrize(
    ("choice", "says"), [({"statistics": "own"}, "wanted one of imagenet, dataset"), ({"sampler": "rarest"}, "wanted one of shuffle, rare")]
)
def test_wrong_choices(choice, says, tmp_path):
    run = plan_run("smoke", "synthetic")
    chosen = replace(run, **choice) if "statistics" in choice else replace(run, recipe=replace(run.recipe, **choice))
    with pytest.raises(ValueError, match=says):
        Workspace(tmp_path / "out", device="cpu").result(chosen)


def test_an_error_in_a_reading_thread_arrives():
    def work(k):
        if k == 3:
            raise ValueError("tile 3 is damaged")
        return k

    found = []
    with pytest.raises(ValueError, match="tile 3 is damaged"):
        for k in read_ahead(work, range(100), 3):
            found.append(k)
    assert found == [0, 1, 2]
