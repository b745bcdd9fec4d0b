"""The claims ledger: every claim of every paper, declared with its rule before it was measured.

A chapter calls ``claims.check("<slug>/<id>", value, ...)``; the page of claims and the badges in the book are built
from the rows this records.
"""

from attnlab.claims.card import Card, format_measurement, format_number
from attnlab.claims.declaration import Claim, Verdict, declared, get, load
from attnlab.claims.intervals import bootstrap, bootstrap_mean, mean_and_range
from attnlab.claims.ledger import Row, audit, check, measure, rows
from attnlab.claims.rules import ClaimError, Measurement

__all__ = [
    "Card",
    "Claim",
    "ClaimError",
    "Measurement",
    "Row",
    "Verdict",
    "audit",
    "bootstrap",
    "bootstrap_mean",
    "check",
    "declared",
    "format_measurement",
    "format_number",
    "get",
    "load",
    "mean_and_range",
    "measure",
    "rows",
]
