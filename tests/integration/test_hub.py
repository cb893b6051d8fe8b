"""load_model on directories and hub ids: what works, and one clear line for what doesn't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tempering.engines.loading.hub import MODELS, load_model
from tempering.errors import InputError, ModelError, TemperingWarning


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of random weights in three shards, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    ).save_pretrained(directory, max_shard_size="32KB")
    words = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "hot": 2, "cold": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def settings(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_loads_a_directory_as_it_was_saved(tiny: Path) -> None:
    from safetensors.torch import load_file

    model, tokenizer = load_model(tiny)
    stored = {k: v for shard in tiny.glob("*.safetensors") for k, v in load_file(shard).items()}
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert not model.training
    assert tokenizer("hot cold").input_ids == [2, 3]


def test_pads_on_the_left_with_the_end_token_when_there_is_no_padding_token(tiny: Path) -> None:
    model, tokenizer = load_model(str(tiny))
    assert tokenizer(["hot", "hot cold"], padding=True).input_ids == [[0, 2], [2, 3]]
    assert model.generation_config.pad_token_id == 0


def test_dtype_and_attention_are_as_asked(tiny: Path) -> None:
    model, _ = load_model(tiny, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def unlink(pattern: str) -> Callable[[Path], None]:
    return lambda directory: [path.unlink() for path in directory.glob(pattern)] and None


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


FIRST = "model-00001-of-*.safetensors"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (unlink("*"), "has no config.json"),
        (unlink("config.json"), "has no config.json"),
        (write("config.json", b'{"model_type": "llama",}'), r"config.json is not JSON.*column 24"),
        (write("config.json", b'{"a": "\xff"}'), "config.json is not JSON: it is not UTF-8"),
        (write("config.json", b"[]"), "config.json holds list where an object is expected"),
        (lambda d: settings(d, model_type=None), "names no model_type"),
        (lambda d: settings(d, model_type="flubber"), "model type `flubber`"),
        (lambda d: settings(d, model_type="t5"), r"type 't5' by its config.json.*LlamaForCausalLM"),
        (lambda d: settings(d, hidden_size="many"), "hidden_size.*expected int"),
        (
            lambda d: settings(d, model_type="zmod", auto_map={"AutoConfig": "z.Config"}),
            "code of its own, which is not run",
        ),
        (lambda d: settings(d, num_hidden_layers=3), r"lack 9 of its weights.*model\.layers\.2"),
        (lambda d: settings(d, vocab_size=65), r"the file holds \(64, 32\).*asks for \(65, 32\)"),
        (unlink(FIRST), "lacks 1 of its . weight files, the first being model-00001"),
        (unlink("model*"), "has a config.json and no weights"),
        (write("model.safetensors.index.json", b"{"), "index.json is not JSON"),
        (write("model.safetensors.index.json", b"{}"), "has no weight_map"),
        (
            lambda d: next(d.glob(FIRST)).write_bytes(next(d.glob(FIRST)).read_bytes()[:900]),
            "can't load the model.*not fully covered",
        ),
        (write("generation_config.json", b"{"), "generation_config.json is not JSON"),
        (unlink("token*"), r"can't load the tokenizer.*\(tokenizer.json"),
        (write("tokenizer.json", b"{"), r"can't load the tokenizer.*\(tokenizer.json"),
    ],
)
def test_a_spoilt_directory_is_one_clear_line(
    copy: Path, spoil: Callable[[Path], object], match: str
) -> None:
    spoil(copy)
    with pytest.raises(ModelError, match=match) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_weights_without_a_place_are_a_warning(copy: Path) -> None:
    settings(copy, num_hidden_layers=1)
    with pytest.warns(TemperingWarning, match=r"9 weights.*left out.*model\.layers\.1"):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("smolm2", "no model 'smolm2'.*offline.*did you mean 'smollm2'"),
        ("nobody/nothing", "not in the hub cache.*offline.*embedded models: smollm2"),
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("two words", "no such directory"),
        ("", "no model ''"),
        ("a--b..c", "can't fetch the hub model.*Cannot have -- or .."),
    ],
)
def test_an_unknown_name_says_where_it_was_looked_for(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_model(name)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("GatedRepoError", "is gated: accept its terms"),
        ("RepositoryNotFoundError", "no such model on the hub"),
        ("RemoteEntryNotFoundError", "has no config.json"),
    ],
)
def test_the_hubs_refusals_are_told_apart(
    kind: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx
    import huggingface_hub

    def refuse(*_: object) -> None:
        response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
        raise getattr(huggingface_hub.errors, kind)("refused", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=match):
        load_model("somebody/something")


def test_a_file_is_not_a_model(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is a file; name the directory"):
        load_model(tiny / "config.json")


def test_a_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="device 'toaster' can't be used here"):
        load_model("nobody/nothing", device="toaster")


def test_an_unknown_attention_implementation_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match='attn_implementation="bogus"` is not supported'):
        load_model(tiny, attn_implementation="bogus")


def test_embedded_models_say_where_they_come_from() -> None:
    for name, model in MODELS.items():
        assert model.name == name
        assert all((model.description, model.source, model.licence, model.version))


def test_transformers_settings_are_left_as_they_were(tiny: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        load_model(tiny)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_a_hub_id_in_the_cache_loads_offline_and_in_silence(tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(tiny, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    script = (
        "from tempering.engines.loading.hub import load_model\n"
        "print(load_model('somebody/tiny')[0].config.num_hidden_layers)\n"
        "import sys; load_model(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script, str(tiny)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2\n"
    assert [
        line for line in done.stderr.splitlines() if line and "Loading weights" not in line
    ] == []
