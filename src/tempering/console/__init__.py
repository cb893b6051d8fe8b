"""A page on which temperature is a thing under one's hand: paint a head, and the next word changes.

    tempering console --model smollm2           the page, in a browser
    tempering.console.widget(model, tokenizer)  its matrix, in a notebook

The server holds the model and nothing else: what is painted, written and chosen lives in the page
and in its address.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
