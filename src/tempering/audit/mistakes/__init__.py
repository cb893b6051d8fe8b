"""Known mistakes of engines, each a change to the reference; `cases(model)` lists what applies.

A mistake is a function that takes the model and yields cases; a case names what the engine does
and makes a context manager that does it to the reference:

    @mistake
    def bias_missing(model):
        queries = [m.q_proj for m in attention_modules(model)]
        if all(m.bias is not None for m in queries):
            yield MistakeCase("its query biases were missing", attributes(queries, bias=None))
"""

from tempering.audit.mistakes import masks, norms, outputs, rotary, scale, tokens
from tempering.audit.mistakes.base import (
    KNOWN,
    Mistake,
    MistakeCase,
    attention_modules,
    attributes,
    cases,
    mistake,
)

__all__ = ["KNOWN", "Mistake", "MistakeCase", "attention_modules", "attributes", "cases", "mistake"]

_FAMILIES = (scale, rotary, masks, norms, outputs, tokens)  # imported for what they register
