"""Folders of models that are damaged, incomplete or malicious: read as they are, or one error that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastclap.config import AudioTowerConfig, CLAPConfig, HeadConfig, TextTowerConfig
from fastclap.errors import ConfigError, FastclapError, ModelError
from fastclap.models.card import model_card
from fastclap.models.clap import CLAP
from fastclap.models.folder import load_state_dict_file
from fastclap.models.sizes import Allowance, free_memory
from fastclap.models.tokenizer import Tokenizer, as_tokenizer, check_vocabulary, train_tokenizer

PROPERTY = settings(
    derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
XLM = {"model_type": "xlm-roberta", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
XLM |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 80}


@pytest.fixture
def folder(clap_folder: str, tmp_path: Path) -> Path:
    """A copy of an exported model, to be damaged."""
    return Path(shutil.copytree(clap_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a text encoder as transformers saves them, without a tokenizer."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    path = tmp_path_factory.mktemp("encoder") / "xlm"
    torch.manual_seed(0)
    XLMRobertaModel(
        XLMRobertaConfig(**{key: value for key, value in XLM.items() if key != "model_type"})
    ).save_pretrained(path)
    return path


@pytest.fixture
def encoder(encoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_folder, tmp_path / "xlm"))


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with entries of config.json changed; "audio__width" is audio.width."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = data
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(data))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        CLAP.from_pretrained(folder)
    return str(error.value)


def small_config(**text: Any) -> CLAPConfig:
    return CLAPConfig(
        audio=AudioTowerConfig(width=16, layers=1, heads=2),
        text=TextTowerConfig(**{"width": 16, "layers": 1, "heads": 2, "vocab_size": 300, **text}),
        head=HeadConfig("linear", 8),
    )


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_weights_without_a_tokenizer(encoder: Path) -> None:
    config = small_config(kind="hf", pretrained=str(encoder))
    for held in ((), ("tokenizer_config.json",), ("special_tokens_map.json",), ("vocab.json",)):
        for name in held:
            (encoder / name).write_text("{}")
        for build in (lambda: CLAP(config), lambda: as_tokenizer(encoder)):
            with pytest.raises(
                ModelError, match=r"xlm: no tokenizer could be loaded: the folder holds .*tokenizer\.json"
            ):
                build()
    with pytest.raises(ModelError, match=r"vocab\.json without merges\.txt"):
        Tokenizer.from_pretrained(str(encoder))


@pytest.mark.parametrize("kind", ["xlm-roberta", "roberta", "bert", "gpt2"])
def test_a_tokenizer_of_special_tokens_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers makes it where files are missing, on the hub for instance."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    monkeypatch.setattr("fastclap.models.tokenizer._check_tokenizer_files", lambda folder: None)
    with pytest.raises(
        ModelError, match=r"a vocabulary of \d tokens that gives all words the same ids|no padding token"
    ):
        Tokenizer.from_pretrained(str(tmp_path))


def word_level(words: dict[str, int], pad: int = 0, unknown: str = "<unk>") -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_padding(pad_id=pad, pad_token="<pad>")
    return backend


def test_vocabularies(folder: Path) -> None:
    assert Tokenizer(word_level({"<pad>": 0, "<unk>": 1, "froh": 2, "müde": 3})).vocab_size == 4, "words of its own"
    assert Tokenizer(word_level({"<pad>": 0, "<unk>": 1, "froh": 2, "müde": 900})).vocab_size == 901, "ids with gaps"
    assert Tokenizer(word_level({"<pad>": 0, "<unk>": 1, "froh": 2, "müde": 3}, pad=77)).vocab_size == 78
    for words in ({"<pad>": 0, "<unk>": 1}, {"<pad>": 0, "<unk>": 1, "<s>": 2}, {"<unk>": 0}):
        with pytest.raises(ModelError, match="gives all words the same ids"):
            Tokenizer(word_level(words))
    with pytest.raises(ModelError, match="cannot tokenize"):
        Tokenizer(word_level({"<pad>": 0, "a": 1}, unknown="<missing>"))
    with pytest.raises(ConfigError, match="the text tower has 300 tokens, the tokenizer has 901"):
        CLAP(small_config(), Tokenizer(word_level({"<pad>": 0, "<unk>": 1, "froh": 2, "müde": 900})))
    word_level({"<pad>": 0, "<unk>": 1}).save(str(folder / "tokenizer.json"))
    assert "tokenizer.json: a vocabulary of 2 tokens that gives all words" in refused(folder)
    word_level({"<pad>": 0, "<unk>": 1, "froh": 2, "müde": 900}).save(str(folder / "tokenizer.json"))
    assert "the tokenizer has 901" in refused(folder)


def test_another_models_tokenizer() -> None:
    tokenizer = train_tokenizer(["a calm voice"], 300)
    check_vocabulary(tokenizer, 1000, "x")
    with pytest.raises(
        ModelError, match=r"x: the tokenizer has 2\d\d tokens, but the text tower an embedding of 50265"
    ):
        check_vocabulary(tokenizer, 50265, "x")


@pytest.mark.parametrize("source", [None, 3, "", b"x"])
def test_what_is_no_tokenizer(source: Any) -> None:
    with pytest.raises(ModelError, match="the tokenizer is"):
        as_tokenizer(source)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format_version": \xff}', r"config\.json:1: not UTF-8"),
        (b"[" * 100_000, r"config\.json: JSON nested too deeply"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", r"config\.json: JSON with an integer of more than"),
        (b'{"format_version": 2, "audio": {"width": 1e999}}', r"config\.json: audio\.width must be a whole number"),
        (b'{"format_version": true}', r"config\.json: format version True"),
        (b'{"format_version": 2.0}', r"config\.json: format version 2\.0"),
        (b'{"format_version": [1]}', r"config\.json: format version \[1\]"),
        (b'{"format_version": {}, "model_type": []}', r"config\.json: format version"),
        (b"", r"config\.json: not valid JSON"),
        (b"null", r"config\.json: format version None"),
    ],
)
def test_configurations_that_are_none(folder: Path, text: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=message):
        CLAP.from_pretrained(folder)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, None, 3, b"model"])
def test_what_names_no_model(name: Any) -> None:
    with pytest.raises(ModelError, match=r"names no model|no such model"):
        CLAP.from_pretrained(name)


def test_a_card_that_is_no_text_is_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes(bytes(range(256)))
    model = CLAP.from_pretrained(folder)
    assert model.card is None
    model.save_pretrained(tmp_path / "again")
    assert "A dual encoder" in (tmp_path / "again/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[" * 100_000, b"{}\n[1]\n", b"9" * 5000, b"a: *b"])
def test_records_that_are_none_leave_a_card_without_figures(folder: Path, tmp_path: Path, damage: bytes) -> None:
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(damage)
    assert "## Figures" not in model_card(CLAP.from_pretrained(folder).facts, run=tmp_path)


def test_files_may_be_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert CLAP.from_pretrained(tmp_path / "links").tokenizer is not None


def test_what_is_no_checkpoint_is_not_called_malicious(tmp_path: Path) -> None:
    (tmp_path / "plot.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ModelError, match=r"plot\.pt: no torch file: it begins with b'\\x89PNG"):
        load_state_dict_file(tmp_path / "plot.pt")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ModelError, match="a pointer of Git LFS, not the weights"):
            load_state_dict_file(tmp_path / name)
    torch.save({1: torch.ones(1)}, tmp_path / "keys.pt")
    with pytest.raises(ModelError, match="holds no state dict"):
        load_state_dict_file(tmp_path / "keys.pt")


def test_weights_of_another_kind_of_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "audio_projection.linear.weight" if "audio_projection.linear.weight" in weights else sorted(weights)[0]
    save_file({**weights, name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    assert f"{name} is of type torch.int8 instead of torch.float32" in refused(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors"])
def test_an_index_names_files_of_its_folder_alone(encoder: Path, name: str) -> None:
    index = encoder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"index\.json: names .*, which is not a file of its folder"):
        CLAP(small_config(kind="hf", pretrained=str(encoder)), train_tokenizer(["a"], 300))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no index of weights"),
        ('{"weight_map": {"a": 1}}', "no index of weights"),
        ("{", "not valid JSON"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors: missing"),
    ],
)
def test_an_index_that_is_none(encoder: Path, text: str, message: str) -> None:
    (encoder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        CLAP(small_config(kind="hf", pretrained=str(encoder)), train_tokenizer(["a"], 300))


@pytest.mark.parametrize(
    "text",
    [b"{", b"\xff", b"[]", b"[" * 99999, b'{"model_type": 3}', b'{"model_type": "xlm-roberta", "hidden_size": "x"}'],
)
def test_a_pretrained_folder_with_a_damaged_configuration(encoder: Path, text: bytes) -> None:
    (encoder / "config.json").write_bytes(text)
    with pytest.raises(FastclapError, match=str(encoder)):
        CLAP(small_config(kind="hf", pretrained=str(encoder)), train_tokenizer(["a"], 300))


@pytest.mark.parametrize(
    "arguments", [{"device": "nowhere"}, {"device": "cuda:99"}, {"dtype": torch.int8}, {"dtype": "x"}]
)
def test_places_and_types(folder: Path, arguments: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        CLAP.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "fastclap.models.folder.fsync"])
def test_a_full_disk_names_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from safetensors import SafetensorError

    model = CLAP.from_pretrained(folder)

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error") if "safetensors" in where else OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match=r"written|No space") as error:
        model.save_pretrained(tmp_path / "out")
    assert str(error.value.filename).startswith(str(tmp_path / "out")) and not (tmp_path / "out").exists()


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audio__width": 1 << 20},
            r"takes .* bytes or more, .*for the weights in model\.safetensors.*audio\.width 1,048",
        ),
        ({"text__vocab_size": 1 << 20, "text__width": 1 << 10}, r"text\.vocab_size 1,048,576"),
        ({"text__layers": 100_000}, r"text\.layers is 100,000; no more than 1,000 layers"),
        ({"audio__layers": 10**9}, r"audio\.layers"),
        ({"head__dim": 1 << 20, "head__kind": "clsp"}, r"head\.dim"),
        ({"audio__subsampling": 1024, "audio__convolution_channels": 1 << 20}, r"convolution_channels"),
        ({"audio__feature_options": {"n_fft": 10**9}}, "n_fft is 1,000,000,000; give at most 32,768"),
        ({"audio__feature_options": {"n_mels": 10**9}}, "n_mels is 1,000,000,000; give at most 1,024"),
        ({"audio__feature_options": {"num_frames": 10**12}}, "num_frames is"),
    ],
)
def test_sizes_that_the_weights_do_not_have(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}"):
        CLAP.from_pretrained(edited(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**12}, r"of memory are free; the largest are text\.hf_config\.vocab_size 1,000,000,000,000"),
        ({"hidden_size": 10**9}, r"of memory are free.*text\.hf_config\.hidden_size"),
        ({"num_hidden_layers": 10**9}, r"text\.hf_config\.num_hidden_layers is 1,000,000,000"),
        ({"intermediate_size": 10**12}, r"text\.hf_config\.intermediate_size"),
        ({"max_position_embeddings": 10**9}, "a table of 1,000,000,000 positions|of memory are free"),
        ({"num_attention_heads": 0}, "text: no tower has this configuration"),
        ({"hidden_size": -16}, "text: no tower has this configuration"),
        ({"hidden_act": "no such"}, "text: no tower has this configuration"),
        ({"x": [1] * 1001}, r"text\.hf_config\.x is a list of 1,001"),
    ],
)
def test_sizes_that_no_memory_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLAP(small_config(kind="hf", hf_config={**XLM, **changes}))


def test_a_pretrained_folder_of_impossible_sizes(encoder: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json\.num_hidden_layers is 1,000,000,000"):
        CLAP(small_config(kind="hf", pretrained=str(edited(encoder, num_hidden_layers=10**9))))


def test_what_is_counted() -> None:
    calls: list[tuple[Callable[[], Any], int]] = [
        (lambda: torch.empty(3, 4), 48),
        (lambda: torch.empty((3, 4), dtype=torch.float64), 96),
        (lambda: torch.zeros(size=(5,)), 20),
        (lambda: torch.full((2, 3), 1.0), 24),
        (lambda: torch.arange(7), 28),
        (lambda: torch.arange(1, 8, 2), 16),
        (lambda: torch.eye(3), 36),
        (lambda: torch.linspace(0, 1, 5), 20),
        (lambda: torch.zeros_like(torch.tensor([1.0, 2.0])), 8),
        (lambda: torch.tensor([1.0]).new_zeros(6), 24),
        (lambda: torch.empty(10**9, device="meta"), 0),
        (lambda: torch.empty_like(torch.empty(10**9, device="meta")), 0),
    ]
    for call, size in calls:
        with Allowance({}, size, "are allowed"):
            call()
        if size:
            with (
                pytest.raises(ConfigError, match=f"{size} bytes or more, but {size - 1} are allowed"),
                Allowance({}, size - 1, "are allowed"),
            ):
                call()
    with torch.device("meta"), Allowance({}, 1, "are allowed"):
        assert torch.empty(10**9).is_meta
    free = free_memory()
    assert free is None or free > 1 << 20


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("audio", {"pretrained": "x"}, r"audio\.pretrained is given, but"),
        ("audio", {"hf_config": {"a": 1}}, r"audio\.hf_config is given, but"),
        ("audio", {"chunks": True}, r"audio\.chunks has no meaning for a tower of kind log-mel"),
        ("audio", {"kind": "cnn14", "pretrained": "x"}, r"audio\.pretrained has no meaning for a tower of kind cnn14"),
        ("text", {"pretrained": "x"}, r"text\.pretrained is given, but"),
        ("text", {"hf_config": {"a": 1}}, r"text\.hf_config is given, but"),
    ],
)
def test_options_of_other_towers(part: str, fields: dict[str, Any], message: str) -> None:
    config = small_config()
    config = replace(config, **{part: replace(getattr(config, part), **fields)})
    with pytest.raises(ConfigError, match=message):
        CLAP(config)


def test_an_earlier_export_with_such_an_option_is_still_read(folder: Path) -> None:
    assert CLAP.from_pretrained(edited(folder, audio__pretrained="somewhere")).config.audio.pretrained is None


# -- properties -------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 10**6, 10**9, 1 << 20, 10**30]), st.floats(), st.booleans())
values = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@PROPERTY
@given(data=st.data())
def test_any_value_in_the_configuration_is_a_model_or_an_error(
    clap_folder: str, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(clap_folder, folder)
    text = (Path(clap_folder) / "config.json").read_text()
    (folder / "config.json").write_text(text)
    config = json.loads(text)
    part = data.draw(st.sampled_from(["", "audio", "text", "head", "audio__zipformer"]))
    inner = config
    for key in filter(None, part.split("__")):
        inner = inner[key]
    name = data.draw(st.sampled_from(sorted(inner)))
    edited(folder, **{f"{part}__{name}" if part else name: data.draw(values)})
    try:
        CLAP.from_pretrained(folder).embed_text(["a calm voice"])
    except ModelError as error:
        assert str(folder) in str(error)


@PROPERTY
@given(data=st.data())
def test_any_bytes_in_a_folder_are_a_model_or_an_error(clap_folder: str, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(clap_folder, folder)
    victim = folder / data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
    whole = victim.read_bytes()
    position = data.draw(st.integers(0, min(len(whole), 4000) - 1))
    change = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"")))
    victim.write_bytes(whole[:position] + change + (whole[position + len(change) :] if change else b""))
    try:
        CLAP.from_pretrained(folder).embed_text(["a calm voice"])
    except ModelError as error:
        assert str(folder) in str(error) or "tokenizer" in str(error)
    finally:
        victim.write_bytes(whole)
