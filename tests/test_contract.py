"""The contract checker: every rule fails for a servable that breaks it, and for no other."""

import json
import re
import shutil

import pytest
from broken_servables import (
    GALLERY,
    UNPARSABLE,
    VERSION,
    predict_log,
    write_good_servable,
    write_warmup,
)

from export.contract_rules import RULES, check_servable, failures


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    base = tmp_path_factory.mktemp("good") / "shop"
    write_good_servable(base)
    return base


def status_of(results):
    return {result.rule.id: (result.finding.status, result.finding.found) for result in results}


@pytest.fixture(scope="module")
def good_results(good):
    return check_servable(good)


def test_a_good_servable_passes_every_rule_that_applies(good_results):
    others = {rule: found for rule, (status, found) in status_of(good_results).items() if status != "pass"}
    assert others == {"manifest_files": "there is no assets.extra/manifest.json"}
    assert {result.rule.id for result in good_results} == {rule.id for rule in RULES}


@pytest.mark.parametrize("broken", GALLERY, ids=lambda broken: broken.name)
def test_a_broken_servable_breaks_the_rules_it_names_and_no_other(good, tmp_path, broken):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    results = check_servable(broken.break_it(base) or base)
    found = {rule: entry for rule, entry in status_of(results).items() if entry[0] in ("fail", "warning")}
    assert {rule: status for rule, (status, _) in found.items()} == {
        rule: status for rule, (status, _) in broken.expected.items()
    }, found
    for rule, (_, pattern) in broken.expected.items():
        assert re.search(pattern, found[rule][1], re.DOTALL), found[rule][1]


def test_every_rule_has_a_broken_servable_and_says_why():
    assert {rule.id for rule in RULES} == {rule for broken in GALLERY for rule in broken.expected}
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.title
        assert len(rule.why) > 20, rule.id


def test_no_recorded_value_is_told(good, tmp_path):
    base = tmp_path / "shop"
    shutil.copytree(good, base)
    write_warmup(base / VERSION, [predict_log("", examples=[UNPARSABLE])])
    results = check_servable(base)
    assert {"warmup_replay", "batch_sizes"} <= {result.rule.id for result in failures(results)}
    assert "secret" not in json.dumps([result.to_dict() for result in results])
