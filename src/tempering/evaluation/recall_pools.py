"""Wordings of facts and questions for recall, and pools of keys and values."""

from __future__ import annotations

import random
from collections.abc import Callable

# (name, how a fact is stated, how it is asked; the answer follows the question at once).
WORDINGS: tuple[tuple[str, str, str], ...] = (
    ("secret code", "The secret code for {k} is {v}.", "The secret code for {k} is"),
    ("password", "Remember: the password of {k} is {v}.", "The password of {k} is"),
    ("question", "{k} was given the number {v}.", "Q: Which number was {k} given?\nA:"),
    ("colon", "{k}: {v}", "{k}:"),
    ("arrow", "{k} -> {v}", "{k} ->"),
    ("equals", "{k} = {v}", "{k} ="),
    ("locker", "In the locker of {k} lies {v}.", "In the locker of {k} lies"),
    ("favourite", "The favourite of {k} was always {v}.", "The favourite of {k} was always"),
    ("belongs", "Item {v} belongs to {k}.", "The item that belongs to {k} is item"),
    ("json", '{{"name": "{k}", "value": "{v}"}}', '{{"name": "{k}", "value": "'),
    ("table", "| {k} | {v} |", "| {k} |"),
    ("assigned", "We assigned {v} to {k} yesterday.", "Yesterday, {k} was assigned"),
    ("told", '"My answer is {v}," said {k}.', 'What {k} said was: "My answer is'),
    ("record", "Record of {k}; entry {v}.", "Record of {k}; entry"),
    ("keeper", "The keeper of {v} is called {k}.", "The one called {k} is the keeper of"),
    ("letter", "A letter for {k} carried the mark {v}.", "The letter for {k} carried the mark"),
    ("label", "Label {v} was put on {k}.", "The label that was put on {k} is"),
    ("phone", "You can reach {k} under {v}.", "You can reach {k} under"),
    ("badge", "{k} wears the badge {v}.", "Question: What badge does {k} wear? Answer:"),
    ("python", 'codes["{k}"] = "{v}"', 'print(codes["{k}"])  # '),
    ("note", "Note to self - {k} goes with {v}.", "Note to self - {k} goes with"),
    ("bracket", "[{k}] {v}", "[{k}]"),
    ("room", "{k} stays in room {v}.", "The room in which {k} stays is"),
    ("prize", "The prize won by {k} was {v}.", "The prize won by {k} was"),
    ("ticket", "{k} holds ticket {v} for tonight.", "For tonight, {k} holds ticket"),
    ("list", "- {k} ({v})", "- {k} ("),
    ("order", "Order {v} was placed by {k}.", "The order placed by {k} was order"),
    ("recall", "Keep in mind that {k} means {v}.", "As noted before, {k} means"),
    ("xml", "<{k}>{v}</{k}>", "<{k}>"),
    ("shelf", "{k} can be found on shelf {v}.", "Where can {k} be found? On shelf"),
    ("agent", "Agent {k} has the alias {v}.", "The alias of agent {k} is"),
    ("csv", "{k},{v}", "{k},"),
    ("score", "The score of {k} came to {v}.", "The score of {k} came to"),
    ("chosen", "For {k} they chose {v}.", "What they chose for {k} is"),
    ("capital", "The code word of {k} is {v}, as everyone knows.", "The code word of {k} is"),
    (
        "parcel",
        "A parcel with the mark {v} was left for {k}.",
        "The mark on the parcel for {k} was",
    ),
    ("hash", "# {k}\n{v}", "# {k}\n"),
    ("semicolon", "{k}; {v}", "{k};"),
    ("means", "{k} means {v}.", "{k} means"),
    ("yaml", "{k}:\n  value: {v}", "{k}:\n  value:"),
    ("said", "{k} said: {v}.", "{k} said:"),
    ("interview", "Asked for a number, {k} replied {v}.", "When asked, {k} replied"),
    ("drawer", "{v} is what {k} keeps in the drawer.", "In the drawer, {k} keeps"),
    ("url", "https://example.org/{k}?id={v}", "https://example.org/{k}?id="),
    ("line", "Line: {k} / {v}", "Line: {k} /"),
    (
        "seat",
        "The seat of {k} is number {v}.",
        "Q: What is the seat of {k}?\nA: The seat of {k} is number",
    ),
    (
        "chat",
        "User: what do you have for {k}?\nAssistant: {v}",
        "User: what do you have for {k}?\nAssistant:",
    ),
    ("memo", "MEMO. For {k} use {v}. END", "MEMO. For {k} use"),
    ("known", "{k}, also known as {v}, arrived.", "{k}, also known as"),
    ("paid", "{k} paid {v} for it.", "For it {k} paid"),
)

