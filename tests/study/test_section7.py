"Section 7: scores in the arms are those of the runs, effects are those worked out by hand, and nothing is done twice."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from agrivision_repro.analysis.significance import AGREES, DISAGREES, NO_EFFECT, NOT_JUDGED, UNDECIDED, combine
from agrivision_repro.core import read_json, write_json
from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace
from agrivision_repro.study import section7, section7_report, section7_trained, tables
from agrivision_repro.study.figures import reduce_curve, run_divergence
from agrivision_repro.study.section7 import ARMS, AS_IT_IS, CHANGED
from agrivision_repro.training.evaluate import score_tiles


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Two small nets on each modality, a single seed."
    workspace = Workspace(tmp_path_factory.mktemp("section7"), device="cpu")
    runs = [plan_run("smoke", "synthetic", channels=c, norm=n, depth=50, lovasz=1.0) for n in ("bn", "ibn_s") for c in ("rgb", "nir3")]
    results = workspace.results(runs)
    return workspace, results, section7.section7_scores(results, workspace)


def test_as_it_is_is_the_runs_own_score_on_the_other_modality(study):
    workspace, results, scores = study
    for result in results:
        other = {"rgb": "nir3", "nir3": "rgb"}[result.run.channels]
        found, counts = section7.run_section7(result, workspace)
        scored, tiles = score_tiles(result.model(), workspace.feed(result.run, "val", other), workspace.engine())
        assert found[AS_IT_IS]["scores"] == result.scores[other] == scored
        assert (counts[AS_IT_IS] == result.tile_counts(other)).all() and (counts[AS_IT_IS] == tiles.numpy()).all()
        rows = scores[(scores.trained_on == result.run.channels) & (scores.norm == result.run.norm)].set_index("arm")
        assert rows.multilabel["own modality"] == 100 * result.score(result.run.channels)
        assert set(rows.index) == {"own modality", *ARMS}


def test_divergence_as_it_is_is_figure_2s(study):
    workspace, results, scores = study
    curve = run_divergence(results[0], workspace, n_resamples=2)
    wanted = reduce_curve(curve[curve.estimator == "sample"])
    row = scores[(scores.trained_on == "rgb") & (scores.norm == "bn") & (scores.arm == AS_IT_IS)].iloc[0]
    assert np.allclose([row.divergence, row.median_channel], [wanted["median"], wanted["median_channel"]], rtol=1e-4)


def test_arms_are_measured_once_unless_their_design_changed(study):
    workspace, results, scores = study
    path = results[0].folder / "section7.json"
    written = path.stat().st_mtime_ns
    pd.testing.assert_frame_equal(section7.section7_scores(results, workspace), scores)
    assert path.stat().st_mtime_ns == written
    write_json(path, read_json(path) | {"design": "another"})
    pd.testing.assert_frame_equal(section7.section7_scores(results, workspace), scores)
    assert read_json(path)["design"] != "another"


def test_two_processes_find_the_same(study, monkeypatch):
    "A process per training modality; what a net is scored on is no matter of chance."
    workspace, results, scores = study
    for result in results:
        (result.folder / "section7.npy").unlink()
    monkeypatch.setattr(section7, "_HERE_UP_TO", 0)
    monkeypatch.setattr(section7, "_evaluate_arms", None)  # nothing is left for this process
    pd.testing.assert_frame_equal(section7.section7_scores(results, workspace), scores)


def test_matched_moments_reach_the_first_layer(study):
    "Each arm is another condition: no two have the same counts and divergence, but for AdaBN's control on few tiles."
    scores = study[2]
    arms = scores[(scores.tested_on == "other") & (scores.trained_on == "rgb") & (scores.norm == "bn")]
    assert arms.divergence.nunique() == len(arms) == 8
    assert scores[scores.experiment == "E6"].divergence.isna().all()


def test_one_seed_is_not_judged(study):
    workspace, results, scores = study
    recovery = section7_report.section7_recovery(results, workspace)
    assert set(recovery.verdict) == {NOT_JUDGED} and len(recovery) == 4 * len(CHANGED)
    relation, cells = section7_report.section7_relation(scores)
    assert set(relation.verdict) == {NOT_JUDGED} and len(cells) == 4
    assert list(section7_report.format_recovery(recovery).index) == list(CHANGED)
    assert section7_report.format_scores(scores).shape == (2 + len(CHANGED), 4)
    assert section7_report.format_sensitivity(scores).shape == (4, 2)
    assert section7_report.draw_dose(scores) and section7_report.draw_shares(recovery)
    classes = section7.section7_classes(results, workspace)
    one = classes[(classes.arm == AS_IT_IS) & (classes.trained_on == "rgb") & (classes.norm == "bn")]
    assert np.isclose(one.iou.mean(), 100 * results[0].score("nir3"))


