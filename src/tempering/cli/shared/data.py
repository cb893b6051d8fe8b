"""What a command runs a model on: a text, or a folder of images or sound, or a file of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tempering.cli.shared import common
from tempering.errors import InputError

if TYPE_CHECKING:
    from tempering.text_tables import TextTable

Images = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images, instead of a text; NAME.txt beside NAME.png is its caption, a "
        "folder named like a label holds images of it."
    ),
]
Audio = Annotated[
    Path | None,
    typer.Option(help="Folder of sound, instead; NAME.txt beside NAME.wav is its transcript."),
]
Pairs = Annotated[
    Path | None,
    typer.Option(
        help='File of lines {"prompt": ..., "answer": ...}, instead; a line may name an "image" or '
        '"audio" file.'
    ),
]
Stack = Annotated[
    str | None,
    typer.Option(
        help="Temper this part alone: encoder, decoder, cross, or a tower such as vision."
    ),
]


class Source(NamedTuple):
    """Where a command reads what it runs a model on; at most one is given.

    text: the text of the package where nothing is.
    """

    text: Path | None = None
    images: Path | None = None
    audio: Path | None = None
    pairs: Path | None = None

    def check(self) -> None:
        """InputError for more than one of them."""
        named = [f"--{name}" for name, path in self._asdict().items() if path is not None]
        if len(named) > 1:
            raise InputError(f"give one of {' and '.join(named)}, not both")

    @property
    def media(self) -> tuple[str, Path] | None:
        """What it is instead of a text, as `read_inputs` takes it; None for a text."""
        found = {name: path for name, path in self._asdict().items() if path and name != "text"}
        return next(iter(found.items()), None)


class Data(NamedTuple):
    """What a model is run on.

    inputs: token ids [chunks, length], or `Inputs`. name: for the record. text: the words, where
    it is a text. unit: what one of them is called. settings: for the record.
    """

    inputs: Any
    name: str
    text: str | TextTable | None
    unit: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of all that is read, for a journal."""
        from tempering.chunks import chunks_digest

        return self.inputs.digest if self.text is None else chunks_digest(self.inputs)


def read_data(
    source: Source,
    model: Any,
    processor: Any,
    chunk: int,
    limit: int | None,
    *,
    beyond: bool = False,
) -> Data:
    """What a command runs a model on, and the model examined on the like of it.

    Raises InputError for a model that reads something else than what is given.
    """
    import torch

    from tempering.attention.examining.layout_of import layout_reached
    from tempering.attention.examining.stored import input_device
    from tempering.chunks import token_chunks
    from tempering.inputs import read_inputs
    from tempering.inputs.answers import called_on
    from tempering.inputs.example import predicts_next, taken_by

    if source.media is not None:
        kind, path = source.media
        inputs = read_inputs(kind, path, model, processor, limit=limit, say=common.note)
        with torch.no_grad():  # a processor that doesn't fit the model shows here, in one line
            called_on(model, inputs.examples[0], input_device(model))
        layout_reached(model, inputs.sample)
        settings = {kind: path.name, inputs.unit: len(inputs), "own answers": inputs.own}
        return Data(inputs, path.name, None, inputs.unit, settings)
    tokenizer = getattr(processor, "tokenizer", processor)
    if "input_ids" not in taken_by(model) or not hasattr(tokenizer, "vocab_size"):
        raise InputError(
            f"{type(model).__name__} reads no text by itself: give --images, --audio or --pairs "
            f"(it takes {', '.join(taken_by(model)[:3])})"
        )
    towers = getattr(model.config, "sub_configs", {})
    if "vision_config" in towers and not predicts_next(model):
        raise InputError(
            f"{type(model).__name__} reads an image with each text: give --images with captions "
            "beside them, or --pairs"
        )
    words, name = common.source_of(source.text)
    chunks = token_chunks(tokenizer, words, chunk, limit)
    common.check_context(model, chunk, f"--chunk {chunk}", beyond=beyond)
    settings = {"text": name, "chunk": chunk, "chunks": len(chunks)}
    return Data(chunks, name, words, "chunks", settings)