NAMES = tuple(
    "Alder Basil Cedric Dorian Edith Flora Gideon Hester Ivor Jonas Kestrel Lydia Magnus Nadia "
    "Orson Petra Quentin Rowena Silas Tamsin Ursula Vernon Wilma Xavier Yvette Zelda Amber Boris "
    "Clara Desmond Elsa Felix Greta Hugo Irene Jasper Klaus Leona Mabel Nestor".split()
)
THINGS = tuple(
    f"the {colour} {thing}"
    for colour in "red blue green black white golden silver brown".split()
    for thing in "door box lamp boat tower garden bridge engine".split()
)
WORDS = tuple(
    "copper velvet harbor lantern meadow orchid pepper quartz ribbon saffron thunder umbrella "
    "violet walnut yonder zephyr almond bamboo cactus dolphin emerald falcon ginger hazel indigo "
    "jasmine kettle lemon marble nectar olive parrot rocket silver tulip vanilla willow anchor "
    "butter candle desert feather hammer island jungle ladder mirror needle ocean pencil".split()
)


PLACES = tuple(
    "Bristol Cairo Delft Essen Fargo Genoa Hanoi Izmir Jaipur Kyoto Lagos Milan Naples Oslo Perth "
    "Quito Riga Seoul Tunis Utrecht Vienna Warsaw Xian York Zagreb Austin Boston Chester Dover "
    "Exeter Florence Geneva Havana".split()
)
_SURNAMES = (
    "Smith Jones Brown Taylor Wilson Davies Evans Thomas Roberts Walker Wright Hughes Green Hall "
    "Wood Harris Clarke Turner Hill Cooper Ward King Baker Young Allen Parker Cook Price Bennett "
    "Shaw".split()
)
PEOPLE = tuple(
    f"{title} {surname}" for surname in _SURNAMES for title in ("Mr", "Mrs", "Dr", "Captain")
)
PROJECTS = tuple(
    f"project {word}"
    for word in "alpha beta gamma delta epsilon zeta theta kappa lambda sigma omega orion vega "
    "lyra draco nova comet atlas titan apollo hermes juno ceres pluto".split()
)
CODES = tuple(f"{a}{b}{n}" for a in "ABCDEFGH" for b in "KLMNP" for n in (3, 7, 12))
_MONTHS = (
    "January February March April May June July August September October November December".split()
)

KEYS: dict[str, tuple[str, ...]] = {
    "names": NAMES,
    "things": THINGS,
    "places": PLACES,
    "people": PEOPLE,
    "projects": PROJECTS,
    "ids": CODES,
}


def _digits(rng: random.Random) -> str:
    return str(rng.randint(1000, 9999))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _two_words(rng: random.Random) -> str:
    return f"{rng.choice(WORDS)} {rng.choice(WORDS)}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPQRSTUVWXYZ") for _ in range(2))
    return f"{letters}-{rng.randint(100, 999)}"


def _price(rng: random.Random) -> str:
    return f"${rng.randint(2, 99)}.{rng.randint(10, 99)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}"


def _person(rng: random.Random) -> str:
    return rng.choice(PEOPLE)


def _hexadecimal(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789abcdef") for _ in range(5))


def _two_digits(rng: random.Random) -> str:
    return str(rng.randint(10, 99))


VALUES: dict[str, Callable[[random.Random], str]] = {
    "digits": _digits,
    "word": _word,
    "two words": _two_words,
    "code": _code,
    "price": _price,
    "date": _date,
    "person": _person,
    "hex": _hexadecimal,
    "two digits": _two_digits,
}
