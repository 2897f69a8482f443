"""plan.html and plan.md beside plans.json: what was planned, why, and what would change it."""

from __future__ import annotations

from pathlib import Path

from samunet.artifacts.fingerprint import Fingerprint
from samunet.artifacts.plan import Plan
from samunet.artifacts.probe import Probes
from samunet.core.files import write_text
from samunet.planners.explain import explanation
from samunet.planners.explain_pages import as_html, as_markdown
from samunet.planners.what_if import what_ifs

PAGE = "plan.html"
TEXT_PAGE = "plan.md"


def write_explanation(plan: Plan, fingerprint: Fingerprint, probes: Probes, folder: Path) -> None:
    """Plan for other budgets too, and write both pages.

    Args:
        plan: With its edits marked.
        fingerprint: What it was made from.
        probes: Those it was made with.
        folder: Where plans.json lies.
    """
    explained = explanation(plan, fingerprint, what_ifs(plan, fingerprint, probes), probes)
    write_text(folder / PAGE, as_html(explained))
    write_text(folder / TEXT_PAGE, as_markdown(explained))
