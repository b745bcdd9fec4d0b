"""What is measured: one row for every claim that a run tested, and the audit of all rows against the declarations.

:func:`check` applies the declared rule to a measurement and writes the row. Nobody sets a verdict by hand:
:func:`rows` marks a row that was made under another rule, :func:`audit` finds one whose verdict its rule does not give.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from attnlab import lab
from attnlab.claims.card import Card
from attnlab.claims.declaration import Claim, Verdict, declared, get, load
from attnlab.claims.rules import ClaimError, Measurement
from attnlab.records import Record

Interval = tuple[float, float]
Control = float | tuple[float, Interval]

SCHEMA = 1


class Row(TypedDict):
    """One measurement of one claim, as it is written to ``<out>/claims/<slug>--<id>.json``."""

    schema: int
    claim: str  # "slug/id"
    value: float
    interval: list[float] | None
    controls: dict[str, dict[str, Any]]  # name -> {"value": ..., "interval": ...}
    unit: str
    verdict: Verdict
    rule: dict[str, str | None]  # "confirm", "refute", "applies"
    rule_hash: str
    seeds: list[int]
    seconds: float | None
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    origin: Literal["run", "record"]
    stale: NotRequired[bool]  # set by rows(): made under another rule than today's


def check(
    name: str,
    value: float,
    *,
    interval: Interval | None = None,
    controls: Mapping[str, Control] | None = None,
    seeds: Sequence[int] | None = None,
    seconds: float | None = None,
    record: Record | None = None,
) -> Card:
    """Judge a measurement by the claim's declared rule, record it, and return the card that shows both.

    Args:
        name: ``slug/id`` of a declared claim.
        value: the measured quantity, in the claim's unit.
        interval: ``(lo, hi)`` that holds the value; wanted if the rule compares intervals.
        controls: every control that the claim declares: a number that is exact, or ``(value, (lo, hi))``.
        seeds: the seeds used; left out, those that the claim declares.
        seconds: how long the measurement took.
        record: what the value was computed from, if it was not measured now: the row and its card name the record's
            machine, versions and date.

    Returns:
        the card. The row is in ``<out>/claims/<slug>--<id>.json``.

    Raises:
        ClaimError: an unknown claim, a measurement that is not finite or lies outside its interval, an interval or
            control that is missing or superfluous, rules that hold at once. The message names the claim.
    """
    claim = get(name)
    row = measure(name, value, interval=interval, controls=controls, seeds=seeds, seconds=seconds, record=record)
    lab.write_json(lab.out_dir() / "claims" / f"{claim.slug}--{claim.id}.json", row)
    return Card(claim, row)


def measure(
    name: str,
    value: float,
    *,
    interval: Interval | None = None,
    controls: Mapping[str, Control] | None = None,
    seeds: Sequence[int] | None = None,
    seconds: float | None = None,
    origin: Literal["run", "record"] = "run",
    record: Record | None = None,
) -> Row:
    """The row that :func:`check` would write, without writing it: a command that makes a record collects these.

    ``origin`` is for such a command, which measures here and now; ``record`` for values that come out of a record.
    """
    claim = get(name)
    try:
        measured = _measurement("value", value, interval)
        others = {key: _control(key, control) for key, control in (controls or {}).items()}
        took = None if seconds is None else _finite("seconds", seconds)
    except ClaimError as error:
        raise ClaimError(f"{claim.name}: {error}") from error
    return {
        "schema": SCHEMA,
        "claim": claim.name,
        **_as_json(measured),
        "controls": {key: dict(_as_json(other)) for key, other in others.items()},
        "unit": claim.unit,
        "verdict": claim.judge(measured, others),
        "rule": claim.rule,
        "rule_hash": claim.rule_hash,
        "seeds": [int(seed) for seed in (claim.seeds if seeds is None else seeds)],
        "seconds": took,
        "machine": lab.machine() if record is None else record.machine,
        "versions": lab.versions() if record is None else record.versions,
        "date": lab.now() if record is None else record.date,
        "origin": origin if record is None else "record",
    }


class _Json(TypedDict):
    value: float
    interval: list[float] | None


def _as_json(measured: Measurement) -> _Json:
    return {"value": measured.value, "interval": None if measured.interval is None else list(measured.interval)}


def _control(name: str, given: Any) -> Measurement:
    if isinstance(given, tuple | list):
        if len(given) != 2:
            raise ClaimError(f"{name}: a control is a number or (value, (lo, hi)), not {given!r}")
        return _measurement(name, given[0], given[1])
    return _measurement(name, given, None)


def _measurement(name: str, value: Any, interval: Any) -> Measurement:
    number = _finite(name, value)
    if interval is None:
        return Measurement(number)
    try:
        low, high = interval
    except (TypeError, ValueError) as error:
        raise ClaimError(f"{name}: an interval is (lo, hi), not {interval!r}") from error
    low, high = _finite(f"{name}: lo", low), _finite(f"{name}: hi", high)
    # A mean of equal numbers may miss its own percentiles by a rounding error.
    slack = 1e-9 * max(abs(low), abs(high))
    if not low - slack <= number <= high + slack:
        raise ClaimError(f"{name}: the interval ({low:g}, {high:g}) does not contain the value {number:g}")
    return Measurement(number, (low, high))


def _finite(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor of many numbers
        raise ClaimError(f"{name}: one number is wanted, not {value!r}") from error
    if not math.isfinite(number):
        raise ClaimError(f"{name}: a finite number is wanted, not {number}")
    return number


def rows(folder: Path | None = None, records: Path | None = None) -> list[Row]:
    """Every recorded row, by claim, runs before records; ``stale`` marks one that was made under another rule.

    Args:
        folder: where runs wrote their rows; left out, ``<out>/claims``.
        records: the folder of the records, whose rows with a ``claim`` are read; left out, none are.
    """
    where = lab.out_dir() / "claims" if folder is None else folder
    found = [_read_row(json.loads(file.read_text(encoding="utf-8")), file) for file in sorted(where.glob("*.json"))]
    for file in sorted(records.glob("*.json")) if records is not None else ():
        record = json.loads(file.read_text(encoding="utf-8"))
        found += [_read_row({**row, "origin": "record"}, file) for row in record.get("rows", ()) if "claim" in row]
    return sorted(found, key=lambda row: (row["claim"], row["origin"] == "record"))


def _read_row(row: Any, file: Path) -> Row:
    required = Row.__required_keys__
    if not isinstance(row, dict) or (missing := sorted(required - row.keys())):
        lacks = "" if not isinstance(row, dict) else f"; missing: {', '.join(missing)}"
        raise ClaimError(f"{file.name}: this is no row of the ledger{lacks}; make rows with claims.measure")
    if row["schema"] != SCHEMA:
        raise ClaimError(f"{file.name}: schema {row['schema']!r} of {row['claim']}; this version reads {SCHEMA}")
    claim = _declared_claim(row["claim"])
    result: Row = {**row, "stale": claim is not None and claim.rule_hash != row["rule_hash"]}  # type: ignore[typeddict-item]
    return result


def _declared_claim(name: str) -> Claim | None:
    slug, _, claim_id = name.partition("/")
    return load(slug).get(claim_id) if slug in declared() else None


def audit(slugs: Iterable[str], rows: Iterable[Row]) -> list[str]:
    """What is wrong with the ledger, one sentence each; empty if nothing is.

    Args:
        slugs: the papers whose chapters the book has: each declares at least two claims, one with a control, and
            every one of them is recorded.
        rows: what :func:`rows` found.
    """
    recorded = list(rows)
    problems = [problem for slug in slugs for problem in _audit_paper(slug, {row["claim"] for row in recorded})]
    return problems + [problem for row in recorded if (problem := _audit_row(row))]


def _audit_paper(slug: str, recorded: set[str]) -> list[str]:
    if slug not in declared():
        return [f"{slug}: no claims are declared"]
    claims = load(slug).values()
    problems = [f"{claim.name}: declared but not recorded" for claim in claims if claim.name not in recorded]
    if len(claims) < 2:
        problems.append(f"{slug}: fewer than two claims are declared")
    if not any(claim.controls for claim in claims):
        problems.append(f"{slug}: no claim has a control that could refute it")
    return problems


def _audit_row(row: Row) -> str | None:
    name, claim = row["claim"], _declared_claim(row["claim"])
    if claim is None:
        return f"{name}: recorded but not declared"
    if claim.rule_hash != row["rule_hash"]:
        return f"{name}: recorded under another rule ({row['origin']} of {row['date']}); run it again"
    if row["origin"] == "run" and tuple(row["seeds"]) != claim.seeds:
        return f"{name}: recorded with seeds {row['seeds']}, declared with {list(claim.seeds)}"
    value = _measurement("value", row["value"], row["interval"])
    controls = {key: _measurement(key, other["value"], other["interval"]) for key, other in row["controls"].items()}
    if (verdict := claim.judge(value, controls)) != row["verdict"]:
        return f"{name}: recorded as {row['verdict']!r}, but the rule says {verdict!r}"
    return None
