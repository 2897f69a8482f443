"""Explanations: every decision of the schema with its value, reason, facts and what would change it."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from samunet.artifacts.fingerprint import MirrorPair
from samunet.artifacts.plan import Configuration, Decided, Plan, Recipe
from samunet.artifacts.probe import Probes
from samunet.core.config import Schema
from samunet.planners.edits import decisions, edits_of
from samunet.planners.explain import explain, explanation, shortages, summary
from samunet.planners.explain_pages import as_html, as_markdown
from samunet.planners.planner import make_plan
from samunet.planners.rests_on import RESTS_ON, measured, rests_on
from samunet.planners.what_if import what_ifs
from samunet.planners.words import short
from tests import planning_facts as facts
from tests.planted_probe import make_probe

FINGERPRINT = facts.fingerprint([facts.case()] * 5)
ODD = "<b>&'organ|\"</b>"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(FINGERPRINT, facts.description(), facts.budget())


def fields(schema: type[Schema]) -> list[str]:
    """Names of a schema's decisions, whatever their type."""
    return [name for name, field in schema.model_fields.items() if "Decided" in str(field.annotation)]


def test_the_schemas_decisions_are_found() -> None:
    """The list that the other tests go by is not empty by accident."""
    assert {"frame", "recommended"} <= set(fields(Plan))
    assert {"depth_overlap", "slab_depth", "normalization"} <= set(fields(Configuration))
    assert {"augmentation", "mirror_views", "memory_gib"} <= set(fields(Recipe))
    assert "configurations" not in fields(Plan)


def test_every_decision_knows_what_it_rests_on(plan: Plan) -> None:
    """Each field of the schema has an entry, every fact named there is measured, and no entry is left over."""
    every = {name for schema in (Plan, Configuration, Recipe) for name in fields(schema)}
    assert set(RESTS_ON) == every
    known = measured(plan, FINGERPRINT)
    assert {fact for place, _ in decisions(plan) for fact in rests_on(place)} <= set(known)
    assert all(known.values())


@pytest.mark.parametrize("schema", [Plan, Configuration, Recipe])
def test_every_decision_appears(plan: Plan, schema: type[Schema]) -> None:
    """In the terminal, in Markdown and on the page, with its value, its reason and what would change it."""
    made = explanation(plan, FINGERPRINT, what_ifs(plan, FINGERPRINT))
    texts = [explain(plan, FINGERPRINT), as_markdown(made), html.unescape(as_html(made))]
    part = {
        Plan: plan,
        Configuration: plan.configuration(),
        Recipe: plan.configuration().recipes["sam"]["gpu"],
    }[schema]
    for name in fields(schema):
        decided = getattr(part, name)
        if decided is None:  # a configuration without normalization of its own
            continue
        assert isinstance(decided, Decided)
        for text in texts:
            together = " ".join(text.split())
            assert name in together
            assert " ".join(decided.reason.split()) in together
            assert short(decided.value) in together
    rows = [row for c in made.configurations for section in c.sections for row in section.rows]
    assert all(row.changes and all(row.changes) for row in (*made.data.rows, *rows))


def test_every_configuration_and_recipe_is_on_the_pages(plan: Plan) -> None:
    """Also the own normalization of a configuration, and recipes that differ in one thing only."""
    made = explanation(plan, FINGERPRINT)
    assert {c.name for c in made.configurations} == set(plan.configurations)
    for text in (as_markdown(made), html.unescape(as_html(made))):
        assert "window_to_01" in text or "percentiles_to_01" in text
        assert text.count("Recipe for weights") == sum(
            len(devices) for c in plan.configurations.values() for devices in c.recipes.values()
        )


