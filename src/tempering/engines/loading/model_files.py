"""What a directory in transformers' format must hold, checked before transformers sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.errors import DataError, ModelError
from tempering.files import read_json

_INDEX = "model.safetensors.index.json"
_SETTINGS = ("generation_config.json", "tokenizer_config.json")
_ADAPTER = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_directory(path: Path) -> None:
    """Raise ModelError unless `path` holds readable settings and every weight file it names."""
    if not path.is_dir():
        raise ModelError(
            f"{path} is a file; name the directory that holds config.json and the weights"
        )
    config = path / "config.json"
    if not config.is_file() and (path / _ADAPTER).is_file():
        raise ModelError(_adapter(path))
    if not config.is_file():
        raise ModelError(
            f"{path} has no config.json, so it is not a model in transformers' format; "
            "name a directory that save_pretrained wrote"
        )
    if not isinstance(_read_json(config).get("model_type"), str):
        raise ModelError(f"{config} names no model_type, so the architecture is unknown")
    for name in _SETTINGS:
        # transformers would go on without a file that it can't parse.
        if (path / name).is_file():
            _read_json(path / name)
    index = path / _INDEX
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} has no weight_map; fetch or save the model again")
        absent = sorted({name for name in shards.values() if not (path / name).is_file()})
        if absent:
            raise ModelError(
                f"{path} lacks {len(absent)} of its {len(set(shards.values()))} weight files, "
                f"the first being {absent[0]}; fetch or save the model again"
            )
    elif not any((path / name).is_file() for name in _WEIGHTS):
        raise ModelError(
            f"{path} has a config.json and no weights; expected model.safetensors "
            "(or its shards with an index)"
        )


def _adapter(path: Path) -> str:
    """How to make a model of an adapter of peft's and the model that it was trained on."""
    base = _read_json(path / _ADAPTER).get("base_model_name_or_path") or "the model it was made for"
    merged = path.with_name(f"{path.name}-merged")
    return (
        f"{path} holds an adapter, which is no model without {base}; put the two together once, in "
        "Python with peft: "
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload(); "
        f"model.save_pretrained({str(merged)!r}); "
        f"AutoTokenizer.from_pretrained({str(base)!r}).save_pretrained({str(merged)!r}); "
        f"then give --model {merged}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path.read_bytes(), str(path))
    except DataError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__} where an object is expected")
    return content
