"Rules of verdicts: what they do by hand, and how often they are wrong where there is nothing to find."

import numpy as np
import pytest
from scipy import stats

from agrivision_repro.analysis.significance import (
    AGREES,
    DISAGREES,
    NO_EFFECT,
    NOT_JUDGED,
    UNDECIDED,
    Effect,
    combine,
    contrast_effect,
    draw_fields,
    holm,
    judge,
    judge_all,
    paired_effect,
    simulate_nets,
)

FIELDS = np.array([[[600, 800], [150, 300], [0, 0]]] * 10)  # intersection and union of three classes in ten fields


def nets(wrong: int) -> list[np.ndarray]:
    "Three seeds that differ by a pixel; class 2 is in three fields, and `wrong` of its pixels are predicted in an eighth."
    fields = FIELDS.copy()
    fields[:3, 2] = [10, 40]
    fields[7, 2, 1] += wrong
    return [fields + np.array([[[k, 0], [0, 0], [0, 0]]]) for k in range(3)]


def test_five_pixels_do_not_widen_the_interval():
    "The interval contains zero and is no wider than that of a hundred pixels, where the old rule gave −45 to 0 points."
    low, high = paired_effect(nets(0), nets(5)).interval()
    wide_low, wide_high = paired_effect(nets(0), nets(100)).interval()
    assert low <= 0 <= high and high - low <= wide_high - wide_low < 40
    assert high - low < 3


def test_resamples_keep_the_classes_of_the_sample():
    counts = np.stack(nets(0), 1).astype(float)
    drawn = draw_fields(counts, 300, np.random.default_rng(0))
    assert drawn.shape == (300, 3, 3, 2) and (drawn[..., 1] > 0).all()
    with pytest.raises(ValueError, match="still lack a class after 2 tries: it is in too few of the 10 fields"):
        lonely = FIELDS[:, None].repeat(2, 1).astype(float)
        lonely[0, 0, 2, 1] = 5
        lonely[1, 1, 2, 1] = 5
        draw_fields(lonely, 1_000, np.random.default_rng(0), tries=2)


def test_seeds_are_paired():
    "A seed that is good for both nets adds nothing to the error."
    a, b = simulate_nets(np.random.default_rng(0), 3, 20, (0.0, 0.5, 0.0))
    bonus = np.array([0, 40, 80])[:, None, None, None] * np.array([1, 0])
    paired, shuffled = paired_effect(a + bonus, b + bonus), paired_effect(a + bonus, (b + bonus)[::-1])
    assert paired.estimate == pytest.approx(shuffled.estimate) and paired.se < shuffled.se / 3


def test_fields_are_drawn_whole():
    "Copies of a tile within its field are no further evidence."
    a, b = simulate_nets(np.random.default_rng(0), 3, 12)
    groups = np.arange(12).repeat(4)
    once, copied = paired_effect(a, b), paired_effect(a.repeat(4, 1), b.repeat(4, 1), groups)
    assert copied.interval() == pytest.approx(once.interval())
    assert paired_effect(a.repeat(4, 1), b.repeat(4, 1)).variances[1] < 0.5 * once.variances[1]


def test_few_seeds_and_other_shapes_are_refused():
    a, b = simulate_nets(np.random.default_rng(0), 2, 12)
    assert judge(paired_effect(a, b + np.array([30, 0]))) == NOT_JUDGED
    assert judge_all({"x": paired_effect(a, b)}) == NOT_JUDGED
    with pytest.raises(ValueError, match="all must have the same seeds, tiles and classes"):
        paired_effect(a, b[:1])
    with pytest.raises(ValueError, match="wanted finite differences"):
        combine([1.0, float("nan")])
    assert judge(combine([3.0])) == NOT_JUDGED


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.001, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.003, "c": 0.06})


def test_p_is_the_level_at_which_the_interval_touches_zero():
    "So a verdict from p never contradicts the interval beside it, at any mixture of the parts, however small p is."
    rng = np.random.default_rng(0)
    for t in [*rng.uniform(0.1, 8, 300), 1e3, 1e6]:
        effect = Effect(t, (share := rng.uniform(), 1 - share), (2, 47))
        assert effect.interval(1 - effect.p)[0] == pytest.approx(0, abs=1e-3 * t)
        assert (effect.p < 0.05) == (effect.interval()[0] > 0)
    at_edge = Effect(-3.05 * 2**0.5, (1.0, 1.0), (2, 47))  # averaged tail probabilities gave .048
    assert at_edge.interval()[1] > 0 and judge(at_edge) == judge_all({"x": at_edge}) == UNDECIDED
    assert Effect(0.0, (0.0, 0.0), (2, 47)).p == 1 and np.isnan(combine([1.0], 2.0, 40).p)


def test_a_small_effect_that_is_not_clear_is_no_effect():
    small, large = combine([0.3, 0.4, 0.5]), combine([12.0, 12.5, 11.6])
    assert judge(small) == AGREES and judge(small, p=0.2) == NO_EFFECT and judge(large, p=0.2) == UNDECIDED
    nothing = combine([0.1, -0.1, 0.05])
    assert judge_all({"x": nothing, "y": nothing}) == NO_EFFECT and judge_all({"x": large, "y": nothing}) == UNDECIDED
    with pytest.raises(ValueError, match="counts of 1 field: wanted at least 2"):
        contrast_effect([FIELDS[None, :1, :2]] * 2, (-1, 1))


@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize("n_fields", [10, 40])
def test_false_verdicts_are_rare(n_seeds, n_fields):
    "Equal nets: false verdicts at most 5 %, judged by the lower end of the interval of what was counted; a real lead is found."
    rng, n_sets, wrong, found = np.random.default_rng(1), 300, 0, 0
    effects = [paired_effect(*simulate_nets(rng, n_seeds, n_fields), n_resamples=100, seed=k) for k in range(n_sets)]
    lead = 2 * np.median([effect.detectable for effect in effects])
    for effect in effects:
        wrong += judge(effect) in (AGREES, DISAGREES)
        found += judge(type(effect)(effect.estimate + lead, effect.variances, effect.dfs)) == AGREES
    assert stats.beta.ppf(0.025, wrong, n_sets - wrong + 1) < 0.05 if wrong else True
    assert found > 0.9 * n_sets