class _Page(HTMLParser):
    """Collects tags, and complains of those that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(plan: Plan) -> None:
    """Well-formed, without scripts or addresses; a structure named like markup stays text."""
    page = _Page()
    pairs = [MirrorPair(first=ODD, second="other", axis="left-right", evidence="name")]
    odd = facts.fingerprint([facts.case()] * 3, pairs=pairs, channels=(ODD,))
    found = make_plan(odd, facts.description(channels=(ODD,)), facts.budget())
    text = as_html(explanation(found, odd))
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in page.seen}
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.seen)
    assert "http" not in text
    assert html.escape(ODD) in text
    markdown = as_markdown(explanation(found, odd))
    assert "<b>" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| `")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_the_users_decisions_are_marked(plan: Plan) -> None:
    """Wherever they are shown, with what the rule says."""
    content = plan.model_dump(mode="json")
    content["mirror_axes"] = {"value": [], "reason": "because", "source": "user"}
    edited = make_plan(FINGERPRINT, facts.description(), facts.budget(), edits=edits_of(Plan.model_validate(content)))
    made = explanation(edited, FINGERPRINT)
    mark = f"[yours; by rule {short(plan.mirror_axes.value)}] because"
    assert mark in " ".join(explain(edited, FINGERPRINT).split())
    assert mark in as_markdown(made)
    assert '<span class="yours">[yours' in as_html(made)
    assert "[yours" not in as_html(explanation(plan, FINGERPRINT))


def test_turned_cases_count_their_own_slices() -> None:
    """The lead counts along each case's slice axis, as the facts below it do."""
    upright = facts.case(shape=(20, 100, 100), spacing=(5, 1, 1))
    turned = facts.case(shape=(100, 100, 20), spacing=(1, 1, 5), codes=("R", "A", "S"))
    data = facts.fingerprint([upright, upright, turned])
    found = make_plan(data, facts.description(), facts.budget())
    made = explanation(found, data)
    assert "60 slices (30 with a structure)" in made.lead[0]
    assert dict(made.facts)["slices"].startswith("60, 30 ")


def test_the_summary_tells_hardware_and_edits(plan: Plan) -> None:
    """What it was planned for with where that comes from, and what is the user's."""
    content = plan.model_dump(mode="json")
    content["mirror_axes"] = {"value": ["left-right"], "reason": "because", "source": "user"}
    budget = facts.budget().model_copy(update={"reason": "GPU memory assumed"})
    edits = edits_of(Plan.model_validate(content))
    text = " ".join(summary(make_plan(FINGERPRINT, facts.description(), budget, edits=edits)).split())
    assert "for 8 GiB on a GPU, or 16 GiB and 60 minutes on a CPU (GPU memory assumed)" in text
    assert "yours: mirror_axes = left-right" in text
    assert "yours" not in summary(plan)


def test_recipes_that_lack_memory_or_minutes_are_named(plan: Plan) -> None:
    """One line for each, with what is missing; none where all is well."""
    assert shortages(plan) == []
    tight = make_plan(FINGERPRINT, facts.description(), facts.budget(gpu=0.9))
    lines = shortages(tight)
    recipes = tight.configuration().recipes
    short_ones = [name for name, by_device in recipes.items() if by_device["gpu"].memory_gib.value > 0.9]
    assert short_ones
    assert [line.split(" on a GPU: needs about ")[0] for line in lines] == short_ones
    assert all(line.endswith("GiB, and 0.9 are planned for") for line in lines)
    hurried = make_plan(FINGERPRINT, facts.description(), facts.budget(minutes=0.2))
    assert any("none on a CPU: about" in line and "--minutes" in line for line in shortages(hurried))
    reason = hurried.configuration().recipes["none"]["cpu"].input_size.reason
    assert "even that leaves" in reason


def test_a_probes_ranks_are_shown_block_by_block() -> None:
    """The summary names their range, the reason all of them."""
    values = [[10.0 / (block + 1)] * 8 for block in range(12)]
    probe = make_probe(values, backbone="vit_b", facts=FINGERPRINT).model_copy(update={"configuration": "2.5d"})
    probes = Probes(probes=(probe,))
    found = make_plan(FINGERPRINT, facts.description(), facts.budget(), probes=probes)
    ranks = found.configuration().recipes["sam"]["gpu"].encoder.value.adapters[0].ranks
    text = " ".join(explain(found, FINGERPRINT, probes=probes).split())
    assert f"rank by block: {' '.join(map(str, ranks))}" in text
    assert "2.5d, sam, vit_b" in text
    stale = Probes(probes=(probe.model_copy(update={"fingerprint_sha256": "0" * 64}),))
    assert measured(found, FINGERPRINT, probes)["probe"] == "2.5d, sam, vit_b"
    assert measured(found, FINGERPRINT, stale)["probe"].startswith("none")
