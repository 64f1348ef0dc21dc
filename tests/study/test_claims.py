"Judges of claims: what they say of runs whose truth is known, what Holm counts, and the matrix over data sets."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from agrivision_repro.analysis.significance import (
    AGREES,
    DISAGREES,
    NO_EFFECT,
    NOT_JUDGED,
    UNDECIDED,
    combine,
    format_factor,
    simulate_nets,
)  # fmt: skip
from agrivision_repro.runs.run import plan_run
from agrivision_repro.study import claims
from agrivision_repro.study.claims import HALF, JUDGES, SAME, UNTESTED, Evidence, find, judge_claims
from agrivision_repro.study.matrix import ALONE, claims_matrix, draw_matrix
from agrivision_repro.study.paper import CLAIMS

N_FIELDS = 24
WORKSPACE = SimpleNamespace(fields=lambda run: [f"field{k}" for k in range(N_FIELDS)])


def runs_with(leads: dict, n_seeds: int = 3) -> list:
    "Results of configurations (fields of a Run) that score higher by a lead on the logit; one per seed."
    counts = simulate_nets(np.random.default_rng(0), n_seeds, N_FIELDS, (0.02, 0.5, 0.02), n_nets=len(leads))
    found = []
    for (fields, lead), (hits, union) in zip(leads.items(), ([c[..., 0], c[..., 1]] for c in counts), strict=True):
        better = np.round(union / (1 + (union - hits) / np.maximum(hits, 1) * np.exp(-lead))).astype(np.int64)
        for seed in range(n_seeds):
            run = plan_run("laptop", "naip-trees", seed=seed, **dict(fields))
            tiles = {"": np.stack([better[seed], union[seed]], -1)}
            tiles |= {run.channels: tiles[""], {"rgb": "nir3"}.get(run.channels, "rgb"): np.stack([hits[seed] // 2, union[seed]], -1)}
            found.append(SimpleNamespace(run=run, tile_counts=tiles.__getitem__))
    return found


def test_a_lead_is_found_in_its_direction():
    nets = {(("norm", "bn"),): 0.0, (("norm", "ibn_s"),): 0.5, (("norm", "ibn_a"),): 0.0}
    evidence = Evidence(runs_with(nets), WORKSPACE)
    assert JUDGES["gain_over_resnet"](evidence).verdict == AGREES
    assert JUDGES["gain_over_ibn_a"](evidence).verdict == AGREES
    assert JUDGES["ibn_gain"](evidence).verdict in (NO_EFFECT, UNDECIDED)
    nets[(("norm", "ibn_s"),)] = -0.5
    assert JUDGES["gain_over_resnet"](Evidence(runs_with(nets), WORKSPACE)).verdict == DISAGREES
    assert JUDGES["gain_over_resnet"](Evidence(runs_with(nets, 2), WORKSPACE)).verdict == NOT_JUDGED


def test_nrgb_is_judged_on_a_plain_resnet():
    nets = {(("norm", "bn"),): 0.5, (("norm", "bn"), ("channels", "rgb")): 0.0, (("norm", "ibn_s"),): 0.0}
    found = JUDGES["nrgb_gain"](Evidence(runs_with(nets), WORKSPACE))
    assert found.verdict == AGREES and found.measured.startswith("ResNet101: NRGB − RGB") and found.n == 3


def test_a_huge_decay_needs_a_size():
    "A model that loses half of its hits on the other modality; the runs of Table 2 on RGB are not Table 1's."
    fields = (("norm", "bn"), ("lovasz", 1.0))
    nets = {(*fields, ("channels", "rgb")): 0.0, (*fields, ("channels", "nir3")): 0.0, (("norm", "bn"), ("channels", "rgb")): 0.0}
    evidence = Evidence(runs_with(nets), WORKSPACE)
    assert {r.run.lovasz for r in evidence.cross} == {1.0}
    assert JUDGES["decay_rgb"](evidence).verdict == AGREES and JUDGES["decay_rgb"](evidence).rule == "above 8"
    assert find({"": combine([2.0, 2.1, 1.9])}, "small", "", beyond=8.0).verdict == DISAGREES
    assert find({"": combine([2.0, 9.1, 8.9])}, "unsure", "", beyond=8.0).verdict == UNDECIDED


@pytest.mark.parametrize("rule", [{"beyond": 8.0}, {**HALF, "form": format_factor}, {"sign": -1}, {"beyond": 5.0}])
@pytest.mark.parametrize("n_seeds", [3, 5])
def test_false_verdicts_are_rare(rule, n_seeds):
    "At the limit of a claim, one or the other verdict is false in 5 % of cases."
    rng, limit = np.random.default_rng(0), rule.get("sign", 1) * rule.get("beyond", 0.0)
    found = [find({"": combine(limit + 3 * rng.normal(size=n_seeds))}, "", "", **rule).verdict for _ in range(600)]
    assert 0.02 < np.mean([verdict in (AGREES, DISAGREES) for verdict in found]) < 0.075


@pytest.fixture
def judged(monkeypatch):
    "Claims whose judges return effects that we choose: the first just significant, the others clear."
    clear = {key: lambda _, key=key: find({"": combine([3.0, 3.1, 2.9])}, key, "table2_backbones") for key in JUDGES}
    weak = {"gain_over_resnet": lambda _: find({"": combine([1.2, 1.6, 2.2])}, "weak", "table2_backbones")}
    monkeypatch.setattr(claims, "JUDGES", clear | weak)
    results = [SimpleNamespace(run=plan_run("laptop", "naip-trees"))]
    return judge_claims(results, WORKSPACE).set_index("key")


def test_claims_that_are_one_comparison_are_counted_once(judged):
    assert list(judged.index) == [claim.key for claim in CLAIMS]
    for key, same in SAME.items():
        assert judged.same_as[key] == same and judged.measured[key] == judged.measured[same] and judged.holm[key] == judged.holm[same]
    assert judged.p.notna().sum() == len(JUDGES) + len(SAME)
    assert judged.verdict["gain_over_resnet"] == AGREES and 0.01 < judged.p["gain_over_resnet"] < 0.05
    assert judged.holm["gain_over_resnet"] == AGREES  # the weakest of all keeps its own p
    assert judged.holm["test_score"] == UNTESTED


def test_holm_takes_the_weak_ones(monkeypatch):
    several = {key: lambda _, key=key: find({"": combine([1.2, 1.6, 2.2])}, key, "table2_backbones") for key in JUDGES}
    monkeypatch.setattr(claims, "JUDGES", several)
    found = judge_claims([SimpleNamespace(run=plan_run("laptop", "naip-trees"))], WORKSPACE).set_index("key")
    assert set(found.verdict[list(JUDGES)]) == {AGREES} and set(found.holm[list(JUDGES)]) == {UNDECIDED}


def test_the_matrix_of_several_folders(judged, tmp_path):
    own = judged.reset_index()
    for name, verdict, holm in (("a", DISAGREES, DISAGREES), ("b", AGREES, UNDECIDED)):
        (tmp_path / name / "tables").mkdir(parents=True)
        own.assign(data=f"data {name}", verdict=verdict, holm=holm).to_csv(tmp_path / name / "tables" / "claims.csv", index=False)
    matrix = claims_matrix(own, [tmp_path / "a", str(tmp_path / "b")])
    assert matrix.shape == (len(CLAIMS), 3) and matrix.columns.tolist()[1:] == ["data a, 3 seeds", "data b, 3 seeds"]
    assert (matrix["data a, 3 seeds"] == DISAGREES).all() and (matrix["data b, 3 seeds"] == AGREES + ALONE).all()
    assert [cell.removesuffix(ALONE) for cell in matrix.iloc[:, 0]] == own.verdict.tolist()
    figure = draw_matrix(matrix)
    assert len(figure.axes[0].texts) == matrix.size and len(figure.axes[0].get_yticklabels()) == len(CLAIMS)
    pd.DataFrame({"key": ["a"]}).to_csv(tmp_path / "a" / "tables" / "claims.csv", index=False)
    with pytest.raises(ValueError, match="lacks data, holm, n, verdict, where: it is from another version"):
        claims_matrix(own, [tmp_path / "a"])