def make_counts(hits):
    "One class whose union is 100 in each of four fields."
    return [np.stack([np.full((4, 1), h), np.full((4, 1), 100)], -1).astype(np.int64) for h in hits]


def test_share_is_mean_gain_over_mean_decay():
    own, plain, arm = (make_counts(h) for h in ((80, 70, 75), (40, 30, 35), (60, 50, 55)))
    half = section7_report.share_recovered(own, plain, arm)
    assert np.isclose(half.estimate, 50) and half.se < 1e-9 and half.n_seeds == 3
    whole = section7_report.share_recovered(own, plain, own)
    assert np.isclose(whole.estimate, 100) and whole.se < 1e-9
    uneven = section7_report.share_recovered(own, plain, make_counts((60, 40, 65)))
    assert np.isclose(uneven.estimate, 50)  # (20 + 10 + 30) / (40 + 40 + 40)
    assert np.isclose(uneven.se, np.std([50, 25, 75], ddof=1) / np.sqrt(3))


def test_holm_is_over_the_arms():
    "A gain that would be judged alone is undecided among many."
    gain = combine([2.0, 4.0, 3.0])  # p = 0.035
    assert section7_report.judge_arms({"one": gain}) == {"one": AGREES}
    none = {f"null {k}": combine([5.0, -5.0, 0.0]) for k in range(6)}
    assert section7_report.judge_arms({"one": gain} | none)["one"] == UNDECIDED
    small = combine([0.2, 0.4, 0.3])  # likewise, but within a point
    assert section7_report.judge_arms({"one": small} | none)["one"] == NO_EFFECT


def make_scores(slope, gain):
    "Three seeds of two nets whose arms lie on a line; the second has a tenth of the divergence."
    rows = []
    for norm, factor in (("bn", 1.0), ("ibn_s", 0.1)):
        for seed in range(3):
            for k, arm in enumerate((AS_IT_IS, *CHANGED)):
                log = np.log(factor * (8 + seed) * 0.5**k)
                other = 50 + slope * (log - np.log(8)) + 0.1 * seed
                rows.append(("rgb", norm, seed, arm, "other", other + (gain if norm == "ibn_s" else 0) * (1 + 0.1 * seed), np.exp(log)))
    return pd.DataFrame(rows, columns=["trained_on", "norm", "seed", "arm", "tested_on", "multilabel", "divergence"])


def test_mediation_compares_the_predicted_gain_with_the_observed():
    effects = section7_report.relate(make_scores(slope=-2.0, gain=0.0))
    assert np.isclose(effects["rgb", "bn"]["slope"].estimate, -2) and np.isclose(effects["rgb", "bn"]["rank"].estimate, -1)
    found = effects["rgb", "ibn_s"]
    assert np.isclose(found["predicted"].estimate, -2 * np.log(0.1)) and np.isclose(found["rest"].estimate, 0, atol=1e-9)
    assert section7_report.judge_mediation(found) == AGREES
    assert section7_report.judge_mediation(section7_report.relate(make_scores(0.0, 5.0))["rgb", "ibn_s"]) == DISAGREES
    assert section7_report.judge_mediation(section7_report.relate(make_scores(-2.0, -10.0))["rgb", "ibn_s"]) == section7_report.NO_GAIN
    assert section7_report.judge_mediation(effects["rgb", "bn"]) == NOT_JUDGED


def test_the_answer_counts_verdicts():
    scores = make_scores(slope=0.0, gain=0.0)
    relation = section7_report.section7_relation(scores)[0]
    rows = [("E1", AGREES, 2.0), ("E2", UNDECIDED, 0.5), ("E2", DISAGREES, -2.0), ("E9", AGREES, 4.0), ("E9", UNDECIDED, 6.5)]
    recovery = pd.DataFrame(rows, columns=["experiment", "verdict", "gain"])
    recovery["arm"] = ["AdaBN", "histogram", "mean and std", "inverted", "inverted"]
    answer = section7_report.state_answer(scores, recovery, relation)
    assert "multiplies ResNet's divergence by 0.062 to 0.5, depending on the arm" in answer  # 0.5 ** 4, the histogram; AdaBN
    assert "other modality in 1 of 3 comparisons and lowers it in 1 (range of all: -2.0 to +2.0 points)." in answer
    assert "clearly raises it in 1 of 2 nets (all: +4.0 to +6.5 points)" in answer
    assert answer.endswith("no clear gain that lower divergence could explain.")
    gains = section7_report.section7_relation(make_scores(slope=-2.0, gain=0.0))[0]
    answer = section7_report.state_answer(scores, recovery, gains)
    assert "in 1 of 1 comparisons; in 1 of these is lower divergence shown to be the reason." in answer
    unjudged = recovery.assign(verdict=NOT_JUDGED)
    assert "not" in section7_report.state_answer(scores, unjudged, relation)
    table = section7_report.answer_table({"fields": (scores, recovery, gains), "one seed": (scores, unjudged, relation)})
    assert table.loc["fields"].tolist() == [
        "×0.062 to 0.5", "higher in 1 of 3 comparisons, lower in 1: -2.0 to +2.0", "higher in 1 of 2 nets: +4.0 to +6.5",
        "higher in 1 of 1 comparisons; shown to be due to lower divergence: 1",
    ]  # fmt: skip
    assert (table.loc["one seed"] == NOT_JUDGED).all()


