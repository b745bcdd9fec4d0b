"""The language in which a claim says, before the experiment, what would confirm it and what would refute it.

A rule is a small part of Python's expressions: ``and``, ``or``, ``not``, comparisons, arithmetic, and these functions
of the measurements by name (``value`` and the claim's controls):

- ``within(x, lo, hi)``, ``outside(x, lo, hi)``: the number x lies in the closed range, or does not;
- ``near(x, y, tol)``: the numbers differ by at most ``tol``;
- ``ordered(a, b, c, ...)``: the numbers strictly decrease;
- ``exceeds(x, y)``, ``falls_below(x, y)``: the whole interval of the measurement x lies above, or below, that of y;
  an ``y`` without an interval counts as exact;
- ``lower(x)``, ``upper(x)``: the ends of a measurement's interval, as numbers.

Where a measurement's name stands for a number, it is the point value. Everything that can be refused is refused when
the rule is read, not when a result hangs on it: :func:`parse` translates a rule into closures, one function for truth
values and one for numbers, so that neither can stand where the other is meant.
"""

import ast
import itertools
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

LONGEST = 300  # characters; a rule that does not fit is no rule that a reader can check
DEEPEST = 20


class ClaimError(ValueError):
    """A claim, its rule or its measurement is not in order; the message names the claim and what would do."""


@dataclass(frozen=True)
class Measurement:
    """A finite number and, if its spread is known, the interval that holds it."""

    value: float
    interval: tuple[float, float] | None = None

    def ends(self) -> tuple[float, float]:
        """The interval; a number without one is exact."""
        return self.interval if self.interval is not None else (self.value, self.value)


