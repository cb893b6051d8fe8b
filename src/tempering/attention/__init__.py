"""Scale 2, heads and layers of a pretrained model: profile, control, measure.

layout(model)                     which layers have a softmax, and how many heads
Profile                           T[layer, head], relative to the model's own temperature
tempered(model, profile)          a handle and context manager
measure(model, tokenizer, text)   support, entropy, peak, sink share of every head
profile_for_support(...)          temperatures under which support follows a pattern
adaptive_profile(rule, model)     temperatures that depend on the query
resolution_profile(model, inputs) temperatures for images of another size
recorded_call(model)              inputs of a model, kept while a pipeline runs it
pipeline_callback(handle, s)      temperatures that follow the steps of a diffusers pipeline
"""

from tempering.attention.control.handle import Tempering
from tempering.attention.control.steps import pipeline_callback
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.recorded import recorded_call
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.measuring.measure import measure, measure_tokens
from tempering.attention.measuring.measurement import Measurement
from tempering.attention.measuring.targets import SupportProfile, profile_for_support
from tempering.attention.profiles.adaptive import adaptive_profile, resolution_profile
from tempering.attention.profiles.fingerprint import fingerprint
from tempering.attention.profiles.profile import Profile

__all__ = [
    "AttentionLayer",
    "Layout",
    "Measurement",
    "Profile",
    "SupportProfile",
    "Tempering",
    "adaptive_profile",
    "fingerprint",
    "layout",
    "measure",
    "measure_tokens",
    "pipeline_callback",
    "profile_for_support",
    "recorded_call",
    "resolution_profile",
    "tempered",
]
