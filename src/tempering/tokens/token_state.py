"""What a policy needs to know of one request, computed from the request's token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tempering.errors import InputError
from tempering.tokens.settings import RequestSettings

NOTHING_GIVEN = RequestSettings()


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
    given: the request's own settings, which hold where a policy that truncates states none.
    written: how often a marker was written, for `after`.
    inner: the states of the policies that a policy is made of, where they follow the tokens by
        themselves.
    """

    position: int = 0
    sample: int = 0
    phase: str = ""
    opened: tuple[str, ...] = ()
    spent: tuple[tuple[str, int], ...] = ()
    text: bytes = b""
    ids: tuple[int, ...] = ()
    given: RequestSettings = NOTHING_GIVEN
    written: int = 0
    inner: tuple[TokenState, ...] = ()

    def within(self, *others: TokenState, ids: tuple[int, ...] = ()) -> TokenState:
        """The state of a policy around this one's, which counts the same tokens."""
        return TokenState(
            self.position, self.sample, self.phase, ids=ids, given=self.given, inner=(self, *others)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for a JSON file or a message to another process."""
        inner = [state.to_json() for state in self.inner]
        return asdict(replace(self, inner=())) | {"text": self.text.hex(), "inner": inner}

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
                given=RequestSettings(**data["given"]),
                written=int(data["written"]),
                inner=tuple(map(cls.from_json, data["inner"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"this is not a token state ({error!r}); give what TokenState.to_json() returned"
            ) from error
