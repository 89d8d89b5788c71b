"""CLAPConfig: strict reading, exact round trips, no torch."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig, read_dataclass
from fastclap.errors import ConfigError
from fastclap.train.config import TrainConfig, load_config


def test_round_trip_through_json() -> None:
    config = CLAPConfig(
        audio=AudioTowerConfig(kind="wav2vec2", hf_config={"model_type": "wavlm", "conv_dim": [8, 8]}, freeze=True),
        text=TextTowerConfig(kind="hf", pretrained="some/encoder", pooling="cls"),
        head=HeadConfig(kind="clsp", dim=512, dropout=0.2),
        max_logit_scale=50,
    )
    assert CLAPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_left_out_fields_keep_their_defaults() -> None:
    config = CLAPConfig.from_dict({"audio": {"layers": 7}})
    assert config == CLAPConfig(audio=AudioTowerConfig(layers=7))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"colour": 1}, "unknown configuration key colour; CLAPConfig has"),
        ({"audio": {"layers": 2, "depth": 3}}, r"unknown configuration key audio\.depth"),
        ({"text": {"kind": "large"}}, r"text\.kind must be 'small' or 'hf', not 'large'"),
        ({"head": {"dim": "256"}}, r"head\.dim must be a whole number at least 1, not '256'"),
        ({"head": {"dim": True}}, r"head\.dim must be a whole number"),
        ({"audio": {"freeze": 1}}, r"audio\.freeze must be true or false"),
        ({"audio": {"pretrained": 3}}, r"audio\.pretrained must be text or null"),
        ({"audio": {"feature_options": [1]}}, r"audio\.feature_options must be a mapping"),
        ({"audio": "wavlm"}, "audio must be a mapping"),
        ([], "the configuration must be a mapping"),
        ({"audio": {"lora-rank": 2}}, r"unknown configuration key audio\.lora-rank; did you mean lora_rank\?"),
        ({"audio": {"layers": -1}}, r"audio\.layers is -1; it must be a whole number from 0 to 16,777,216"),
        ({"audio": {"layers": 10**400}}, r"audio\.layers is 10+; it must be"),
        ({"audio": {"dropout": float("nan")}}, r"audio\.dropout is nan; it must be a number from 0 to below 1"),
        ({"audio": {"zipformer": {"width": [1, 0]}}}, r"audio\.zipformer\.width is 0; it must be a whole number"),
        ({"text": {"pretrained": "a\0b"}}, r"text\.pretrained is 'a\\x00b'; it must be without zero bytes"),
        ({"text": {"max_tokens": 2}}, r"text\.max_tokens is 2; it must be a whole number from 3"),
        ({"init_logit_bias": -float("inf")}, r"init_logit_bias is -inf; it must be a finite number"),
        ({"audio": {"pretrained": "x"}}, r"audio\.pretrained is given, but a tower of audio\.kind log-mel always"),
    ],
)
def test_reading_names_what_is_wrong(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLAPConfig.from_dict(data)  # type: ignore[arg-type]


def leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field that is no dataclass."""
    for name, hint in typing.get_type_hints(cls).items():
        yield from leaves(hint, (*path, name)) if dataclasses.is_dataclass(hint) else [(*path, name)]


@pytest.mark.parametrize("path", leaves(TrainConfig), ids=".".join)
def test_a_value_of_no_type_is_refused_in_every_field(path: tuple[str, ...]) -> None:
    data: Any = b"neither"
    for name in reversed(path):
        data = {name: data}
    with pytest.raises(ConfigError, match=rf"{re.escape('.'.join(path))} must be .+, not b'neither'"):
        read_dataclass(TrainConfig, data)


def test_items_of_lists_and_mappings_are_checked() -> None:
    @dataclasses.dataclass
    class Pair:
        names: dict[str, str]
        shares: list[float] | None = None

    assert read_dataclass(Pair, {"names": {"a": "b"}, "shares": [1, 0.5]}) == Pair({"a": "b"}, [1, 0.5])
    with pytest.raises(ConfigError, match="shares must be"):
        read_dataclass(Pair, {"names": {}, "shares": ["half"]})
    with pytest.raises(ConfigError, match="names must be"):
        read_dataclass(Pair, {"names": {"a": 1}})


def test_importing_the_configuration_does_not_import_torch() -> None:
    code = "import sys, fastclap.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------------------------------
# anything at all

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**30)
_NAMES = [*typing.get_type_hints(AudioTowerConfig), "audio", "text", "head", "zipformer", "x"]
_KEYS = st.sampled_from(_NAMES) | st.text(max_size=3)
_ANYTHING = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=8
)
_TOWER = st.dictionaries(_KEYS, _ANYTHING, max_size=2)
_TOWERS = st.fixed_dictionaries({}, optional={"audio": _TOWER, "text": _ANYTHING})


@settings(max_examples=80, derandomize=True, deadline=None)
@given(_TOWERS | _ANYTHING)
def test_any_data_is_a_configuration_or_an_error_in_words(data: Any) -> None:
    try:
        config = CLAPConfig.from_dict(data)
    except ConfigError as error:
        assert str(error)
    else:
        assert CLAPConfig.from_dict(config.to_dict()) == config


@settings(max_examples=60, derandomize=True, deadline=None)
@given(_ANYTHING | st.binary(max_size=30), st.sampled_from([".yaml", ".toml", ".json"]))
def test_any_file_is_a_configuration_or_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, content: Any, ending: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"anything{ending}"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, allow_unicode=True).encode())
    try:
        config = load_config(path, TrainConfig())
    except ConfigError as error:
        assert str(error).startswith(str(path))
    else:
        assert config == TrainConfig() or content
