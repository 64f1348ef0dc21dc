"The contrast of a class is what one computes by hand, and its sign is seen."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from agrivision_repro.study.polarity import (
    class_polarity,
    correlate_polarity,
    draw_polarity,
    format_polarity,
    measure_contrasts,
    tile_contrasts,
)
from agrivision_repro.study.section7 import AS_IT_IS


def make_tile(nir_of_class: float):
    "Ten rows of class 1, ten of background, four that are not valid; red is 60 on the class and 100 beside it."
    labels, valid = np.zeros((24, 10), np.uint8), np.ones((24, 10), bool)
    labels[:10], valid[20:] = 1, False
    image = np.full((4, 24, 10), 100, np.uint8)
    image[:3, :10], image[3, :10], image[:, 20:] = 60, nir_of_class, 255
    return SimpleNamespace(image=image, labels=labels, valid=valid)


def test_contrasts_are_in_standard_deviations_of_valid_pixels():
    "Half of the pixels 40 lower: a standard deviation of 20, so a contrast of -2; in NIR half of them 60 higher."
    np.testing.assert_allclose(tile_contrasts(make_tile(160), 3), [[2, -2], [-2, 2], [np.nan, np.nan]])
    constant = tile_contrasts(make_tile(100), 2)
    np.testing.assert_allclose(constant, [[2, 0], [-2, 0]])


def test_opposite_signs_are_counted():
    table = measure_contrasts([make_tile(160), make_tile(160), make_tile(40), make_tile(160)], ("background", "crop", "absent"))
    assert table.tiles.tolist() == [4, 4, 0] and table.opposite.tolist()[:2] == [75.0, 75.0]
    assert table.rgb[1] == -2 and table.nir[1] == 1 and table.loc[2, ["rgb", "nir", "opposite"]].isna().all()


def test_gains_stand_beside_the_contrasts(tmp_path):
    "Measured once for a run; the gain is a mean over nets and seeds."
    workspace = SimpleNamespace(tiles=lambda run, split: [make_tile(160)])
    result = SimpleNamespace(folder=tmp_path, run=SimpleNamespace(edition=SimpleNamespace(classes=("background", "crop"))))
    arms, steps = {AS_IT_IS: 1.0, "inverted, mean and std": 4.0}, {"background": 0, "crop": 2}
    rows = [(arm, name, iou + step, 0.0) for arm, iou in arms.items() for name, step in steps.items()]
    scores = pd.DataFrame(rows, columns=["arm", "class", "iou", "average_precision"])
    table = class_polarity(result, workspace, scores)
    assert table["class"].tolist() == ["background", "crop"] and table.gain.tolist() == [3.0, 3.0]
    workspace.tiles = None  # not needed again
    pd.testing.assert_frame_equal(class_polarity(result, workspace, scores), table)
    assert format_polarity(table).loc["crop", ["contrast in NIR", "opposite, %", "IoU gained"]].tolist() == ["+2.00", "100", "+3.0"]


def test_the_correlation_is_over_the_classes_of_all_data():
    points = (10.0, -2.0), (50.0, 0.0), (90.0, 9.0)
    tables = [pd.DataFrame({"class": ["a_b"], "opposite": [x], "gain_average_precision": [y]}) for x, y in points]
    absent = pd.DataFrame({"class": ["c"], "opposite": [np.nan], "gain_average_precision": [1.0]})
    assert correlate_polarity([*tables, absent]) == (pytest.approx(1.0), 3)
    (ax,) = draw_polarity({"one": pd.concat(tables), "two": absent}).axes
    assert [text.get_text() for text in ax.texts] == ["a b"] * 3


def test_names_stand_within_the_frame_and_apart():
    places = {"double_plant": (96.0, 2.0), "dry_beans_peas": (100.0, 2.2), "soybeans": (99.0, 9.0)}
    table = pd.DataFrame([(name, *xy) for name, xy in places.items()], columns=["class", "opposite", "gain_average_precision"])
    (ax,) = draw_polarity({"one": table}).axes
    ax.figure.draw_without_rendering()
    boxes, frame = [text.get_window_extent() for text in ax.texts], ax.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    assert not any(one.overlaps(two) for k, one in enumerate(boxes) for two in boxes[:k])
