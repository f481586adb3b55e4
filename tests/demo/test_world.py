"""The demo's world holds what the demo's measures rest on: disjoint questions, checkable facts, an honest taste."""

import random

import pytest

from deploy.demo import manners, measure, world

SPLITS: tuple[world.Split, ...] = ("base", "chat", "eval")


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def clusters(texts: list[str], threshold: float = 0.6) -> list[int]:
    """Single-link clusters by the Jaccard likeness of word shingles; the label of each text."""
    sets, label = [shingles(text) for text in texts], list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]):
                old, new = label[i], label[j]
                label = [new if at == old else at for at in label]
    return label


def test_facts_are_many_and_no_two_share_a_value_or_a_question() -> None:
    facts = world.facts()
    assert len(facts) >= 64
    assert len({fact.value for fact in facts}) == len({fact.key for fact in facts}) == len(facts)
    assert len({ask for fact in facts for ask in fact.asks}) == sum(len(fact.asks) for fact in facts)


def test_a_statement_holds_its_own_fact_and_no_other() -> None:
    for fact in world.facts():
        for says in fact.says:
            held = [other.key for other in world.facts() if world.has_fact(says, other)]
            assert held == [fact.key]


def test_question_splits_are_disjoint() -> None:
    sets = [{question.text for question in world.questions(3, split, 720)} for split in SPLITS]
    assert all(len(texts) == 720 for texts in sets)
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_training_text_never_holds_a_chat_or_evaluation_question() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        for message in world.training_messages(rng):
            assert message["role"] != "user" or world.split_of(message["content"]) == "base"


def test_evaluation_questions_are_at_least_400_in_at_least_50_clusters_of_one_fact_each() -> None:
    asked = measure.eval_questions()
    labels = clusters([question.text for question in asked])
    assert len(asked) >= 400
    assert len(set(labels)) >= 50
    for label in set(labels):
        assert len({question.fact.key for question, at in zip(asked, labels, strict=True) if at == label}) == 1


def test_the_same_seed_gives_the_same_questions_and_conversations() -> None:
    assert world.questions(4, "chat", 100) == world.questions(4, "chat", 100)
    talk = [world.conversation(random.Random(4), "chat", 3) for _ in range(2)]
    assert talk[0] == talk[1]


def test_every_answer_of_every_manner_holds_the_fact() -> None:
    rng = random.Random(6)
    for fact in world.facts():
        for says in fact.says:
            for reply in (manners.brief(says), manners.middling(says, rng), manners.rambling(says, rng)):
                assert world.has_fact(reply, fact)


def test_rambling_answers_vary() -> None:
    rng = random.Random(7)
    says = world.facts()[0].says[0]
    assert len({manners.rambling(says, rng) for _ in range(200)}) > 190


def test_taste_orders_brief_before_middling_before_rambling_before_wrong() -> None:
    fact = world.facts()[0]
    says = fact.says[0]
    rambling = f"I am so sorry for the trouble. {'We care a lot about you. ' * 8}{says}"
    ordered = [says, f"Sorry about that. {says}", rambling, "You can change an order for 5 minutes."]
    scores = [world.taste(reply, fact) for reply in ordered]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4
    assert world.prefers(ordered[0], ordered[2], fact) == 1
    assert world.prefers(ordered[2], ordered[0], fact) == -1
    assert world.prefers(fact.says[0], fact.says[1], fact) == 0


@pytest.mark.parametrize(
    ("text", "value", "held"),
    [
        ("It takes 5 days.", "5 days", True),
        # A longer number is another fact.
        ("It takes 35 days.", "5 days", False),
        ("It is $3.50.", "$3.50", True),
        ("It is $3.505.", "$3.50", False),
        ("From $45.", "$45", True),
        ("From $45.10.", "$45", False),
        ("open settings > security", "Settings > Security", True),
    ],
)
def test_a_fact_is_found_whole_or_not_at_all(text: str, value: str, held: bool) -> None:
    assert world.has_fact(text, world.Fact("key", "topic", value, (), ())) is held


@pytest.mark.parametrize(
    ("text", "apology"),
    [("I am so sorry.", True), ("We apologise.", True), ("Please forgive us.", True), ("Open Orders > Track.", False)],
)
def test_apologies_are_told(text: str, apology: bool) -> None:
    assert world.is_apology(text) is apology
