"Two finished runs side by side: the tile that was picked, pixels that differ, the layer that differs most, and what to train without runs."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from agrivision_repro.cli.app import app
from agrivision_repro.data.tiles import paint_labels
from agrivision_repro.runs import plan
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.store import RunFolder
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study import explore
from agrivision_repro.study.figures import run_divergence
from agrivision_repro.study.modality import predict_labels


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "A workspace with a small net trained on RGB and one on NIR."
    workspace = Workspace(tmp_path_factory.mktemp("explore"), device="cpu", precision="float32")
    return workspace, workspace.results([plan_run("smoke", "synthetic", channels=c, depth=18) for c in ("rgb", "nir3")])


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes]


def test_finished_runs_are_listed_by_data_set(pair):
    workspace, results = pair
    ((data, found),) = explore.finished_runs(workspace.out).items()
    assert data == "synthetic, size 64, train_fields 2, val_fields 1, test_fields 1, tiles_per_field 4, seed 0"
    assert set(found) == set(results) and len({explore.label_run(result) for result in found}) == 2
    assert explore.label_run(results[1]).startswith("ResNet18 on NIR, seed 0, λ1 = 1, λ2 = 0, 10 iterations, mIoU ")


def test_unfinished_foreign_and_weightless_runs_are_left_out(pair, tmp_path):
    result = pair[1][0]
    for name, lacks in (("whole", ""), ("unfinished", "scores"), ("foreign", "fields"), ("weightless", "weights")):
        folder = RunFolder(tmp_path / "runs" / name)
        described = result.record["run"] | ({"colour": "red"} if lacks == "fields" else {})
        folder.write_record(result.record | {"run": described})
        if lacks != "scores":
            folder.write_scores(result.checkpoints)
        if lacks != "weights":
            folder.weights().touch()
    assert [r.folder.name for own in explore.finished_runs(tmp_path).values() for r in own] == ["whole"]


def test_pixels_differ_where_the_predictions_do(pair):
    workspace, results = pair
    tiles = workspace.open(results[0].run.source, "val")
    assert explore.shared_tiles(results, workspace) == tiles.names
    for tile in tiles:
        rgb, nir, labels, *painted, differs = pictures(explore.draw_comparison(*results, tile.name, workspace))
        assert (rgb.transpose(2, 0, 1) == tile.image[:3]).all() and (nir == tile.image[3]).all()
        assert (labels == paint_labels(tile.labels, tile.valid)).all()
        own = [predict_labels(r.model(), tile, r.run.channels, r.statistics) for r in results]
        assert all((p == paint_labels(bits, tile.valid)).all() for p, bits in zip(painted, own, strict=True))
        wanted = (own[0] != own[1]) & tile.valid
        assert ((differs == 255) == wanted).all() and wanted.any() and not wanted.all()


def test_a_run_does_not_differ_from_itself(pair):
    workspace, (rgb, _) = pair
    figure = explore.draw_comparison(rgb, rgb, explore.shared_tiles([rgb], workspace)[0], workspace)
    assert not pictures(figure)[-1].any() and figure.axes[-1].get_title() == "A and B differ: 0.0 %"


def test_tiles_that_a_run_leaves_out_are_not_offered(pair, monkeypatch):
    workspace, (rgb, _) = pair
    names = workspace.open(rgb.run.source, "val").names
    monkeypatch.setattr(workspace, "left_out", lambda run: names[:1] if run.shared_places == "val" else [])
    other = replace(rgb, run=replace(rgb.run, shared_places="val"))
    assert explore.shared_tiles([rgb, other], workspace) == names[1:]


def test_the_ratio_counts_either_way_round():
    a = pd.DataFrame({"divergence": [1.0, 9.0, 4.0, np.nan]})
    assert explore.most_different(a, pd.DataFrame({"divergence": [3.0, 14.0, 1.0, 5.0]})) == 2
    assert explore.most_different(a, pd.DataFrame({"divergence": [5.0, 14.0, 1.0, 5.0]})) == 0


def test_the_marked_layer_has_the_largest_ratio(pair):
    workspace, results = pair
    figure = explore.draw_divergences(*results, workspace)
    tables = [pd.read_csv(r.folder / "divergence.csv") for r in results]
    values = [table[table.estimator == "sample"].sort_values("depth").divergence.to_numpy() for table in tables]
    assert all((figure.axes[0].lines[2 * k].get_ydata() == own).all() for k, own in enumerate(values))  # between them, the null
    wanted = int(np.argmax(np.abs(np.log(values[0]) - np.log(values[1]))))
    assert figure.axes[0].lines[-1].get_xdata() == [wanted, wanted]
    assert tables[0].layer[wanted] in figure.axes[0].get_title()


def test_a_measured_divergence_is_read(pair):
    workspace, (rgb, nir) = pair
    for result in (rgb, nir):
        run_divergence(result, workspace)
    path = nir.folder / "divergence.csv"
    written = path.read_text()
    table = pd.read_csv(path)
    table.loc[(table.estimator == "sample") & (table.depth == 3), "divergence"] *= 1e6
    table.to_csv(path, index=False)
    figure = explore.draw_divergences(rgb, nir, workspace)
    path.write_text(written)
    assert figure.axes[0].lines[-1].get_xdata() == [3, 3]


@pytest.mark.parametrize("fields", [{"channels": "rgbn"}, {"depth": 50}])
def test_divergences_that_cannot_be_compared(pair, fields):
    workspace, (rgb, _) = pair
    with pytest.raises(ValueError, match="wanted two runs of one depth, each on RGB or on NIR"):
        explore.draw_divergences(rgb, replace(rgb, run=replace(rgb.run, **fields)), workspace)


def test_other_data_than_a_run_was_trained_on(pair):
    workspace, (rgb, nir) = pair
    other = replace(nir, folder=RunFolder(nir.folder.path.with_name("0123456789ab")))
    for draw, more in ((explore.draw_comparison, [workspace.open(rgb.run.source, "val").names[0]]), (explore.draw_divergences, [])):
        with pytest.raises(ValueError, match="run 0123456789ab was trained on other data than .*: name the folder of its data"):
            draw(rgb, other, *more, workspace)


def test_without_runs_the_command_is_named(tmp_path, capsys, monkeypatch):
    assert explore.finished_runs(tmp_path / "two words") == {}
    line, command = explore.what_to_train(tmp_path / "two words").splitlines()
    assert line == f"no finished run with weights in {tmp_path / 'two words'}; to train the nets of Figure 2 there:"
    assert command == (
        f"agrivision reproduce fig2_divergence --scale laptop --data ag-net --data-root DIR --seeds 0 --out '{tmp_path / 'two words'}'"
    )
    monkeypatch.setattr(plan, "time_steps", lambda *_: plan.Throughput(1.0, 0.5, 1, True))
    options = command.partition("--data-root DIR ")[0].split()[2:]  # the command line accepts it; nothing is trained or timed
    app(["plan", *options, "--device", "cpu"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("8 Runs")
