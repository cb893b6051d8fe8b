"""At which temperature does an engine really run, and which known mistake explains it?

audit(model, prompts)          -> Audit: verdict, temperatures with intervals, hypotheses
ask, read_scores, scored       what an engine said of its prompts
mistake, MistakeCase, KNOWN    the catalogue of known mistakes, and how to add one
"""

from tempering.audit.audit import Audit, Parting, audit
from tempering.audit.candidates import Candidate, TemperatureEstimate
from tempering.audit.mistakes import (
    KNOWN,
    MistakeCase,
    attention_modules,
    attributes,
    cases,
    mistake,
)
from tempering.audit.rounding import PRECISIONS, rounded
from tempering.audit.scores import Scored, read_scores, scored
from tempering.audit.sources import ask

__all__ = [
    "KNOWN",
    "PRECISIONS",
    "Audit",
    "Candidate",
    "MistakeCase",
    "Parting",
    "Scored",
    "TemperatureEstimate",
    "ask",
    "attention_modules",
    "attributes",
    "audit",
    "cases",
    "mistake",
    "read_scores",
    "rounded",
    "scored",
]
