"""``{claims-ledger}``: every declared claim with what was recorded for it, and the audit that fails the build."""

from __future__ import annotations

from html import escape

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

from attnlab import claims, papers
from attnlab.claims.card import format_measurement, format_number
from attnlab_book.pages import LEDGER, HtmlDirective, badge, chapter_page, recorded, written

LOGGER = logging.getLogger(__name__)
UNRECORDED = "not recorded"
VERDICTS = ("confirmed", "refuted", "not distinguishable", "different setting", UNRECORDED)


def audit(app: Sphinx, env: BuildEnvironment) -> None:
    """Turn what is wrong with the written chapters' claims into warnings (``env-check-consistency``)."""
    slugs = [slug for slug in papers.all() if slug in written(env)]
    for problem in claims.audit(slugs, recorded(app)):
        LOGGER.warning("claims ledger: %s", problem, type="attnlab", subtype="claims")


class ClaimsLedger(HtmlDirective):
    """All declared claims as entries that can be filtered by verdict and by part."""

    def html(self) -> str:
        """Return the filter and one entry a claim."""
        self.env.metadata[self.env.docname][LEDGER] = True
        rows: dict[str, list[claims.Row]] = {}
        for row in recorded(self.env.app):
            rows.setdefault(row["claim"], []).append(row)
        declared = [slug for slug in papers.all() if slug in claims.declared()]
        entries = [
            self._entry(papers.get(slug), claim, rows.get(claim.name, []))
            for slug in declared
            for claim in claims.load(slug).values()
        ]
        parts = list(dict.fromkeys(papers.get(slug).part for slug in declared))
        return f'<div class="attnlab-ledger">{_filter(parts, len(entries))}{"".join(entries)}</div>'

    def _entry(self, paper: papers.Paper, claim: claims.Claim, rows: list[claims.Row]) -> str:
        verdict = rows[0]["verdict"] if rows else UNRECORDED
        chapter = escape(paper.headline)
        if paper.slug in written(self.env):
            chapter = f'<a href="{escape(self.uri(chapter_page(paper)))}">{chapter}</a>'
        read = "" if claim.source_read else '; <em class="attnlab-unread">quoted at second hand</em>'
        lines = [
            ("Chapter", chapter),
            ("Paper", f"{escape(claim.paper_value)} ({escape(claim.source)}{read})"),
            *(line for row in rows for line in _measured(claim, row)),
            ("Setting", escape(claim.setting)),
            *((f"{name} if", f"<code>{escape(rule)}</code>") for name, rule in _rules(claim)),
        ]
        statement = f"{'Our hypothesis: ' if claim.ours else ''}{claim.statement}"
        label = badge(verdict) if rows else f'<span class="attnlab-badge">{UNRECORDED}</span>'
        anchor = f"claim-{claim.slug}-{claim.id}"
        return (
            f'<article class="attnlab-entry" id="{escape(anchor)}" data-claim="{escape(claim.name)}" '
            f'data-verdict="{escape(verdict)}" data-part="{escape(paper.part)}" aria-labelledby="{escape(anchor)}-t">'
            f'<p class="attnlab-entry-head">{label} <code>{escape(claim.name)}</code></p>'
            f'<p class="attnlab-statement" id="{escape(anchor)}-t">{escape(statement)}</p>'
            f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in lines)}</dl></article>"
        )


def _measured(claim: claims.Claim, row: claims.Row) -> list[tuple[str, str]]:
    """Return what one row measured, its controls, and where and how long it ran."""
    value = f"{format_measurement(row['value'], row['interval'])} {row['unit']}"
    lines = [("Measured", f"<b>{escape(value)}</b> ({escape(claim.quantity)})")]
    controls = [f"{name} = {format_measurement(c['value'], c['interval'])}" for name, c in row["controls"].items()]
    if controls:
        lines.append(("Compared with", escape(", ".join(controls))))
    machine = row["machine"]
    where = [f"seeds {', '.join(map(str, row['seeds']))}" if row["seeds"] else "no randomness"]
    where += [f"{format_number(row['seconds'])} s"] if row["seconds"] is not None else []
    where += [machine["gpu"] or f"{machine['cpus']} CPU cores", row["date"][:10]]
    return [*lines, ("Record" if row["origin"] == "record" else "Run", escape(", ".join(where)))]


def _rules(claim: claims.Claim) -> list[tuple[str, str]]:
    """Return the rules that a claim has, with the word that introduces each."""
    rules = [
        ("Confirmed", claim.rule["confirm"]),
        ("Refuted", claim.rule["refute"]),
        ("Applies", claim.rule["applies"]),
    ]
    return [(name, rule) for name, rule in rules if rule is not None]


def _filter(parts: list[str], count: int) -> str:
    """Return the two choices; the script shows them, so that a page without scripts offers nothing that is dead."""
    return (
        '<form class="attnlab-filter" hidden>'
        f"<label>Verdict {_select('verdict', VERDICTS)}</label> <label>Part {_select('part', parts)}</label> "
        f'<output aria-live="polite">{count} claims</output></form>'
    )


def _select(name: str, values: tuple[str, ...] | list[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return f'<select name="{name}"><option value="">all</option>{options}</select>'
