"""Every claim holds, does not hold or can't be told, as its data were planted; later claims need later seeds."""

import numpy as np
import pytest
from refusals import one_line

from psycopref.core.paper import resource_path
from psycopref.experiments.findings import decide, describe_findings, differences, findings_table, paper_difference
from psycopref.experiments.findings import read_findings, sized_backbones
from psycopref.experiments.seeds import TEXT_READERS

FINDINGS = read_findings()
CLAIMS = {claim.id: claim for claim in FINDINGS.claims}
SMALL, LARGE, N = "Tiny-135M", "Big-1.5B", 120
TEXT = resource_path("findings.yaml").read_text(encoding="utf-8")


def planted_share(share, shift=0):
    "A string of N wins with a share of ones, spread over the speeches; shift: begins elsewhere."
    won = np.floor(np.arange(1, N + 1) * share) > np.floor(np.arange(N) * share)
    return "".join("01"[int(own)] for own in np.roll(won, shift))


def planted_ratings(mean, shift=0):
    "N ratings from 1 to 5 of a mean between 3 and 5."
    return [3 + 2 * int(own) for own in planted_share((mean - 3) / 2, shift)]


def planted_row(of, values, backbone=SMALL):
    return {"of": of, "backbone": backbone, "on": "list", "values": values}


def seed_with(rows, number=1, **changes):
    record = {"profile": "laptop", "seed": number, "changed": {}, "backbones": [LARGE, SMALL], "rows": rows}
    return record | {"lists": {"list": [f"s{i}" for i in range(N)]}} | changes


def planted(claim, points, seeds=(1, 2, 3)):
    "Seeds in which the two sides of a claim lie so many points apart, or points of a rating."
    make, middle = (planted_ratings, 4.0) if claim.scale[0] == 1 else (planted_share, 0.5)
    far = points / claim.scale[0]
    records = []
    for number in seeds:
        rows = []
        for side, sign in zip(claim.sides, (1, -1)):
            of, _, size = side.partition("@")
            if of.replace(".", "", 1).isdigit():
                continue
            alone = claim.sides[1].replace(".", "", 1).isdigit()
            value = float(claim.sides[1]) + far if alone else middle + sign * far / 2
            backbone = {"largest": LARGE, "smallest": SMALL, "": SMALL}[size]
            for name in [f"right/{reader}/test" for reader in TEXT_READERS] if "best reader" in of else [of]:
                rows.append(planted_row(name, make(value, 17 * number * (sign < 0)), backbone))
        records.append(seed_with(rows, number))
    return records


def verdict(claim, points, **more):
    return decide(planted(claim, points, **more), claim, SMALL)


def far(claim):
    "How far from a margin is far enough to be told."
    return 0.8 if claim.scale[0] == 1 else 30


each_claim = pytest.mark.parametrize("name", CLAIMS)


@each_claim
def test_a_claim_holds_where_its_data_lie_above_the_margin(name):
    claim = CLAIMS[name]
    found = verdict(claim, claim.margin + far(claim))
    assert found["outcome"] == "holds" and found["low"] > claim.margin and found["seeds"] == 3 and found["n"] == N


@each_claim
def test_a_claim_does_not_hold_where_its_data_lie_below_the_margin(name):
    claim = CLAIMS[name]
    found = verdict(claim, claim.margin - far(claim))
    assert found["outcome"] == "does not hold" and found["high"] < claim.margin


@each_claim
def test_a_claim_can_t_be_told_where_its_data_lie_at_the_margin(name):
    claim = CLAIMS[name]
    found = verdict(claim, claim.margin)
    assert found["outcome"] == "can't tell" and found["low"] <= claim.margin <= found["high"]
    assert found["estimate"] == pytest.approx(claim.margin, abs=0.05 if claim.scale[0] == 1 else 2)


@each_claim
def test_without_its_rows_a_claim_is_not_measured(name):
    claim = CLAIMS[name]
    said = "can't tell: not run" if "@" in claim.estimate else "not measured"
    assert decide([seed_with([])], claim, SMALL) == {"claim": claim.text, "backbone": SMALL, "outcome": said}


LATER = [claim for claim in FINDINGS.claims if claim.laid_down]


