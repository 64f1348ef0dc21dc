"Synthetic farmland: the same bytes as ever, and spectra like those of the imagery that it replaces, in every split."


import numpy as np
import pytest

from agrivision_repro.data.editions import AGRIVISION_2020
from agrivision_repro.data.synthetic import RECIPES, make_field
from agrivision_repro.data.synthetic_files import SPLITS, SyntheticConfig, field_name

SIZE = 128
PUBLISHED_MEAN = np.array([0.4076, 0.4117, 0.4240, 0.3558])  # R, G, B, NIR, valid pixels of Agriculture-Vision 2020


@pytest.fixture(scope="module", params=[0, 1], ids=["train", "val"])
def tiles(request):
    "Valid pixels `(4, n)` and their labels `(n,)` of each tile of 32 fields."
    found = []
    for field in range(32):
        raster = make_field((0, request.param, field), SIZE, 4, RECIPES[field % len(RECIPES)])
        for y, x in ((0, 0), (0, SIZE), (SIZE, 0), (SIZE, SIZE)):
            part = slice(y, y + SIZE), slice(x, x + SIZE)
            valid = (raster.boundary & raster.mask)[part]
            if valid.sum() > 1000:
                found.append((raster.image[:, *part][:, valid] / 255, raster.labels[part][valid]))
    return found


def test_bands_correlate_as_measured_on_agriculture_vision(tiles):
    "Red and NIR about .47, green and NIR about .69 within a tile; vegetation edges make red and NIR oppose in some tiles."
    pairs = np.array([np.corrcoef(pixels)[[0, 1, 0], [3, 3, 1]] for pixels, _ in tiles])
    red_nir, green_nir, red_green = pairs.mean(0)
    assert 0.37 <= red_nir <= 0.57 and 0.59 <= green_nir <= 0.79 and red_green > green_nir
    assert pairs[:, 0].min() < 0 and 0.15 < pairs[:, 0].std() < 0.35


def test_channel_means_are_near_the_published_ones(tiles):
    means = np.concatenate([pixels for pixels, _ in tiles], 1).mean(1)
    assert np.abs(means - PUBLISHED_MEAN).max() <= 0.05, means


def test_nir_is_no_linear_mix_of_red_green_and_blue(tiles):
    "Over all tiles, more than an eighth of the variance of NIR is left when R, G and B are regressed out."
    pixels = np.concatenate([pixels[:, ::7] for pixels, _ in tiles], 1)
    visible = np.vstack([pixels[:3], np.ones(pixels.shape[1])]).T
    residual = pixels[3] - visible @ np.linalg.lstsq(visible, pixels[3], rcond=None)[0]
    assert residual.var() > pixels[3].var() / 8


def mean_contrast(tiles, name):  # R, G, B, NIR, in standard deviations of the background
    "Return a class's mean minus the background's within a tile, averaged over tiles."
    bit, contrasts = 1 << AGRIVISION_2020.index(name), []
    for pixels, labels in tiles:
        inside, outside = labels & bit > 0, labels == 0
        if min(inside.sum(), outside.sum()) > 50:
            contrasts.append((pixels[:, inside].mean(1) - pixels[:, outside].mean(1)) / pixels[:, outside].std(1))
    return np.mean(contrasts, 0)


def test_each_anomaly_has_the_spectrum_of_its_cause(tiles):
    contrast = {name: mean_contrast(tiles, name) for name in AGRIVISION_2020}
    assert contrast["standing_water"][3] < -1 and contrast["standing_water"][3] < contrast["standing_water"][2]  # dark, most in NIR
    assert contrast["weed_cluster"][3] > 0.5 > 0 > contrast["weed_cluster"][0]  # more leaves: bright in NIR, dark in red
    assert contrast["double_plant"][3] > 0.2 and contrast["double_plant"][0] < -0.5  # likewise
    assert contrast["planter_skip"][0] > 0.7 and contrast["planter_skip"][3] < -0.3  # soil instead of leaves
    assert contrast["waterway"][0] > 0.7  # dry grass and soil
    assert contrast["cloud_shadow"].max() < -0.7  # dark in all bands


def test_rare_classes_occur_in_at_least_8_of_48_fields():
    rasters = [make_field((0, 1, field), 32, 4, RECIPES[field % len(RECIPES)]) for field in range(48)]
    seen = [np.bitwise_or.reduce(raster.labels[raster.boundary & raster.mask]) for raster in rasters]
    counts = {name: sum(int(bits) >> k & 1 for bits in seen) for k, name in enumerate(AGRIVISION_2020)}
    assert min(counts.values()) >= 8, counts


def test_no_two_of_many_fields_share_a_name():
    farm = SyntheticConfig(size=128, train_fields=80, val_fields=48, test_fields=1)
    names = [field_name(farm, split, field) for split in SPLITS for field in range(getattr(farm, f"{split}_fields"))]
    assert len(set(names)) == 129


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"size": 40}, "size is 40: wanted a multiple of 16"),
        ({"val_fields": 0}, "val_fields is 0: wanted an integer, 1 or more"),
        ({"tiles_per_field": 3}, "tiles_per_field is 3: a field is a square"),
        ({"seed": -1}, "seed is -1: wanted an integer, 0 or more"),
    ],
)
def test_wrong_parameters(choice, says):
    with pytest.raises(ValueError, match=says):
        SyntheticConfig(**choice)
