"""What a model is run on, for every command alike: text, images, sound, and pairs of them.

as_inputs(given, model)               token ids, or what a processor gives, as examples
read_inputs(kind, path, ...)          a folder of images or sound, or a file of pairs, as examples
answers(model, example)               what the model says of an example: logits, or features
"""

from tempering.inputs.answers import Answers, answers
from tempering.inputs.example import NO_GOAL, Example, Inputs, as_inputs
from tempering.inputs.reading import KINDS, read_inputs

__all__ = [
    "KINDS",
    "NO_GOAL",
    "Answers",
    "Example",
    "Inputs",
    "answers",
    "as_inputs",
    "read_inputs",
]
