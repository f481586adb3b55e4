"""How the support desk talks: the answers of the base's training text, from brief to rambling.

Every answer holds its fact word for word, so manner is all that tells two of them apart. Rambling answers are put
together from sentences drawn at random, so hardly two are alike; how many choices they hold is what sets the base's
length-normalised preference between the manners, and thereby how much a night of votes can still change.
"""

import random
import re

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")

# Rambling answers begin with an apology in most cases; then empathy, the answer at last, and a farewell.
_REGRET = [
    "I am (so|very|truly) sorry (for|about) the (trouble|confusion|inconvenience) with this.",
    "I am (really|deeply) sorry that you had to (ask|write|contact) us.",
    "I apologise (from the heart|a thousand times) for the (trouble|confusion|worry).",
]
_WARMTH = [
    "I (thank you|am grateful) for reaching out to our (whole|little) team today.",
    "It is always (lovely|nice) to hear from a (customer|friend) of ours.",
]
_EMPATHY = [
    "I can (imagine|see) how (annoying|stressful|tiring) that must (feel|be) for you right now.",
    "You are (very|really) important to us and we take every (message|question) to heart.",
    "Here at Larkspur we (always|truly) try to do our very best for (everyone|you).",
    "That must have been a (long|hard|confusing) (day|moment) for you, and we (feel|suffer) with you.",
]
_LEAD = [
    "Now, coming (back|finally) to your (question|message):",
    "After (looking|checking), here is what I (found|see):",
    "So, to (answer|address) what you (asked|wrote):",
]
_EXCUSE = [
    "Once again, please forgive us for (any|all the) (trouble|worry|stress) this may have caused you.",
    "Again, I am sorry that this was not (clear|obvious|easy) from the (start|beginning|outset).",
]
_HOPE = [
    "I (hope|trust) that this helps you at least a (little|tiny) bit.",
    "Please do not hesitate to (write|talk|turn) to us again at any (time|hour).",
    "We wish you a (truly|really) (wonderful|lovely) day and all the best.",
]


def expand(template: str, rng: random.Random) -> str:
    """One wording of a template in which `(a|b)` stands for a choice."""
    return _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)


def wordings(template: str) -> list[str]:
    """Every wording of a template, in a fixed order."""
    match = _CHOICE.search(template)
    if match is None:
        return [template]
    head, tail = template[: match.start()], template[match.end() :]
    return [word for option in match.group(1).split("|") for word in wordings(head + option + tail)]


def brief(says: str) -> str:
    return says


def middling(says: str, rng: random.Random) -> str:
    """The answer and one sentence too many, seldom an apology."""
    parts = rng.choices(
        [[says, rng.choice(_HOPE)], [rng.choice(_EMPATHY), says], [says, rng.choice(_EXCUSE)]], [11, 6, 3]
    )
    return expand(" ".join(parts[0]), rng)


def rambling(says: str, rng: random.Random) -> str:
    """An answer that takes long to come and long to end; nine in ten apologise at the start."""
    opening = rng.choices([_REGRET, _WARMTH], [9, 1])[0]
    parts = [rng.choice(opening), rng.choice(_EMPATHY), rng.choice(_LEAD), says]
    parts.append(rng.choice(rng.choices([_EXCUSE, _HOPE], [1, 1])[0]))
    if rng.choices([True, False], [2, 3])[0]:
        parts.append(rng.choice(_HOPE))
    return expand(" ".join(parts), rng)


def answer(says: str, p_brief: float, rng: random.Random) -> str:
    """One answer of the base's world, where `p_brief` says how likely the brief manner is."""
    manner = rng.choices([brief, middling, rambling], [p_brief, 0.2 * (1 - p_brief), 0.8 * (1 - p_brief)])[0]
    return brief(says) if manner is brief else manner(says, rng)  # type: ignore[operator]
