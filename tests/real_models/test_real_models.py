"""Models of public packages: the exact number of neurons, and outputs that stay what they are."""

import json
import pathlib
import tomllib

import pytest

# Each enters its models in the table.
from real_models import (
    equimo_models,  # noqa: F401
    equinox_models,  # noqa: F401
    flax_models,  # noqa: F401
    haiku_models,  # noqa: F401
    hugging_face,  # noqa: F401
    keras_models,  # noqa: F401
    scientific,  # noqa: F401
)
from real_models.measure import measure
from real_models.model import MODELS

HERE = pathlib.Path(__file__).parent
MEASURED = HERE.parents[1] / "build" / "real_models"
EXPECTED = tomllib.loads((HERE / "neurons.toml").read_text("utf-8"))
# Of the machine epsilon: the depth of a network, times what logarithms of a few do to its layers.
ROUNDING = 1000


def test_every_model_has_its_number():
    assert set(EXPECTED) == set(MODELS)


@pytest.mark.filterwarnings("default")  # Those of the packages.
@pytest.mark.parametrize("name", MODELS)
def test_model(name, x64):
    measured = measure(name)
    MEASURED.mkdir(parents=True, exist_ok=True)
    file = MEASURED / f"{name.replace('/', ', ')}.json"
    file.write_text(json.dumps({"name": name, **measured._asdict()}), encoding="utf-8")
    assert measured.failed == []
    assert measured.change < ROUNDING * measured.precision
    found = {"neurons": measured.neurons}
    if measured.dimension is not None:
        found |= {"live": measured.live, "dimension": measured.dimension}
    assert found == EXPECTED[name]
