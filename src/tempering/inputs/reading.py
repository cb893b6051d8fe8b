"""A folder of images or of sound, or a file of pairs, as examples for a model.

What is right to answer is read beside the files where it is there: NAME.txt beside NAME.png or
NAME.wav holds a caption or a transcript, and folders named like a classifier's labels hold images
(or sound) of that label. Where it isn't, a model's own answers are taken, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.errors import DataError, InputError
from tempering.inputs import images, sound
from tempering.inputs.answers import on
from tempering.inputs.example import (
    NO_GOAL,
    Example,
    Inputs,
    check_taken,
    predicts_next,
    shifted,
    taken_by,
    without_padding,
)
from tempering.inputs.pairs import read_media_pairs

# What is read -> what one of it is called.
KINDS = {"images": "images", "audio": "clips", "pairs": "pairs"}
# A model's own answer, where no other is given: so many tokens at most.
_ANSWER_TOKENS = 48
_QUESTION = "Describe this in one sentence."


class _Item(NamedTuple):
    """One file, or one line of pairs; answer: a text, or the name of a label."""

    origin: str
    prompt: str = ""
    answer: str | None = None
    label: int | None = None
    image: Path | None = None
    sound: Path | None = None


def read_inputs(
    kind: str,
    path: str | Path,
    model: Any,
    processor: Any,
    *,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Inputs:
    """Examples for `model`, made by its processor.

    Parameters
    ----------
    kind: "images" or "audio", for a folder of files; "pairs", for a file of JSON lines such as
        {"prompt": ..., "answer": ...}, which may name a file each as "image" or "audio".
    processor: of transformers: a processor, an image processor, a feature extractor or a
        tokenizer.
    limit: examples at most, spread evenly over what is there.
    say: told in a line what was changed (sound at another rate), and where answers come from.

    Raises DataError for a file or folder that can't be read, by name; InputError for a model that
    doesn't read this kind, or a processor that doesn't fit it.
    """
    if limit is not None and limit < 1:
        raise InputError(f"at least one example is needed, not {limit}")
    items = _items(kind, Path(path).expanduser(), model, processor)
    if limit is not None and limit < len(items):
        places = torch.linspace(0, len(items) - 1, limit).round().long().tolist()
        items = [items[place] for place in places]
    maker = _Maker(model, processor, say)
    examples = tuple(maker.example(item) for item in items)
    if maker.own:
        say(
            f"note: {maker.own} of {len(items)} {KINDS[kind]} come without the right answer; the "
            "model's own takes its place"
        )
    return Inputs(examples, KINDS[kind], maker.own == len(items))


def _items(kind: str, path: Path, model: Any, processor: Any) -> list[_Item]:
    if kind not in KINDS:
        raise InputError(f"inputs are {', '.join(KINDS)}; not '{kind}'")
    if kind == "pairs":
        tokenizer = getattr(processor, "tokenizer", processor)
        pairs = read_media_pairs(path, tokenizer)
        return [
            _Item(pair.where, pair.prompt, pair.answer, None, pair.image, pair.sound)
            for pair in pairs
        ]
    if kind == "images":
        files = images.files_in(path, images.SUFFIXES, "images")
    else:
        files = images.files_in(path, sound.SUFFIXES, "sound")
    labels = _labels_of(model, path, files)
    return [
        _Item(
            str(file),
            "",
            images.text_beside(file),
            label,
            file if kind == "images" else None,
            file if kind == "audio" else None,
        )
        for file, label in zip(files, labels, strict=True)
    ]


def _labels_of(model: Any, folder: Path, files: Sequence[Path]) -> list[int | None]:
    """The class of each file, by the folder that it lies in; None where no folder is a label."""
    known = {str(name).lower(): int(label) for name, label in _label_names(model).items()}
    parts = [path.relative_to(folder).parts for path in files]
    if not all(len(part) > 1 for part in parts):
        return [None] * len(files)
    found = [known.get(part[0].lower()) for part in parts]
    if any(label is not None for label in found) and None in found:
        wrong = parts[found.index(None)][0]
        raise DataError(
            f"{folder / wrong} is named like no label of the model; its labels are "
            f"{', '.join(list(known)[:8])}{', ...' if len(known) > 8 else ''}"
        )
    return found


def _label_names(model: Any) -> Mapping[str, int]:
    """The labels of a classifier; none for any other model."""
    if "Classification" not in type(model).__name__:
        return {}
    return getattr(model.config, "label2id", None) or {}


class _Maker:
    """Makes examples of items with a processor; own: how many have no answer but the model's."""

    def __init__(self, model: Any, processor: Any, say: Callable[[str], None]) -> None:
        self.model, self.processor, self.say = model, processor, say
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.tokenizer is None and hasattr(processor, "vocab_size"):
            self.tokenizer = processor
        self.takes = taken_by(model)
        self.own = 0

    def example(self, item: _Item) -> Example:
        """The example of one item."""
        if item.image is not None:
            arguments = self._of_image(item, images.read_image(item.image))
        elif item.sound is not None:
            arguments = self._of_sound(item)
        else:
            arguments = self._of_text(item)
        check_taken(self.model, arguments, item.origin)
        self._check_length(item, arguments)
        return self._answered(item, without_padding(arguments)[0])

    def _check_length(self, item: _Item, arguments: dict[str, Tensor]) -> None:
        """DataError for more tokens than the model has positions for."""
        text = self.model.config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        ids = arguments.get("input_ids")
        computed = getattr(text, "rope_parameters", None)  # positions beyond them can be read
        if ids is not None and not computed and isinstance(most, int) and ids.shape[1] > most:
            raise DataError(
                f"{item.origin}: it has {ids.shape[1]} tokens, and {type(self.model).__name__} "
                f"reads at most {most}; shorten the text"
            )

    # -- what the model reads

    def _of_image(self, item: _Item, image: Any) -> dict[str, Tensor]:
        if "pixel_values" not in self.takes:
            raise self._reads_none("images", item)
        if "input_ids" not in self.takes or self.model.config.is_encoder_decoder:
            processor = getattr(self.processor, "image_processor", self.processor)
            return self._processed(processor, item, images=image)
        if not predicts_next(self.model):
            # Two towers: a text belongs to each image.
            if item.answer is None and not item.prompt:
                raise DataError(
                    f"{item.origin}: {type(self.model).__name__} reads an image with a text; write "
                    "its caption into a file of its name that ends in .txt, beside it"
                )
            text = item.answer or item.prompt
            # SigLIP's tokenizer makes no mask: the model was trained on texts of one length.
            masked = "attention_mask" in getattr(self.tokenizer, "model_input_names", ())
            length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            padded = {} if masked else {"padding": "max_length", "max_length": length}
            return self._processed(self.processor, item, images=image, text=text, **padded)
        return self._processed(self.processor, item, images=[image], text=self._asked(item))

    def _of_sound(self, item: _Item) -> dict[str, Tensor]:
        assert item.sound is not None
        name = next((n for n in ("input_features", "input_values") if n in self.takes), None)
        if name is None:
            raise self._reads_none("sound", item)
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        rate = getattr(extractor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise InputError(
                f"a {type(self.processor).__name__} makes nothing of sound; give the model's own "
                "processor: AutoProcessor.from_pretrained(...)"
            )
        samples = sound.read_sound(item.sound, rate, self.say)
        most = getattr(extractor, "n_samples", None)
        if isinstance(most, int) and len(samples) > most:
            raise DataError(
                f"{item.origin}: it lasts {len(samples) / rate:.1f} s, and "
                f"{type(self.model).__name__} hears {most / rate:g} s at once; cut it in parts"
            )
        if "input_ids" in self.takes and predicts_next(self.model):
            return self._processed(
                self.processor, item, audio=[samples], sampling_rate=rate, text=self._asked(item)
            )
        return self._processed(extractor, item, samples, sampling_rate=rate)

    def _of_text(self, item: _Item) -> dict[str, Tensor]:
        if self.tokenizer is None or "input_ids" not in self.takes:
            raise self._reads_none("text", item)
        text = item.prompt
        if predicts_next(self.model):
            return self._decoders_text(item, text + (item.answer or ""))
        return self._processed(self.tokenizer, item, text)

    def _decoders_text(self, item: _Item, text: str) -> dict[str, Tensor]:
        assert self.tokenizer is not None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < 2:
            raise DataError(f"{item.origin}: a prompt and its answer have 2 tokens at least")
        return {"input_ids": torch.tensor([ids])}

    def _asked(self, item: _Item) -> str:
        """The prompt around an image or a sound, and the answer to it."""
        what = "image" if item.image is not None else "audio"
        words = item.prompt or _QUESTION
        if getattr(self.processor, "chat_template", None):
            content = [{"type": what}, {"type": "text", "text": words}]
            asked = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        else:
            mark = getattr(self.processor, f"{what}_token", None) or ""
            asked = words if mark and str(mark) in words else f"{mark}{words}"
        return asked + (item.answer or "")

    def _processed(self, processor: Any, item: _Item, *data: Any, **more: Any) -> dict[str, Tensor]:
        try:
            found = processor(*data, **more, return_tensors="pt")
        except Exception as error:  # processors raise what they please
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{item.origin}: {type(processor).__name__} makes nothing of it "
                f"({reason[:160]}); load the processor from the model's own directory"
            ) from error
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _reads_none(self, what: str, item: _Item) -> InputError:
        return InputError(
            f"{item.origin}: {type(self.model).__name__} reads no {what}: it takes "
            f"{', '.join(self.takes[:4])}; give it what it reads, or another model"
        )

    # -- what it should say of it

    def _answered(self, item: _Item, arguments: dict[str, Tensor]) -> Example:
        known = _label_names(self.model)
        if known:
            label = self._label(item, known)
            self.own += label is None
            goals = None if label is None else torch.tensor([label])
            return Example(arguments, goals, item.origin)
        if self.model.config.is_encoder_decoder and self.model.can_generate():
            return self._spoken(item, arguments)
        if predicts_next(self.model):
            return self._continued(item, arguments)
        if type(self.model).__name__.endswith("ForCTC") and item.answer is not None:
            raise InputError(
                f"{type(self.model).__name__} aligns its answers itself (CTC), which has no loss "
                "for each position; leave the transcripts out, or give a Python objective"
            )
        # A model with a head has answers; one without gives features, of which none is right.
        self.own += "For" in type(self.model).__name__
        return Example(arguments, None, item.origin)

    def _label(self, item: _Item, known: Mapping[str, int]) -> int | None:
        if item.label is not None or item.answer is None:
            return item.label
        by_name = {str(name).lower(): int(label) for name, label in known.items()}
        answer = item.answer.strip()
        if answer.lower() in by_name:
            return by_name[answer.lower()]
        if answer.isdigit() and int(answer) in by_name.values():
            return int(answer)
        raise DataError(
            f"{item.origin}: {answer[:40]!r} is no label of the model; its labels are "
            f"{', '.join(list(by_name)[:8])}{', ...' if len(by_name) > 8 else ''}"
        )

    def _spoken(self, item: _Item, arguments: dict[str, Tensor]) -> Example:
        """An encoder-decoder's answer: what its decoder is to say."""
        if self.tokenizer is None:
            raise InputError(
                f"{item.origin}: a {type(self.processor).__name__} has no tokenizer for the "
                "answer; give the model's own processor: AutoProcessor.from_pretrained(...)"
            )
        answer = item.answer
        if answer is None:
            self.own += 1
            made = self._generated(arguments)[0]
            answer = self.tokenizer.decode(made, skip_special_tokens=True)
        goals = torch.tensor(self.tokenizer(text_target=answer, verbose=False).input_ids).long()
        if len(goals) and int(goals[0]) == int(shifted(self.model, goals)[0, 0]):
            goals = goals[1:]
        if len(goals) == 0:
            raise DataError(f"{item.origin}: the answer has no tokens of its own")
        read = {**arguments, "decoder_input_ids": shifted(self.model, goals)}
        return Example(read, self._said(goals), item.origin)

    def _said(self, goals: Tensor) -> Tensor:
        """The goals, without special tokens before the first word, which are part of the prompt."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()) or ())
        first = next((i for i, token in enumerate(goals.tolist()) if token not in special), 0)
        return goals.clone().index_fill_(0, torch.arange(first), NO_GOAL)

    def _continued(self, item: _Item, arguments: dict[str, Tensor]) -> Example:
        """A decoder's answer: what comes after the prompt, images and sound included."""
        if item.answer is None:
            self.own += 1
            asked = arguments["input_ids"].shape[1]
            whole = self._generated(arguments)
            if whole.shape[1] <= asked:
                raise DataError(f"{item.origin}: the model answers nothing; give an answer")
            arguments = self._longer(arguments, whole)
            start = asked
        else:
            alone = self._prompt_length(item, arguments)
            start = min(max(alone, 1), arguments["input_ids"].shape[1] - 1)
        ids = arguments["input_ids"][0]
        goals = ids[1:].clone()
        goals[: start - 1] = NO_GOAL
        return Example(arguments, goals, item.origin)

    def _prompt_length(self, item: _Item, arguments: dict[str, Tensor]) -> int:
        """How many tokens belong to the prompt; one that spans its end belongs to the answer."""
        bare = item._replace(answer=None)
        if item.image is not None:
            alone = self._of_image(bare, images.read_image(item.image))["input_ids"][0]
        elif item.sound is not None:
            alone = self._of_sound(bare)["input_ids"][0]
        else:
            ids = self.tokenizer(item.prompt, add_special_tokens=False, verbose=False).input_ids  # type: ignore[misc]
            alone = torch.tensor(ids, dtype=torch.long)
        both = arguments["input_ids"][0]
        length = min(len(alone), len(both))
        differ = (alone[:length] != both[:length]).nonzero()
        return int(differ[0]) if len(differ) else length

    def _generated(self, arguments: dict[str, Tensor]) -> Tensor:
        """What the model answers by itself: the likeliest token at each step."""
        from transformers.utils import logging

        device = next(self.model.parameters()).device
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # `generate` warns of settings that models bring along
        try:
            with torch.no_grad():
                made = self.model.generate(
                    **on(self.model, arguments, device),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=_ANSWER_TOKENS,
                )
        finally:
            logging.set_verbosity(level)
        return made.cpu()

    def _longer(self, arguments: dict[str, Tensor], whole: Tensor) -> dict[str, Tensor]:
        """The arguments of a decoder with its own answer behind its prompt."""
        more = whole.shape[1] - arguments["input_ids"].shape[1]
        longer = {**arguments, "input_ids": whole}
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in arguments:
                end = arguments[name][:, -1:].expand(-1, more)
                longer[name] = torch.cat([arguments[name], end], dim=1)
        return longer
