"""How the layers that train are named, and what is told where a name does not do."""

from __future__ import annotations

import pytest

from prefixtune.config import PrefixConfig, chosen_layers
from prefixtune.errors import ConfigError


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, list(range(30))),
        ("top:1", [29]),
        ("top:3", [27, 28, 29]),
        ("top:30", list(range(30))),
        ("0", [0]),
        ("0,5,20-22", [0, 5, 20, 21, 22]),
        ("20-22, 5,0", [0, 5, 20, 21, 22]),
        ("7-7", [7]),
        ("0-29", list(range(30))),
    ],
)
def test_names_choose_these_layers_of_thirty(layers: str | None, expected: list[int]) -> None:
    assert list(chosen_layers(layers, 30)) == expected


@pytest.mark.parametrize("layers", ["", "all", "top", "top:", "top:0", "top:-1", "top:1.5", "top:3,0"])
@pytest.mark.parametrize("form", ["{}", " {}"])
def test_name_that_cannot_be_read_is_refused_with_what_is_expected(layers: str, form: str) -> None:
    with pytest.raises(ConfigError, match="expected top:N, or layer numbers") as error:
        PrefixConfig(layers=form.format(layers))
    assert "0,5,20-29" in str(error.value)


@pytest.mark.parametrize("layers", ["-1", "1-", "1--3", "0,,1", "1_0", "0;1", "x-y", "٣", "9" * 5000])
def test_list_that_cannot_be_read_is_refused(layers: str) -> None:
    with pytest.raises(ConfigError, match="expected top:N, or layer numbers"):
        PrefixConfig(layers=layers)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("9-3", "expected a range that ascends; got 9-3"),
        ("5,3-7", "layer 5 is named twice"),
        ("3-7,7-9", "layer 7 is named twice"),
        ("0,0", "layer 0 is named twice"),
    ],
)
def test_list_that_contradicts_itself_is_refused(layers: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrefixConfig(layers=layers)


@pytest.mark.parametrize("layers", ["top:31", "30", "0,5,20-30", "999999", "top:999999"])
def test_layer_that_the_model_has_not_is_told_with_the_models_layers(layers: str) -> None:
    config = PrefixConfig(layers=layers)  # the model is not known yet
    with pytest.raises(ConfigError, match=f"the model has 30 layers, 0 to 29; got '{layers}'"):
        chosen_layers(config.layers, 30)


@pytest.mark.parametrize("layers", [None, "top:8", "0,5,20-29"])
def test_json_round_trip_keeps_the_layers(layers: str | None) -> None:
    config = PrefixConfig(length=4, layers=layers)
    assert PrefixConfig.from_json(config.to_json()) == config
    assert config.to_dict()["layers"] == layers


def test_layers_are_text_and_nothing_else() -> None:
    for value in (5, ["0", "1"], True):
        with pytest.raises(ConfigError, match="layers: expected str"):
            PrefixConfig.from_dict({"layers": value})
