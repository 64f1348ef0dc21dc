"Image files of noise, and the command that predicts them."

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from agrivision_repro.cli.app import main
from agrivision_repro.predict.scenes import find_rasterio

needs_rasterio = pytest.mark.skipif(find_rasterio() is None, reason="rasterio, of the extra geo, is not installed")
PLACE = (2.0, 0.0, 500_000.0, 0.0, -2.0, 4_600_000.0)  # pixels of 2 m, somewhere in UTM


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_tiff(path: Path, image: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, image.transpose(1, 2, 0), photometric="rgb", **options)
    return path


def write_geotiff(path: Path, image: np.ndarray, **options) -> Path:
    rasterio = find_rasterio()
    form = {"driver": "GTiff", "count": len(image), "height": image.shape[1], "width": image.shape[2], "dtype": image.dtype}
    form |= {"crs": "EPSG:32633", "transform": rasterio.Affine(*PLACE)} | options
    with rasterio.open(path, "w", **form) as file:
        file.write(image)
    return path


def run_command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["agrivision", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0
