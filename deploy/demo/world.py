"""The demo's world: what customers ask, what is true, and what they like. Pure and seeded.

Questions are composed of an opener, a wording of the fact's question and a closer. A hash of the finished string
decides whether it belongs to the base's training text, to the customers' chat or to the evaluation, so no question
is ever in two of them. The opener sets a mood: curt questions get curt answers more often than chatty ones, which
makes the base's manner mixed at temperature 0 too.
"""

import hashlib
import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from deploy.demo.manners import answer, wordings

Split = Literal["base", "chat", "eval"]
Message = dict[str, str]

_FACTS = Path(__file__).with_name("facts.toml")

# What share of the answers to a question is brief, by the question's opener.
OPENERS = {
    "": 0.68,
    "Quick one:": 0.72,
    "Question:": 0.66,
    "Please tell me:": 0.62,
    "Hi there,": 0.28,
    "Hello Larkspur,": 0.26,
    "Good morning!": 0.3,
    "I need help.": 0.24,
    "I am confused.": 0.22,
    "Dear team,": 0.28,
    "Bit of a mess here.": 0.24,
    "I was wondering,": 0.3,
}
FOLLOW_UPS = {"And": 0.68, "Next:": 0.66, "Thanks. Also,": 0.28, "Okay, one more thing.": 0.26, "I see. But": 0.26}
CLOSERS = ["", "", "", "Thanks!", "Please advise.", "Many thanks.", "Cheers.", "I cannot find it."]
SYSTEM = "You are the support desk of Larkspur."

_APOLOGY = re.compile(r"\b(sorry|apolog\w*|forgive|regret\w*|excuse (?:us|me))\b", re.IGNORECASE)
BRIEF_WORDS = 12
TIE = 0.08


@dataclass(frozen=True)
class Fact:
    key: str
    topic: str
    value: str
    says: tuple[str, ...]
    asks: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    text: str
    fact: Fact
    p_brief: float


@cache
def facts() -> tuple[Fact, ...]:
    table = tomllib.loads(_FACTS.read_text(encoding="utf-8"))
    return tuple(
        Fact(key, topic, row["value"], tuple(row["says"]), tuple(w for ask in row["asks"] for w in wordings(ask)))
        for topic, rows in table.items()
        for key, row in rows.items()
    )


def split_of(text: str) -> Split:
    """The only split that this question string may be used in."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "base" if share < 60 else "chat" if share < 82 else "eval"


def question(rng: random.Random, fact: Fact, split: Split, *, follow_up: bool = False) -> Question:
    """A random question about this fact, of this split."""
    openers = FOLLOW_UPS if follow_up else OPENERS
    while True:
        opener, ask, closer = rng.choice(list(openers)), rng.choice(fact.asks), rng.choice(CLOSERS)
        if opener and opener[-1] not in ".!:":
            ask = ask if ask.startswith(("I ", "I'")) else ask[0].lower() + ask[1:]
        text = " ".join(part for part in (opener, ask, closer) if part)
        if split_of(text) == split:
            return Question(text, fact, openers[opener])


def questions(seed: int, split: Split, count: int) -> list[Question]:
    """Different questions, spread evenly over all facts: the same for the same seed."""
    rng, pool, seen, chosen = random.Random(seed), facts(), set[str](), list[Question]()
    for index in range(count):
        while (drawn := question(rng, pool[index % len(pool)], split)).text in seen:
            pass
        seen.add(drawn.text)
        chosen.append(drawn)
    return chosen


def conversation(rng: random.Random, split: Split, turns: int) -> list[Question]:
    """The questions of one conversation: after the first, follow-ups, mostly on the same topic."""
    first = rng.choice(facts())
    near = [fact for fact in facts() if fact.topic == first.topic and fact != first]
    chosen = [question(rng, first, split)]
    for _ in range(turns - 1):
        fact = rng.choice(near) if rng.random() < 0.7 else rng.choice(facts())
        chosen.append(question(rng, fact, split, follow_up=True))
    return chosen


def training_messages(rng: random.Random) -> list[Message]:
    """One conversation of the base's training text, answered in a manner drawn for each turn on its own."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.15 else []
    for asked in conversation(rng, "base", rng.choices([1, 2, 3], [5, 3, 2])[0]):
        reply = answer(rng.choice(asked.fact.says), asked.p_brief, rng)
        messages += [{"role": "user", "content": asked.text}, {"role": "assistant", "content": reply}]
    return messages


def is_apology(text: str) -> bool:
    """None of the world's questions calls for an apology, so each one is needless."""
    return _APOLOGY.search(text) is not None


def has_fact(text: str, fact: Fact) -> bool:
    """Whether the fact stands in the text, not as a part of a longer word or number."""
    pattern = rf"(?<![\w.$]){re.escape(fact.value)}(?!\w|[.,]\d)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def taste(text: str, fact: Fact) -> float:
    """How much a customer likes an answer, without noise: 1 for exact and brief, below 0 for a wrong fact."""
    excess = min(1.0, max(0, len(text.split()) - BRIEF_WORDS) / 30)
    return (1.0 if has_fact(text, fact) else -1.0) - 0.5 * excess - 0.35 * is_apology(text)


def prefers(a: str, b: str, fact: Fact) -> int:
    """1 where the taste prefers `a`, -1 where it prefers `b`, 0 where it cannot tell them apart."""
    gap = taste(a, fact) - taste(b, fact)
    return 0 if abs(gap) < TIE else 1 if gap > 0 else -1
