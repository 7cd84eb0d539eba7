"""Sentences of everyday words, as many as are asked for and no two alike."""

from __future__ import annotations

import numpy as np

# Words of each part of speech, chosen so that all phones of English occur.
_WORDS = {
    "person": """
        mother father sister brother uncle teacher doctor farmer baker painter singer driver judge
        lawyer writer nurse captain soldier butcher gardener plumber cousin neighbour stranger
        student child girl boy queen king prince thief guard clerk chef pilot sailor tailor dentist
        hunter fisherman musician engineer shepherd witness youth journalist beggar princess widow
    """,
    "animal": """
        dog cat horse sheep goose duck fox wolf bear mouse rabbit frog owl eagle pigeon donkey goat
        pony cow pig hen whale seal shark turtle lizard spider beetle hedgehog squirrel badger otter
        sparrow robin swan deer lion tiger zebra giraffe monkey camel
    """,
    "thing": """
        book chair table lamp bottle cup spoon knife plate basket hammer ladder rope bucket candle
        mirror pillow blanket carpet curtain clock watch ring necklace coin purse wallet umbrella
        jacket shoe boot glove hat shirt scarf button needle thread pencil letter envelope stamp
        parcel picture guitar violin drum trumpet whistle kettle toaster oven shovel wheel engine
        camera telephone radio key lock box jug jar bowl brush broom towel soap toy kite balloon
        treasure anchor compass map flag axe barrel cage
    """,
    "food": """
        bread butter cheese honey jam sugar salt pepper soup stew pie cake pudding chocolate biscuit
        apple orange pear cherry plum peach grape lemon melon banana onion carrot cabbage potato
        tomato mushroom garlic rice noodles porridge yoghurt milk coffee tea juice vinegar mustard
        sausage ham bacon fish chicken egg toast salad
    """,
    "place": """
        kitchen garden market station harbour bridge church castle tower village city forest river
        valley mountain island beach desert field farm barn stable school library hospital museum
        theatre office factory garage cellar attic hallway bathroom bedroom playground park square
        street corner lighthouse mill quarry airport college shop bakery prison palace orchard
        meadow jungle lagoon
    """,
    "adjective": """
        old young small huge tiny heavy light dark bright cold warm hot wet dry clean dirty quiet
        loud sharp smooth rough round square thick thin narrow wide strange ordinary precious cheap
        broken empty full fresh rotten sweet sour bitter lovely ugly clever foolish brave shy angry
        cheerful gentle curious lazy hungry thirsty tired famous modern ancient yellow purple green
        blue red grey brown silver golden wooden striped
    """,
    "saw": """
        watched found lost carried painted cleaned noticed touched bought sold borrowed stole hid
        dropped broke repaired measured photographed examined pushed pulled lifted threw caught
        kicked shook covered opened moved drew described remembered forgot wanted needed loved hated
        admired chose brought took fetched washed counted weighed
    """,
    "went": """
        walked ran hurried travelled wandered marched jumped crawled rode sailed drove cycled danced
        limped stumbled rushed returned escaped crept strolled climbed
    """,
    "did": """
        laughed cried slept sneezed coughed smiled shouted whispered sang yawned waited listened
        argued vanished complained apologised trembled nodded sighed giggled prayed
    """,
    "when": """
        yesterday today tonight again early late slowly quickly quietly carefully suddenly often
        rarely twice together alone anyway already finally usually patiently
    """,
    "number": """
        two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        twenty thirty forty
    """,
    "where": "near behind above below beside beyond inside outside through around towards against",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
WORDS = {kind: tuple(words.split()) for kind, words in _WORDS.items()}

_TEMPLATES = (
    "the {person} {saw} the {adjective} {thing} {where} the {place}",
    "a {adjective} {animal} {went} {where} the {place} on {day}",
    "{when} the {person} {went} {where} the {place} with a {animal}",
    "my {person} {saw} some {food} and {number} {adjective} {food} sandwiches",
    "did the {adjective} {person} say that the {animal} {did} {when}",
    "the {animal} and the {person} {did} while the {person} {saw} the {thing}",
    "there were {number} {adjective} boxes of {food} {where} the {place}",
    "nobody {saw} the {thing} that the {person} {saw} on {day}",
    "we should put the {food} {where} the {thing}, not {where} the {thing}",
    "if the {person} {did}, the {animal} {went} {where} the {place}",
    "your {adjective} {thing} costs {number} pounds, said the {person}",
    "why is there a {adjective} {animal} {where} the {place}",
    "the {place} was {adjective} and the {person} {did} {when}",
    "after {number} days the {person} {saw} a {thing} made of {food}",
)


def draw_sentences(count: int, *, seed: int) -> list[str]:
    """Different sentences at random: no two are the same.

    Parameters
    ----------
    count : int
        Far fewer than there can be, which is more than a hundred million.
    seed : int
    """
    draw = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(_sentence(draw))
    return list(found)


def _sentence(draw: np.random.Generator) -> str:
    """One sentence; where a kind of word occurs twice, each is drawn on its own."""
    template = _TEMPLATES[draw.integers(len(_TEMPLATES))]
    words = []
    for part in template.split():
        kind, _, rest = part.removeprefix("{").partition("}")
        chosen = WORDS[kind] if part.startswith("{") else (part,)
        words.append(str(chosen[draw.integers(len(chosen))]) + rest)
    for place, following in enumerate(words[1:]):
        if words[place] == "a" and following[0] in "aeiou":
            words[place] = "an"
    return " ".join(words)
