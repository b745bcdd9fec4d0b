"""How a judged claim is shown: what the paper says or we suppose, what we measured, the rule, the verdict."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnlab.claims.declaration import Claim
    from attnlab.claims.ledger import Row

MARKS = {"confirmed": "✓", "refuted": "✗", "not distinguishable": "≈", "different setting": "↷"}


@dataclass(frozen=True)
class Card:
    """A claim and one row of it; the last line of a cell shows it. Readable without a style sheet, and as text."""

    claim: "Claim"
    row: "Row"

    @property
    def verdict(self) -> str:
        """``confirmed``, ``refuted``, ``not distinguishable`` or ``different setting``."""
        return self.row["verdict"]

    def lines(self) -> list[tuple[str, str]]:
        """The card as pairs of a label and its text, in the order of reading."""
        claim = self.claim
        place = claim.source if claim.source_read else f"{claim.source}; quoted at second hand"
        pairs = [
            ("Our hypothesis" if claim.ours else "The paper says", claim.statement),
            ("The paper" if claim.ours else "Its value", f"{claim.paper_value} ({place})"),
            ("We measured", self._measured()),
            ("Here", f"{claim.setting}. {self._provenance()}"),
            ("Confirmed if", claim.confirm.text),
            ("Refuted if", claim.refute.text),
        ]
        if claim.applies is not None:
            pairs.append(("Applies if", claim.applies.text))
        return [*pairs, ("Verdict", f"{MARKS[self.verdict]} {self.verdict}")]

    def _measured(self) -> str:
        """The value, then the controls it is compared with."""
        number = format_measurement(self.row["value"], self.row["interval"])
        parts = [f"{number} {self.claim.unit} ({self.claim.quantity})"]
        for name, control in self.row["controls"].items():
            parts.append(f"{name} {format_measurement(control['value'], control['interval'])}")
        return "; ".join(parts)

    def _provenance(self) -> str:
        """Seeds, seconds and machine in a few words."""
        row = self.row
        machine = row["machine"]
        seeds = "seed" if len(row["seeds"]) == 1 else "seeds"
        parts = [f"{seeds.capitalize()} {', '.join(map(str, row['seeds']))}"] if row["seeds"] else ["No randomness"]
        if row["seconds"] is not None:
            parts.append(f"{format_number(row['seconds'])} s")
        parts.append(machine["gpu"] or f"{machine['cpus']} CPU cores")
        return "; ".join([*parts, row["date"][:10]])

    def __repr__(self) -> str:
        width = max(len(label) for label, _ in self.lines())
        body = "\n".join(f"  {label:<{width}}  {text}" for label, text in self.lines())
        return f"Claim {self.claim.name}\n{body}"

    def _repr_html_(self) -> str:
        rows = "\n".join(
            f"<dt>{label}</dt><dd{_data(label)}>{_code(label, html.escape(text))}</dd>" for label, text in self.lines()
        )
        return (
            f'<section class="attnlab-claim" data-verdict="{html.escape(self.verdict)}" '
            f'data-claim="{html.escape(self.claim.name)}" aria-label="Claim {html.escape(self.claim.name)}">\n'
            f"<dl>\n{rows}\n</dl>\n</section>"
        )


def _data(label: str) -> str:
    return ' class="attnlab-verdict"' if label == "Verdict" else ""


def _code(label: str, text: str) -> str:
    return f"<code>{text}</code>" if label.endswith(" if") else text


def format_measurement(value: float, interval: Sequence[float] | None) -> str:
    """``0.781 [0.754, 0.808]``: as many decimals as two digits of the interval's half-width need."""
    if interval is None:
        return format_number(value)
    low, high = interval
    if high <= low:
        return format_number(value)
    decimals = 1 - math.floor(math.log10((high - low) / 2))
    if max(abs(value), abs(low), abs(high)) >= 1e6 or decimals > 6:
        return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
    decimals = 0 if all(float(x).is_integer() for x in (value, low, high)) else max(decimals, 0)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def format_number(value: float) -> str:
    """Whole numbers below a million in full, everything else to three significant digits."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}"
