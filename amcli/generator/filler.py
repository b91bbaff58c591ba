"""Prose without facts, to go between the facts of a handbook.

Sentences are drawn from patterns with slots. None of them names a person, a service, a station,
a team or a value that a question could ask for.
"""

from __future__ import annotations

from random import Random

_SLOTS: dict[str, list[str]] = {
    "thing": """the kettle,the stapler,the noticeboard,the spare key,the coat rack,the old printer,
the first-aid box,the fire blanket,the visitor badge,the recycling bin,the whiteboard,the toolbox,
the ladder,the long table,the projector,the window latch,the heating,the dishwasher,the letter box,
the lost-property shelf,the rain gauge,the flagpole,the bicycle shed,the side door,the boot rack,
the log book,the duty roster,the tide table,the storm lantern,the generator""".replace(
        "\n", ""
    ).split(","),
    "when": """in the morning,after lunch,before the weekend,at the end of the month,when it rains,
in winter,during the holidays,before closing,as soon as possible,once a quarter,on quiet days,
when the wind turns,after heavy snow,at low tide,before the boat leaves""".replace("\n", "").split(
        ","
    ),
    "group": """visitors,new colleagues,guests,everyone,trainees,the night shift,the cleaning crew,
drivers,contractors,the early shift,volunteers,students""".replace("\n", "").split(","),
    "place": """the kitchen,the lobby,the cellar,the courtyard,the workshop,the reading corner,
the boiler house,the pier,the attic,the loading bay,the greenhouse,the mess room,the stairwell,
the copy room,the garage,the terrace""".replace("\n", "").split(","),
    "act": """clean,check,lock,refill,label,move,test,repair,cover,unplug,return,count""".split(
        ","
    ),
    "quality": """quiet,tidy,dry,warm,accessible,well lit,free of boxes,in good order,ready for use,
open,clear""".replace("\n", "").split(","),
    "weather": """fog,frost,heavy rain,a northerly gale,drifting snow,a heat wave,black ice,hail,
a long calm,thunder""".replace("\n", "").split(","),
}

_PATTERNS = [
    "Please {act} {thing} {when}.",
    "Please keep {place} {quality}.",
    "{Group} are asked to {act} {thing} {when}.",
    "{Thing} stands in {place}.",
    "If {thing} is missing, look in {place} first.",
    "In case of {weather}, {place} stays closed.",
    "{Group} may use {place} {when}.",
    "Nobody remembers who put {thing} in {place}.",
    "We {act} {thing} {when}, and it takes ten minutes.",
    "A note on {thing} hangs in {place}.",
    "During {weather}, stay in {place} and wait for the all-clear.",
    "{Thing} was replaced, and the old one went to {place}.",
    "There is no need to {act} {thing} twice.",
    "Most of us meet in {place} {when}.",
    "The rules for {place} are simple: keep it {quality}.",
    "It helps to {act} {thing} before {group} arrive.",
    "After {weather}, somebody has to {act} {thing}.",
    "Leave {place} as you found it.",
    "{Group} rarely notice {thing}, and that is as it should be.",
    "The way to {place} is marked with yellow arrows.",
    "When in doubt, ask before you {act} {thing}.",
    "Since the last {weather}, {thing} has to be kept in {place}.",
    "What happens in {place} {when} is nobody else's business.",
    "Remember to switch off the light in {place}.",
    "The inspection of {place} went well, and nothing had to be changed.",
    "Between {place} and {place2} there is a step, so mind your feet.",
    "We share {thing} with the neighbours and {act} it in turn.",
    "Some say that {thing} brings luck, others would rather {act} it.",
]


def sentence(rng: Random) -> str:
    """One sentence of filler."""
    slots = {name: rng.choice(pool).strip() for name, pool in _SLOTS.items()}
    slots["place2"] = rng.choice(_SLOTS["place"]).strip()
    capitals = {name.capitalize(): text[0].upper() + text[1:] for name, text in slots.items()}
    text = rng.choice(_PATTERNS).format(**slots, **capitals)
    # "In case of a heat wave", but "since the last heat wave".
    return text.replace("the last a ", "the last ")


def paragraph(rng: Random) -> str:
    """Two to five sentences of filler."""
    return " ".join(sentence(rng) for _ in range(rng.randint(2, 5)))
