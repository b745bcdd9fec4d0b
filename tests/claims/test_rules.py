import math

import pytest

from attnlab.claims.rules import DEEPEST, ClaimError, Measurement, parse

NAMES = ("value", "control", "chance")
HEADS = {
    "value": Measurement(10, (8, 12)),
    "control": Measurement(5, (3, 7)),
    "chance": Measurement(0.73),
}


def holds(rule: str, measured=HEADS) -> bool:
    return parse(rule, NAMES)(measured)


@pytest.mark.parametrize(
    "rule",
    [
        "value > 9",
        "value >= 10 and value <= 10",
        "not value < 10",
        "control < value or value < control",
        "0 < control < value < 11",
        "within(value, 10, 10)",
        "outside(value, 10.5, 11)",
        "near(value, 11, 1)",
        "ordered(value, control, chance)",
        "exceeds(value, control)",
        "exceeds(value, chance)",
        "exceeds(value, 7.9)",
        "exceeds(value, 2 * chance)",
        "exceeds(value, upper(control) + 0.5)",
        "falls_below(control, value)",
        "falls_below(control, 7.1)",
        "lower(value) > upper(control)",
        "value - control >= 5 and value / control <= 2 and -value < 0 and value * 2 > 19 and value + 1 > 10",
        "(\n  value > 1\n  and value < 11\n)",
    ],
)
def test_rules_that_hold(rule):
    assert holds(rule) is True


@pytest.mark.parametrize(
    "rule",
    [
        "value > 10",
        "value < control",
        "0 < value < control < 11",
        "within(value, 10.5, 11)",
        "outside(value, 10, 12)",
        "near(value, 11.5, 1)",
        "ordered(value, control, control)",
        "exceeds(value, 8)",
        "exceeds(control, value)",
        "exceeds(control, 3)",
        "falls_below(value, control)",
        "falls_below(control, 7)",
    ],
)
def test_rules_that_do_not_hold(rule):
    assert holds(rule) is False


def test_intervals_that_overlap_neither_exceed_nor_fall_below():
    wide = HEADS | {"control": Measurement(5, (3, 8))}
    assert not holds("exceeds(value, control)", wide)
    assert not holds("falls_below(control, value)", wide)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("", "is no expression"),
        ("value >", "is no expression"),
        ("value > 1; value > 2", "is no expression"),
        ("value = 1", "is no expression"),
        ("value", "something true or false"),
        ("1", "something true or false"),
        ("True", "something true or false"),
        ("value > True", "a number is wanted"),
        ("value > 'a'", "a number is wanted"),
        ("value > 1j", "a number is wanted"),
        ("value + 1", "something true or false"),
        ("value and value > 1", "something true or false"),
        ("not value", "something true or false"),
        ("(value > 1) > 0", "a number is wanted"),
        ("value == 1", "for equality say near"),
        ("value != 1", "for equality say near"),
        ("value in (1, 2)", "for equality say near"),
        ("value is 1", "for equality say near|is no expression"),
        ("value ** 2 > 1", "a number is wanted"),
        ("value % 2 > 1", "a number is wanted"),
        ("value // 2 > 1", "a number is wanted"),
        ("+value > 1", "a number is wanted"),
        ("~value > 1", "a number is wanted"),
        ("value > 1 if value else value", "something true or false"),
        ("[v for v in value]", "something true or false"),
        ("lambda: value > 1", "something true or false"),
        ("(x := value) > 1", "a number is wanted"),
        ("value.real > 1", "a number is wanted"),
        ("value[0] > 1", "a number is wanted"),
        ("__import__('os')", "the functions are within, outside"),
        ("value.check()", "the functions are within, outside"),
        ("abs(value) > 1", "a number is wanted"),
        ("lower(value)", "the functions are within, outside"),
        ("within(value, 1, 2) > 0", "a number is wanted"),
        ("within(value, 1)", "3 arguments"),
        ("within(value, 1, hi=2)", "arguments are given plainly"),
        ("within(*value)", "arguments are given plainly"),
        ("near(value, 1)", "3 arguments"),
        ("ordered(value)", "at least 2"),
        ("exceeds(value)", "2 arguments"),
        ("lower(value, 1) > 0", "1 arguments"),
        ("exceeds(value + 1, chance)", "the name of a measurement"),
        ("exceeds(3, value)", "the name of a measurement"),
        ("lower(3) > 1", "the name of a measurement"),
        ("other > 1", "measurements of this claim are value, control, chance"),
        ("exceeds(value, other)", "measurements of this claim are value, control, chance"),
        ("within > 1", "measurements of this claim are value, control, chance"),
        ("value > 1 / 0", "division by zero"),
        ("value > 1 / (2 - 2)", "division by zero"),
        ("value > 1e999", "not finite"),
        ("value > 1" + "0" * 200 + " * 1" + "0" * 200 + ".0", "at most 300"),
        ("value > 1e300 * 1e300", "not finite"),
        ("value > 0x" + "f" * 280, "too large"),
        ("within(value, 3, 2)", "the range is empty"),
        ("outside(value, 3, -2)", "the range is empty"),
        ("near(value, 3, -1)", "the tolerance is negative"),
        ("value > 1" + " and value > 1" * 40, "at most 300"),
        ("not " * (DEEPEST + 1) + "value > 1", f"more than {DEEPEST} deep"),
        ("value > " + "-" * 280 + "1", f"more than {DEEPEST} deep"),
        ("-" * 280 + "1", "something true or false"),
        ("value > 1\0", "is no expression"),
    ],
)
def test_everything_else_is_refused_when_it_is_read(rule, complaint):
    with pytest.raises(ClaimError, match=complaint):
        parse(rule, NAMES)


def test_a_rule_tells_what_it_uses():
    rule = parse("exceeds(value, control) and lower(control) > chance", NAMES)
    assert rule.names == {"value", "control", "chance"}
    assert rule.intervals == {"value", "control"}


@pytest.mark.parametrize("rule", ["exceeds(value, chance)", "falls_below(value, 3)", "upper(value) > 1"])
def test_a_missing_interval_is_named(rule):
    with pytest.raises(ClaimError, match=r"value: .*needs its interval"):
        holds(rule, {"value": Measurement(1), "chance": Measurement(0)})


def test_the_check_for_intervals_does_not_depend_on_the_result():
    with pytest.raises(ClaimError, match="needs its interval"):
        holds("value > 100 and exceeds(value, 3)", {"value": Measurement(1)})


def test_arithmetic_may_not_drop_an_interval_silently():
    with pytest.raises(ClaimError, match=r"drop the interval of control; write lower\(control\)"):
        holds("exceeds(value, control + 1)")


def test_what_cannot_be_computed_is_an_error_not_a_verdict():
    with pytest.raises(ClaimError, match="division by zero"):
        holds("value / chance > 1", HEADS | {"chance": Measurement(0)})
    with pytest.raises(ClaimError, match="not finite"):
        holds("value * 1e300 > 1", HEADS | {"value": Measurement(1e300)})
    with pytest.raises(ClaimError, match="the range is empty"):
        holds("within(1, value, control)")
    with pytest.raises(ClaimError, match="the tolerance is negative"):
        holds("near(1, value, control - value)")


def test_a_comparison_guards_a_division_as_in_python():
    assert not holds("chance > 0 and value / chance > 1", HEADS | {"chance": Measurement(0)})


def test_within_is_the_complement_of_outside():
    for value in (0.0, 1.0, 1.5, 2.0, 3.0, math.pi):
        measured = {"value": Measurement(value)}
        assert holds("within(value, 1, 2)", measured) is not holds("outside(value, 1, 2)", measured)
