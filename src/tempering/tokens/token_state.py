"""What a policy needs to know of one request, computed from the request's token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tempering.errors import InputError


@dataclass(frozen=True)
class TokenState:
    """The state of one request before its next token is sampled.

    It depends on the token ids alone (prompt and generated), never on how often a policy was
    called. An engine that rewinds, reorders beams or verifies speculated tokens rebuilds the state
    with `policy.state(prompt, generated)`, or keeps one for each history.

    Parameters
    ----------
    position: number of tokens generated so far, which is the index of the next one.
    sample: which of the n samples of a prompt this is.
    phase: the phase that the next token is sampled in; "" for a policy without phases.
    opened: the phases that are open, outermost first.
    spent: (phase, tokens generated in it) for each phase of the policy.
    text: the last bytes of the text, as many as may belong to a delimiter that is not complete.
    ids: the last token ids, as many as may belong to a delimiter of ids that is not complete.
    """

    position: int = 0
    sample: int = 0
    phase: str = ""
    opened: tuple[str, ...] = ()
    spent: tuple[tuple[str, int], ...] = ()
    text: bytes = b""
    ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for a JSON file or a message to another process."""
        return asdict(self) | {"text": self.text.hex()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenState:
        """The state that `to_json` described; InputError when it is not one."""
        try:
            return cls(
                position=int(data["position"]),
                sample=int(data["sample"]),
                phase=str(data["phase"]),
                opened=tuple(map(str, data["opened"])),
                spent=tuple((str(name), int(count)) for name, count in data["spent"]),
                text=bytes.fromhex(data["text"]),
                ids=tuple(map(int, data["ids"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"this is not a token state ({error!r}); give what TokenState.to_json() returned"
            ) from error
