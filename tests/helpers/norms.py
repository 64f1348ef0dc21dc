"The norms over which a costly check is repeated: one in the quick tests, the others in the slow ones."

import pytest

from agrivision_repro.models.backbones import NORMS

EVERY_NORM = [norm if norm == "ibn_s" else pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS]
