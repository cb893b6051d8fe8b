"""The text that each token adds, as bytes; delimiters are matched on them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


# Set before and after a tag in the text that `phase_tracker` matches on. UTF-8 never has this byte,
# and it is replaced in the bytes of tokens.
TAG = b"\xff"


class TokenBytes:
    """Token id -> the bytes that it adds to the text, for any tokenizer of transformers' interface.

    Bytes, not characters, because a character may be split over tokens. Byte-level BPE and
    SentencePiece-like vocabularies are read exactly, mistral-common's too. A token of any other is
    decoded after a plain one, which is exact except for tokens that hold part of a character.

    tags: text -> id of each added token that is written like a tag (`<think>`, `[INST]`). The model
    writes such a tag as this one token, and no other tokens count as it.
    special: ids of the added tokens that the tokenizer calls special.
    mistral: whether the tokenizer is mistral-common's, which renders chats in another way.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[int, bytes] = {}
        self._mistral = _mistral(tokenizer)
        added, self.special = _added(tokenizer)
        self._added = {token: text.encode() for token, text in added.items()}
        self.tags = {text: token for token, text in added.items() if _like_tag(text)}
        self.mistral = self._mistral is not None
        self._style = _style(tokenizer)
        self.size = len(tokenizer)

    def __call__(self, token: int) -> bytes:
        added = self._cache.get(token)
        if added is None:
            added = self._cache[token] = self._read(token).replace(TAG, b"\xfe")
        return added

    def join(self, tokens: Sequence[int]) -> bytes:
        """The text of several tokens."""
        return b"".join(map(self, tokens))

    def has_token(self, text: str) -> bool:
        """Whether the vocabulary has this text as one token."""
        if text in self.tags:
            return True
        if self._mistral is not None:  # its tokens are its tags, and bytes
            return False
        token = self.tokenizer.convert_tokens_to_ids(text)
        return token is not None and self.tokenizer.convert_ids_to_tokens(token) == text

    def tags_in(self, text: str) -> list[str]:
        """The tags in a text, in order; of two at one place the longer, as tokenizers split."""
        present = sorted((tag for tag in self.tags if tag in text), key=len, reverse=True)
        return re.findall("|".join(map(re.escape, present)), text) if present else []

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        if not 0 <= token < self.size:
            return b""  # placeholders of images and the like; padding of the vocabulary
        if self._style == "other":
            return self._decoded(token)
        if self._mistral is not None:
            if hasattr(self._mistral, "id_to_byte_piece"):
                return bytes(self._mistral.id_to_byte_piece(token))
            name = self._mistral.id_to_piece(token)
        else:
            name = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if self._style == "byte level":
            table = _byte_level()
            return b"".join(bytes([table[c]]) if c in table else c.encode() for c in name)
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match.group(1), 16)])
        return name.replace("\u2581", " ").encode()

    def _decoded(self, token: int) -> bytes:
        # After another token, because many decoders drop the space of a first token.
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1]
        alone, together = (
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            for ids in ([anchor], [anchor, token])
        )
        return together.removeprefix(alone).encode()


def _added(tokenizer: Any) -> tuple[dict[int, str], frozenset[int]]:
    """Id -> text of the tokens added to the vocabulary, and the ids of those that are special."""
    try:
        tokens = dict(tokenizer.added_tokens_decoder)
    except (AttributeError, NotImplementedError, TypeError):  # mistral-common's has none
        ids = getattr(tokenizer, "all_special_ids", ())
        named = dict(zip(ids, getattr(tokenizer, "all_special_tokens", ())))
        return named, frozenset(named)
    special = (int(token) for token, text in tokens.items() if getattr(text, "special", True))
    texts = {int(token): str(getattr(text, "content", text)) for token, text in tokens.items()}
    return texts, frozenset(special)


def _like_tag(text: str) -> bool:
    """Whether a token is written like a tag: a word between signs, without spaces."""
    return (
        len(text) > 2
        and not (text[0].isalnum() or text[-1].isalnum())
        and any(c.isalnum() for c in text)
        and not any(c.isspace() for c in text)
    )


def _mistral(tokenizer: Any) -> Any:
    """mistral-common's tokenizer in vLLM's or transformers' wrapper of it; None for any other."""
    inner = getattr(tokenizer, "tokenizer", None)
    inner = getattr(getattr(inner, "instruct_tokenizer", None), "tokenizer", inner)
    return inner if hasattr(inner, "id_to_piece") else None


_BY_TOKENIZER: WeakKeyDictionary[Any, TokenBytes] = WeakKeyDictionary()


def token_bytes_of(tokenizer: Any) -> TokenBytes:
    """The `TokenBytes` of a tokenizer, kept as long as it lives; a chat template changes none."""
    tokenizer = getattr(tokenizer, "untemplated", tokenizer)
    if tokenizer not in _BY_TOKENIZER:
        _BY_TOKENIZER[tokenizer] = TokenBytes(tokenizer)
    return _BY_TOKENIZER[tokenizer]


def _style(tokenizer: Any) -> str:
    """How the vocabulary writes text, by the decoder that the tokenizers library runs."""
    if _mistral(tokenizer) is not None:
        return "metaspace"
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return "other"
    kinds = set(re.findall(r'"type":\s*"(\w+)"', decoder.__getstate__().decode()))
    if "ByteLevel" in kinds:
        return "byte level"
    settings = json.loads(decoder.__getstate__())
    parts = settings.get("decoders", [settings])
    spaced = any(
        part["type"] == "Metaspace" or part.get("pattern", {}).get("String") == "\u2581"
        for part in parts
    )
    return "metaspace" if spaced and kinds <= _METASPACE else "other"


_METASPACE = {"Sequence", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


@cache
def _byte_level() -> dict[str, int]:
    """Character -> byte in byte-level BPE: printable Latin-1 is itself, other bytes begin at 256.

    Source: GPT-2's encoder (Radford et al. 2019), as every byte-level vocabulary since.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