Measured = Mapping[str, Measurement]
Number = Callable[[Measured], float]
Truth = Callable[[Measured], bool]
Interval = Callable[[Measured], tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """A rule that was read: call it with the measurements.

    Attributes:
        text: the rule as it was written, on one line.
        names: the measurements it uses.
        intervals: those of them whose interval it needs.
    """

    text: str
    names: frozenset[str]
    intervals: frozenset[str]
    truth: Truth = field(repr=False, compare=False)

    def __call__(self, measured: Measured) -> bool:
        """Whether the rule holds; a measurement that lacks the interval it needs raises a :class:`ClaimError`."""
        for name in sorted(self.intervals):
            if measured[name].interval is None:
                raise ClaimError(f"{name}: the rule {self.text!r} needs its interval (lo, hi); only a number was given")
        return self.truth(measured)


def parse(text: str, allowed: Collection[str]) -> Rule:
    """Read a rule that may use the measurements named in ``allowed``; anything else raises a :class:`ClaimError`."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        raise ClaimError(f"a rule has at most {LONGEST} characters, this one has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise ClaimError(f"the rule {text!r} is no expression: {error}") from error
    reader = _Reader(text, allowed)
    truth = reader.truth(tree.body, depth=0)
    return Rule(text, frozenset(reader.names), frozenset(reader.intervals), truth)


_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ENDS = {"lower": 0, "upper": 1}


class _Reader:
    """Translates one rule and collects what it uses."""

    def __init__(self, text: str, allowed: Collection[str]) -> None:
        self.text = text
        self.allowed = allowed
        self.names: set[str] = set()
        self.intervals: set[str] = set()
        self.functions: dict[str, Callable[[ast.Call, int], Truth]] = {
            "within": self._range,
            "outside": self._outside,
            "near": self._near,
            "ordered": self._ordered,
            "exceeds": self._exceeds,
            "falls_below": self._falls_below,
        }

    def refuse(self, node: ast.AST, why: str) -> ClaimError:
        place = ast.get_source_segment(self.text, node)
        return ClaimError(f"the rule {self.text!r} fails at {place!r}: {why}")

    # Truth values ------------------------------------------------------------------------------------------------

    def truth(self, node: ast.expr, depth: int) -> Truth:
        self._check_depth(node, depth)
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.truth(value, depth + 1) for value in values]
                every_or_any = all if isinstance(op, ast.And) else any
                return lambda m: every_or_any(part(m) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.truth(operand, depth + 1)
                return lambda m: not inner(m)
            case ast.Compare():
                return self._comparison(node, depth)
            case ast.Call():
                return self._call(node, depth)
        raise self.refuse(node, "something true or false is wanted: a comparison, and, or, not, or a function")

    def _comparison(self, node: ast.Compare, depth: int) -> Truth:
        for op in node.ops:
            if type(op) not in _COMPARISONS:
                raise self.refuse(node, "numbers compare by <, <=, >, >=; for equality say near(x, y, tol)")
        tests = [_COMPARISONS[type(op)] for op in node.ops]
        sides = [self.number(side, depth + 1) for side in (node.left, *node.comparators)]

        def holds(m: Measured) -> bool:
            numbers = [side(m) for side in sides]
            return all(test(a, b) for test, (a, b) in zip(tests, itertools.pairwise(numbers), strict=True))

        return holds

    def _call(self, node: ast.Call, depth: int) -> Truth:
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name not in self.functions:
            known = ", ".join(self.functions)
            raise self.refuse(node, f"something true or false is wanted; the functions are {known}")
        return self.functions[name](node, depth + 1)

    def _arguments(self, node: ast.Call, count: int | None) -> list[ast.expr]:
        """The plain arguments; ``count`` None means two or more."""
        if node.keywords or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise self.refuse(node, "arguments are given plainly, in order")
        if len(node.args) != count and not (count is None and len(node.args) >= 2):
            raise self.refuse(node, f"{'at least 2' if count is None else count} arguments are wanted")
        return node.args

    def _range(self, node: ast.Call, depth: int) -> Truth:
        x, low, high = (self.number(arg, depth) for arg in self._arguments(node, 3))

        def check_order(m: Measured) -> None:
            if low(m) > high(m):
                raise self.refuse(node, f"the range is empty: {low(m):g} lies above {high(m):g}")

        if _is_constant(node.args[1]) and _is_constant(node.args[2]):
            check_order({})

        def holds(m: Measured) -> bool:
            check_order(m)
            return low(m) <= x(m) <= high(m)

        return holds

    def _outside(self, node: ast.Call, depth: int) -> Truth:
        inside = self._range(node, depth)
        return lambda m: not inside(m)

    def _near(self, node: ast.Call, depth: int) -> Truth:
        x, y, tolerance = (self.number(arg, depth) for arg in self._arguments(node, 3))

        def check_sign(m: Measured) -> None:
            if tolerance(m) < 0:
                raise self.refuse(node, f"the tolerance is negative: {tolerance(m):g}")

        if _is_constant(node.args[2]):
            check_sign({})

        def holds(m: Measured) -> bool:
            check_sign(m)
            return abs(x(m) - y(m)) <= tolerance(m)

        return holds

    def _ordered(self, node: ast.Call, depth: int) -> Truth:
        numbers = [self.number(arg, depth) for arg in self._arguments(node, None)]

        def holds(m: Measured) -> bool:
            values = [number(m) for number in numbers]
            return all(a > b for a, b in itertools.pairwise(values))

        return holds

    def _exceeds(self, node: ast.Call, depth: int) -> Truth:
        x, y = self._intervals_of(node, depth)
        return lambda m: x(m)[0] > y(m)[1]

    def _falls_below(self, node: ast.Call, depth: int) -> Truth:
        x, y = self._intervals_of(node, depth)
        return lambda m: x(m)[1] < y(m)[0]

    def _intervals_of(self, node: ast.Call, depth: int) -> tuple[Interval, Interval]:
        """The two intervals that ``exceeds`` and ``falls_below`` compare; the first must be there."""
        x, y = self._arguments(node, 2)
        first = self._name_with_interval(x)
        if isinstance(y, ast.Name):
            second = self._name(y)
            return (lambda m: m[first].ends()), (lambda m: m[second].ends())
        number = self.number(y, depth)
        bare = _bare_names(y)

        def exact(m: Measured) -> tuple[float, float]:
            for name in bare:
                if m[name].interval is not None:
                    raise self.refuse(
                        y, f"this would drop the interval of {name}; write lower({name}) or upper({name})"
                    )
            return number(m), number(m)

        return (lambda m: m[first].ends()), exact

    # Numbers -----------------------------------------------------------------------------------------------------

    def number(self, node: ast.expr, depth: int) -> Number:
        self._check_depth(node, depth)
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                constant = self._finite(node, lambda: float(value))
                return lambda m: constant
            case ast.Name():
                name = self._name(node)
                return lambda m: m[name].value
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self.number(operand, depth + 1)
                return lambda m: -inner(m)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(node, _ARITHMETIC[type(op)], left, right, depth)
            case ast.Call(func=ast.Name(id=name)) if name in _ENDS:
                (argument,) = self._arguments(node, 1)
                measurement, end = self._name_with_interval(argument), _ENDS[name]
                return lambda m: m[measurement].ends()[end]
        raise self.refuse(node, "a number is wanted: a constant, a measurement, + - * /, lower(x) or upper(x)")

    def _arithmetic(
        self,
        node: ast.BinOp,
        compute: Callable[[float, float], float],
        left: ast.expr,
        right: ast.expr,
        depth: int,
    ) -> Number:
        a, b = self.number(left, depth + 1), self.number(right, depth + 1)

        def result(m: Measured) -> float:
            return self._finite(node, lambda: compute(a(m), b(m)))

        if _is_constant(node):
            result({})  # what can never be computed is refused now
        return result

    def _finite(self, node: ast.expr, compute: Callable[[], float]) -> float:
        try:
            result = compute()
        except (ZeroDivisionError, OverflowError) as error:
            raise self.refuse(node, str(error)) from error
        if not math.isfinite(result):
            raise self.refuse(node, "the result is not finite")
        return result

    # Names -------------------------------------------------------------------------------------------------------

    def _name(self, node: ast.Name) -> str:
        if node.id not in self.allowed:
            raise self.refuse(node, f"the measurements of this claim are {', '.join(self.allowed)}")
        self.names.add(node.id)
        return node.id

    def _name_with_interval(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            raise self.refuse(node, "the name of a measurement is wanted, because its interval is compared")
        self.intervals.add(node.id)
        return self._name(node)

    def _check_depth(self, node: ast.expr, depth: int) -> None:
        if depth > DEEPEST:
            raise ClaimError(f"the rule {self.text!r} is nested more than {DEEPEST} deep")


def _is_constant(node: ast.expr) -> bool:
    return not any(isinstance(part, ast.Name) for part in ast.walk(node))


def _bare_names(node: ast.AST) -> list[str]:
    """Measurements that stand in ``node`` by their point value (not inside ``lower`` or ``upper``)."""
    if isinstance(node, ast.Call):
        return []
    if isinstance(node, ast.Name):
        return [node.id]
    return [name for child in ast.iter_child_nodes(node) for name in _bare_names(child)]
