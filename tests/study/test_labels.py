"One list of norms, one label for each net and input; the paper's values stand beside its own data only."

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from torch import nn

from agrivision_repro.analysis.significance import NOT_JUDGED, combine
from agrivision_repro.data.batches import CHANNEL_LABELS, CHANNELS
from agrivision_repro.models import backbones
from agrivision_repro.report.render import banner_text, format_score, html_table
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.store import Result
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study import figures, tables
from agrivision_repro.study.class_tables import backbone_row, class_scores, class_table, loss_row
from agrivision_repro.study.compare import format_gains, tabulate_gains
from agrivision_repro.study.modality import modality_scores, modality_table
from agrivision_repro.study.paper import TABLE2, TABLE3
from agrivision_repro.training.evaluate import METRICS


def test_every_input_has_a_label():
    assert CHANNEL_LABELS.keys() == CHANNELS.keys()


def test_a_new_norm_is_in_table_2_and_figure_2(monkeypatch, tmp_path):
    monkeypatch.setitem(backbones.NORMS, "ibn_g", partial(backbones.replace_first_norms, make=partial(nn.GroupNorm, 1)))
    monkeypatch.setattr(tables, "STUDIED_NORMS", (*tables.STUDIED_NORMS, "ibn_g"))
    workspace = Workspace(tmp_path, device="cpu", precision="float32")
    planned = [run for run in tables.table2() if run.depth == 50 and run.norm in ("bn", "ibn_g")]
    table = class_table(class_scores(workspace.results(planned), backbone_row, TABLE2), ("50",))
    assert table.loc["multi-label"].index.tolist() == ["ResNet50", "+ IBN-Net50-g"]
    measured = workspace.results([run for run in tables.fig2() if run.norm in ("bn", "ibn_g")])
    scores = figures.figure2_scores(measured, workspace)
    assert figures.figure2_table(figures.figure2_medians(scores)).index.tolist() == ["ResNet", "IBN-Net-g"]
    legend = figures.draw_figure2(scores).legends[0].get_texts()
    assert [text.get_text() for text in legend] == ["ResNet", "IBN-Net-g"]
    relation = figures.divergence_and_score(measured, scores)
    assert "IBN-Net-g" in [text.get_text() for text in figures.draw_relation(relation).axes[0].get_legend().get_texts()]


def results_of(data: str, n_seeds: int, **fields) -> list:
    "Results with made-up scores, one per seed."
    runs = [plan_run("laptop", data, seed=seed, **fields) for seed in range(n_seeds)]
    own = {"per_class": [0.5 + 0.01 * k for k in range(len(runs[0].edition.classes))], "background_only": 0.4}
    scores = [{c: {m: own | {"mean": 0.5 + 0.01 * r.seed - 0.1 * (c == "nir3")} for m in METRICS} for c in r.test_inputs} for r in runs]
    return [Result(run, None, {}, {"last": {"scores": score}}) for run, score in zip(runs, scores, strict=True)]


@pytest.mark.parametrize(("data", "is_papers"), [("naip-trees", False), ("ag-net", False), ("agrivision-2020", True)])
def test_the_papers_values_stand_beside_its_data_only(data, is_papers):
    for norm, row_of, paper in (("ibn_s", backbone_row, TABLE2), ("ibn_a", loss_row, TABLE3)):
        table = class_table(class_scores(results_of(data, 3, norm=norm), row_of, paper))
        assert ("Paper: mean IoU" in table, "Gap" in table) == (is_papers, is_papers)
    scores = modality_scores(results_of(data, 3, channels="rgb") + results_of(data, 3, channels="nir3"))
    assert any(c.startswith("Paper") for c in modality_table(scores)) == is_papers == ("paper" in scores)
    if is_papers:
        assert modality_table(scores).loc[("multi-label", "Perf. decay"), "Paper: train on RGB"] == "27.76"


def test_one_seed_shows_no_spread_and_no_verdict():
    one, three = (class_table(class_scores(results_of("naip-trees", n, norm="ibn_s"), backbone_row, TABLE2)) for n in (1, 3))
    assert one.loc[("multi-label", "IBN-Net101-s"), ["Mean", "Seeds"]].tolist() == ["50.0", "1"]
    assert three.loc[("multi-label", "IBN-Net101-s"), ["Mean", "Seeds"]].tolist() == ["51.0 ± 1.0", "3"]
    decay = modality_table(modality_scores(results_of("naip-trees", 1, channels="rgb") + results_of("naip-trees", 1, channels="nir3")))
    assert not decay.map(lambda cell: "±" in cell).any(axis=None)
    shown = format_gains(tabulate_gains({("a", "b"): combine([1.0], 0.1, 20)}))
    assert shown.iloc[0].tolist() == ["+1.0", "–", "1", "–", NOT_JUDGED]
    medians = pd.DataFrame({"trained_on": ["rgb", "rgb", "nir3", "nir3"], "norm": ["bn", "ibn_a"] * 2, "seed": 0,
                            "median": [4.0, 1.0, 2.0, 1.0], "below": [np.nan, 30, np.nan, 28], "layers": 34})  # fmt: skip
    assert figures.figure2_table(medians).loc["IBN-Net-a"].tolist() == ["1.0", "×0.25", "30 of 34", "1", "1.0", "×0.50", "28 of 34", "1"]


def test_no_negative_zero():
    assert format_score(-0.04) == "0.0" and format_score(-0.06) == "-0.1"


def test_a_short_run_says_that_nothing_is_learned():
    smoke, laptop = (banner_text([SimpleNamespace(run=plan_run(scale, "synthetic"))]) for scale in ("smoke", "laptop"))
    assert "nothing is learned" in smoke and "direction" not in smoke and "can show a direction" in laptop


@pytest.mark.parametrize(("name", "n_rows"), [("", 2), (None, 2), ("net", 3)])
def test_rows_without_a_name_add_no_empty_header(name, n_rows):
    assert html_table(pd.DataFrame({"mIoU": ["50.0"]}, pd.Index(["ResNet"], name=name))).count("<tr") == n_rows


def test_a_power_of_ten_and_an_equation_stay_on_one_line():
    html = html_table(pd.DataFrame({"a": ["×0.2 (3.1e-05 to 7)"]}, ["λ1 = 0"]))
    assert "3.1e\N{NON-BREAKING HYPHEN}05" in html and "λ1\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0" in html


def test_small_points_show_their_sign():
    "A lower end of -0.03 does not look as if it were above 0."
    row = {"of": "+ a", "against": "b", "difference": 1.2, "low": -0.03, "high": 2.4, "n": 3, "detectable": 2.0, "verdict": "undecided"}
    gains = pd.DataFrame([row])
    assert format_gains(gains).loc["a against b"].tolist() == ["+1.2", "-0.03 to +2.4", "3", "2.0", "undecided"]


def test_a_number_and_its_spread_stay_on_one_line_and_sentences_get_room():
    sentence = "-0.1 (-1.5 to +1.3), -0 %; no effect of a point or more"
    html = html_table(pd.DataFrame({"a": ["**3.1 ± 2.0**"], "b": [sentence], "c": ["×0.2 (0.1 to 7)"]})).replace("\N{NO-BREAK SPACE}", "_")
    assert "<td><strong>3.1_±_2.0</strong></td>" in html and "<td>×0.2 (0.1_to_7)</td>" in html
    assert f'<td class="sentence">{sentence.replace(" to ", "_to_").replace(" %", "_%")}</td>' in html
