"Pictures: small files of the same content."

import base64
import io

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from agrivision_repro.plots import shrink_outputs, shrink_png


@pytest.fixture(scope="module")
def png():
    "A curve on a white background, with a description."
    figure, ax = plt.subplots(figsize=(4, 2))
    ax.plot(np.sin(np.linspace(0, 9, 200)))
    file = io.BytesIO()
    figure.savefig(file, metadata={"Description": "a sine"})
    plt.close(figure)
    return file.getvalue()


def test_shrunk_picture_shows_the_same(png):
    before, after = (Image.open(io.BytesIO(data)) for data in (png, shrink_png(png)))
    distance = np.abs(np.asarray(before.convert("RGB"), float) - np.asarray(after.convert("RGB"), float))
    assert after.text["Description"] == "a sine" and after.size == before.size
    assert len(shrink_png(png)) < 0.6 * len(png) and distance.max() <= 8


def test_outputs_of_a_notebook_are_shrunk_in_place(png):
    shown = {"image/png": base64.b64encode(png).decode(), "text/plain": "<Figure>"}
    cells = [{"source": "no outputs"}, {"outputs": [{"data": shown}, {"output_type": "stream", "text": ""}]}]
    shrink_outputs(cells)
    assert base64.b64decode(shown["image/png"]) == shrink_png(png) and shown["text/plain"] == "<Figure>"
