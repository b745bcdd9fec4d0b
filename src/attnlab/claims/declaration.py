"""What is declared: the claims of each paper, read from ``<slug>.toml`` beside this file and checked when read.

A claim is written down before its experiment is tuned: what the paper states, where, what we measure instead, and the
rules that would confirm and refute it.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from attnlab import papers
from attnlab.claims.rules import ClaimError, Measurement, Rule, parse

Verdict = Literal["confirmed", "refuted", "not distinguishable", "different setting"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Claim:
    """One claim as the TOML declares it.

    Attributes:
        slug: the paper.
        id: the claim's name within the paper.
        statement: what the paper states, in our words; or, where ``ours``, our hypothesis.
        paper_value: the paper's own number or finding.
        source: where the paper says it.
        source_read: whether we read that place ourselves (False: quoted at second hand).
        quantity: what we measure.
        unit: its unit.
        confirm: the rule that confirms.
        refute: the rule that refutes.
        setting: what we measure it on.
        applies: the rule that must hold for the experiment to speak about the claim at all.
        seeds: the seeds that the experiment uses.
        controls: names of the further measurements that the rules compare with.
        ours: the paper does not make this statement; it is our hypothesis.
    """

    slug: str
    id: str
    statement: str
    paper_value: str
    source: str
    source_read: bool
    quantity: str
    unit: str
    confirm: Rule
    refute: Rule
    setting: str
    seeds: tuple[int, ...]
    applies: Rule | None = None
    controls: tuple[str, ...] = ()
    ours: bool = False

    @property
    def name(self) -> str:
        """``slug/id``."""
        return f"{self.slug}/{self.id}"

    @property
    def rule(self) -> dict[str, str | None]:
        """The texts of the rules."""
        applies = None if self.applies is None else self.applies.text
        return {"confirm": self.confirm.text, "refute": self.refute.text, "applies": applies}

    @property
    def rule_hash(self) -> str:
        """Changes whenever a measurement would be judged otherwise: with the rules, the controls, quantity or unit."""
        judged_by = [self.rule, sorted(self.controls), self.quantity, self.unit]
        return hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest()[:16]

    def judge(self, value: Measurement, controls: Mapping[str, Measurement]) -> Verdict:
        """The verdict, by the rules alone; a :class:`ClaimError` names the claim."""
        try:
            if wrong := sorted(controls.keys() ^ set(self.controls)):
                raise ClaimError(f"controls: {_wanted(self.controls)}; missing or superfluous: {', '.join(wrong)}")
            return self._judge({"value": value, **controls})
        except ClaimError as error:
            raise ClaimError(f"{self.name}: {error}") from error

    def _judge(self, measured: Mapping[str, Measurement]) -> Verdict:
        if self.applies is not None and not self.applies(measured):
            return "different setting"
        confirmed, refuted = self.confirm(measured), self.refute(measured)
        if confirmed and refuted:
            both = f"{self.confirm.text!r} and {self.refute.text!r}"
            raise ClaimError(f"confirm and refute must exclude each other, but {both} hold for {dict(measured)}")
        if confirmed:
            return "confirmed"
        return "refuted" if refuted else "not distinguishable"


def declared() -> list[str]:
    """The slugs whose claims are declared, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(slug: str) -> dict[str, Claim]:
    """The claims of one paper by id, in the order of the file."""
    if slug not in declared():
        raise ClaimError(f"{slug}: no claims are declared for this paper; {papers.did_you_mean(slug, declared())}")
    return dict(_load(FOLDER / f"{slug}.toml"))


def get(name: str) -> Claim:
    """The claim ``slug/id``."""
    slug, _, claim_id = name.partition("/")
    claims = load(slug)
    if claim_id not in claims:
        raise ClaimError(f"{name}: no such claim; {papers.did_you_mean(claim_id, claims)}")
    return claims[claim_id]


def _load(file: Path) -> dict[str, Claim]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClaimError(f"{file.name}: no TOML: {error}") from error
    return {claim_id: _read_claim(file.stem, claim_id, table) for claim_id, table in tables.items()}


_TYPES: dict[str, type] = {
    "source_read": bool,
    "ours": bool,
    "seeds": list,
    "controls": list,
}  # every other field is text
_REQUIRED = {field.name for field in fields(Claim) if field.default is MISSING} - {"slug", "id"}
_OPTIONAL = {field.name for field in fields(Claim) if field.default is not MISSING}


def _read_claim(slug: str, claim_id: str, table: Any) -> Claim:
    """One table of the TOML, checked: every complaint names the claim."""
    try:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", claim_id):
            raise ClaimError("an id is lower-case words and digits joined by '-'")
        if not isinstance(table, dict):
            raise ClaimError("a claim is a table of fields")
        _check_fields(table)
        controls = tuple(table.get("controls", ()))
        rules = {key: _read_rule(key, table[key], controls) for key in ("confirm", "refute", "applies") if key in table}
        _check_names(rules, controls)
        return Claim(slug, claim_id, **{**table, **rules, "seeds": tuple(table["seeds"]), "controls": controls})
    except ClaimError as error:
        raise ClaimError(f"{slug}/{claim_id}: {error}") from error


def _check_fields(table: dict[str, Any]) -> None:
    if missing := sorted(_REQUIRED - table.keys()):
        raise ClaimError(f"missing: {', '.join(missing)}")
    if unknown := sorted(table.keys() - _REQUIRED - _OPTIONAL):
        raise ClaimError(f"unknown: {', '.join(unknown)}; {papers.did_you_mean(unknown[0], _REQUIRED | _OPTIONAL)}")
    for key, value in table.items():
        wanted = _TYPES.get(key, str)
        if not isinstance(value, wanted):
            raise ClaimError(f"{key}: {wanted.__name__} is wanted, not {value!r}")
        if value == "":
            raise ClaimError(f"{key}: is empty")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in table["seeds"]):
        raise ClaimError(f"seeds: a list of integers is wanted, not {table['seeds']!r}")
    for name in table.get("controls", ()):
        if not (isinstance(name, str) and name.isidentifier() and name != "value"):
            raise ClaimError(f"controls: a name other than 'value' that a rule can use is wanted, not {name!r}")


def _read_rule(key: str, text: str, controls: Sequence[str]) -> Rule:
    try:
        return parse(text, ("value", *controls))
    except ClaimError as error:
        raise ClaimError(f"{key}: {error}") from error


def _check_names(rules: Mapping[str, Rule], controls: Sequence[str]) -> None:
    """A verdict must depend on the value, and a control that no rule looks at controls nothing."""
    if "value" not in rules["confirm"].names:
        raise ClaimError("confirm: the rule does not look at 'value'")
    used = {name for rule in rules.values() for name in rule.names}
    if idle := sorted(set(controls) - used):
        raise ClaimError(f"controls: no rule looks at {', '.join(idle)}")


def _wanted(controls: Sequence[str]) -> str:
    return f"the claim declares {', '.join(controls)}" if controls else "the claim declares none"