def test_every_trained_arm_is_compared():
    planned = {section7_trained.Trained.of(run) for run in tables.section7_trained()}
    shown_only = {section7_trained.Trained("nir3", norm) for norm in ("ibn_a", "ibn_s")}  # beside the baselines; section7 compares them
    assert planned - shown_only == {arm for contrast in section7_trained.CONTRASTS for arm in contrast.weights}
    assert all(np.isclose(sum(contrast.weights.values()), 0) for contrast in section7_trained.CONTRASTS)


@pytest.mark.slow
def test_contrasts_are_differences_of_scores(tmp_path):
    "All arms, 18 layers, a single seed."
    workspace = Workspace(tmp_path, device="cpu")
    results = workspace.results([replace(run, depth=18) for run in tables.section7_trained()])
    scores = section7_trained.trained_scores(results, workspace)
    effects_table = section7_trained.trained_effects(results, scores, workspace)
    effects = effects_table.set_index(["what", "tested_on"]).effect
    table = scores.set_index(["channels", "norm", "intervention"])
    rgb, nrgb = table.loc["rgb"], table.loc["rgbn"].own_multilabel
    gain = rgb.other_multilabel["bn", "invert(0.5)"] - rgb.other_multilabel["bn", ""]
    assert np.isclose(effects["ResNet, invert(0.5) − ResNet", "other"], gain)
    frozen = rgb.own_multilabel["ibn_s", "switches(uniform)"]
    assert np.isclose(effects["IBN-Net-s − IBN-Net-s, switches(uniform)", "own"], rgb.own_multilabel["ibn_s", ""] - frozen)
    gains = [nrgb["ibn_a", name] - nrgb["bn", name] for name in ("", "match_nir")]
    assert np.isclose(effects["gain of IBN-Net-a over ResNet − the same with NIR matched to red", "own"], gains[0] - gains[1])
    doses = rgb.loc["bn"].loc[["", *section7_trained.DOSES]]
    line = np.polynomial.Polynomial.fit(np.log(doses.divergence), doses.other_multilabel, 1)
    fall = line(np.log(doses.divergence.min())) - line(np.log(doses.divergence.max()))
    assert np.isclose(effects[section7_trained.WHOLE_FALL, "other"], fall)
    assert len(section7_trained.format_trained(scores)) == len(table) and section7_trained.draw_trained(scores)
    adapted = section7.run_section7(next(r for r in results if r.run.channels == "nir3" and r.run.norm == "bn"), workspace)[0]["AdaBN"]
    assert table.loc["nir3", "bn", "AdaBN"].other_multilabel == 100 * adapted["scores"]["multilabel"]["mean"]
    assert section7_trained.state_trained(scores, effects_table) == "With fewer than three seeds nothing is judged."
    judged = effects_table.assign(verdict=np.where(effects_table.effect > 0, AGREES, DISAGREES))
    gains = [rgb.other_multilabel["bn", dose] - rgb.other_multilabel["bn", ""] for dose in section7_trained.DOSES]
    said = f"clearly rises in {sum(g > 0 for g in gains)} of 4 doses (all: {min(gains):+.1f} to {max(gains):+.1f} points); "
    assert said in section7_trained.state_trained(scores, judged)
    sham = rgb.divergence["bn", "sham(0.1)"] / rgb.divergence["bn", ""]
    assert f"RGB with RGB, to {sham:.2g})" in section7_trained.state_trained(scores, judged)
    rows = section7_trained.format_trained(section7_trained.select_baselines(scores))
    assert [row for row in rows.index if "+" in row and "NRGB" in row] == ["+ ResNet-gn on NRGB", "+ ResNet, modality_dropout on NRGB"]
    assert list(rows.index[-5:]) == [f"{net} on NIR" for net in ("ResNet", "IBN-Net-a", "IBN-Net-s", "+ ResNet, AdaBN", "+ ResNet-gn")]


def test_files_belong_to_one_table():
    stems = ("section7", "section7-shares", "section7_trained", "section7_trained-effects", "sections")
    assert [tables.table_of(stem) for stem in stems] == ["section7"] * 2 + ["section7_trained"] * 2 + [""]
