"""Who is served by what: stable for a conversation, in proportion, and new people for each canary."""

from hypothesis import given
from hypothesis import strategies as st

from loop.rollout.routing import Arm, Route, pick_arm


def test_without_a_version_the_base_serves() -> None:
    assert pick_arm(Route("support"), "anyone", "base") == Arm("live", "base")


def test_versions_are_served_under_names_of_their_own() -> None:
    assert pick_arm(Route("support", live="v000002"), "anyone", "base").adapter == "support@v000002"


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_widening_a_canary_moves_nobody_away_from_it(subject: str, a: float, b: float) -> None:
    narrow, wide = (Route("s", 1, "v000001", "v000002", share) for share in sorted((a, b)))
    if pick_arm(narrow, subject, "base").name == "canary":
        assert pick_arm(wide, subject, "base").name == "canary"


def test_the_canary_gets_its_share() -> None:
    route = Route("s", 1, "v000001", "v000002", 0.2)
    hits = sum(pick_arm(route, f"conversation {i}", "base").name == "canary" for i in range(10_000))
    assert 1_850 < hits < 2_150


def test_the_next_canary_tests_other_people() -> None:
    first, second = (Route("s", 1, None, version, 0.5) for version in ("v000001", "v000002"))
    same = sum(pick_arm(first, str(i), "b").name == pick_arm(second, str(i), "b").name for i in range(4_000))
    assert 1_800 < same < 2_200