def test_the_paper_s_claims_are_all_in_the_list_and_later_ones_say_when():
    asked = {"online-above-offline", "bigger-is-better", "above-the-reference", "length-costs-little"}
    assert asked | {"counselling-above-general", "mixing-keeps-counselling"} <= set(CLAIMS) and len(CLAIMS) == 12
    assert {claim.id for claim in LATER} == {"bigger-is-better", "above-the-reference", "counselling-above-general"}
    assert all(claim.laid_down.startswith("2026-12-01") and claim.seen == (0,) for claim in LATER)
    assert [paper_difference(claim) for claim in LATER] == [17.6, 37.0, 10.5]


@pytest.mark.parametrize("claim", LATER, ids=lambda claim: claim.id)
def test_a_later_claim_is_not_decided_by_the_seed_that_was_seen(claim):
    first, later = planted(claim, far(claim), seeds=(0,)), planted(claim, -far(claim), seeds=(1, 2))
    alone, both = decide(first, claim, SMALL), decide(first + later, claim, SMALL)
    assert alone["outcome"] == "not decided: later than seed 0" and alone["estimate"] > 0, "shown, and no verdict"
    assert both == decide(later, claim, SMALL) and both["outcome"] == "does not hold" and both["seeds"] == 2


def test_a_claim_of_before_is_decided_by_every_seed():
    claim = CLAIMS["dpo-above-base"]
    assert verdict(claim, 30, seeds=(0,))["outcome"] == "holds" and not claim.seen


def test_sizes_are_read_from_names_and_the_order_of_the_profile_does_not_matter():
    claim = CLAIMS["bigger-is-better"]
    records = planted(claim, 30)
    turned = [record | {"backbones": [SMALL, LARGE]} for record in records]
    assert sized_backbones(records) == sized_backbones(turned) == [SMALL, LARGE]
    assert decide(turned, claim, SMALL)["estimate"] == decide(records, claim, LARGE)["estimate"] > 0
    assert sized_backbones([{"backbones": ["Llama-3.1-8B-Instruct", "Qwen2.5-0.5B", "nameless"]}])[0] == "Qwen2.5-0.5B"
    assert differences([record | {"backbones": [SMALL]} for record in records], claim, SMALL).empty


def test_the_table_has_the_claim_of_all_sizes_once_and_others_for_each_backbone():
    table = findings_table(planted(CLAIMS["bigger-is-better"], 30))
    own = table[table.claim == CLAIMS["bigger-is-better"].text]
    assert own.backbone.tolist() == ["largest and smallest"] and own.outcome.tolist() == ["holds"]
    assert len(table) == 2 * (len(CLAIMS) - 1) + 1
    assert set(own["laid down"]) == {CLAIMS["bigger-is-better"].laid_down}
    assert table["laid down"].eq("before the first seed").sum() == 2 * (len(CLAIMS) - len(LATER))


def test_the_sentence_counts_what_was_not_run_as_not_told():
    records = [record | {"backbones": [SMALL]} for record in planted(CLAIMS["dpo-above-base"], 30, seeds=(0,))]
    assert describe_findings(findings_table(records)) == ["Of 12 claims: 1 holds, 1 can't tell; 10 not measured."]
    demo = [record | {"profile": "demo"} for record in records]
    said = ["Of 12 claims: 1 can't tell; 10 not measured and 1 not decided."]
    assert describe_findings(findings_table(demo)) == said


@pytest.mark.parametrize("name", ["length-costs-little", "mixing-keeps-counselling"])
def test_a_claim_with_an_allowance_holds_where_nothing_is_lost(name):
    record = planted(CLAIMS[name], 0, seeds=(1,))[0]
    record["rows"][1]["values"] = record["rows"][0]["values"]
    found = decide([record], CLAIMS[name], SMALL)
    assert found["estimate"] == 0 and found["low"] < 0 and found["outcome"] == "holds"


def test_a_misspelt_field_of_a_claim_is_one_line():
    said = one_line(lambda: read_findings(TEXT.replace("  seen: [0]", "  seed: [0]", 1)))
    assert said.startswith("findings.yaml: ") and "seed" in said and said.endswith("mend the file")
