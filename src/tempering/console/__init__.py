"""A page on which temperature is a thing under one's hand: paint a head, and the next word changes.

    tempering console --model smollm2

The server holds the model and nothing else: what is painted, written and chosen lives in the page
and in its address.
"""
