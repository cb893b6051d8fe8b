"""Which class of transformers reads a directory, and the processor that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.errors import ModelError

_IMAGES_OR_SOUND = ("preprocessor_config.json", "processor_config.json")


def writes_text(config: Any) -> bool:
    """Whether a model of this configuration is to be loaded as a causal language model.

    Not where its files say that it was saved as another, such as a classifier.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    named = getattr(config, "architectures", None) or []
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = known if isinstance(known, tuple | list) else (known,)
    causal = {item.__name__ for item in classes}
    # A body saved without its head is loaded with one, and refused for the weights that lack.
    return not named or bool(causal.intersection(named)) or named[0].endswith("Model")


def model_class(config: Any, name: str) -> Any:
    """The class that a model was saved as, by its configuration; ModelError where it names none."""
    import transformers

    for architecture in getattr(config, "architectures", None) or []:
        found = getattr(transformers, architecture, None)
        if found is not None and isinstance(config, found.config_class):
            return found
        if found is not None:
            raise ModelError(
                f"the model {name!r} is of the type {config.model_type!r} by its config.json, "
                f"which names the class {architecture} of another type; fetch or save it again"
            )
    if type(config) in transformers.MODEL_MAPPING:
        return transformers.AutoModel
    raise ModelError(
        f"the model {name!r} is of the type {config.model_type!r}, and its config.json names no "
        "class of transformers under 'architectures'; save it anew with save_pretrained"
    )


def processor_for(place: str, name: str) -> Any:
    """What makes the inputs of a model that is no plain language model, from its own files.

    None where the files hold nothing of the kind.
    """
    from transformers import AutoProcessor, AutoTokenizer

    files = {path.name for path in Path(place).iterdir()} if Path(place).is_dir() else None
    media = files is None or files.intersection(_IMAGES_OR_SOUND)
    words = files is None or any("token" in item or item.startswith("vocab") for item in files)
    try:
        if media:
            return AutoProcessor.from_pretrained(place, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False) if words else None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"can't load the processor of the model {name!r}: {reason}; the files that "
            "processor.save_pretrained writes belong beside the weights"
        ) from error
