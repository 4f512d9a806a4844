"""Merged seeds: a by-hand calculation, what may not be merged, and claims decided as the truth is."""

import copy
import json

import numpy as np
import pytest
from refusals import one_line
from scipy.stats import norm, t

from psycopref.core.stages import project_root
from psycopref.experiments import findings, seeds
from psycopref.run.results import merge_lines, write_readme
from psycopref.stats.intervals import mean_interval, seed_interval

STAGE = {"settings": {"dpo.beta": 0.1}, "code": "a" * 64, "commit": "c", "versions": {"torch": "2"}, "processor": "x"}
STAGE |= {"own": True, "seconds": 90.0, "finished": "2026-12-01T00:00:00Z"}
POLICIES = ("base", "dpo", "dpo-iter")
CLAIMS = {claim.id: claim for claim in findings.read_findings().claims}


def ones(won):
    return "".join("01"[int(own)] for own in won)


def seed_of(number, won, profile="laptop", **changes):
    """A seed's record; won: policy -> who won which speech."""
    n = len(next(iter(won.values())))
    rows = [{"of": f"win/{name}/free", "backbone": "m", "on": "test", "values": ones(own)} for name, own in won.items()]
    made = {"profile": profile, "seed": number, "changed": {}, "backbones": ["m"], "dtype": "float32", "weights": {}}
    made |= {"rater": "rater", "judge": "judge", "reference": "reference", "speeches": "s" * 64, "pairs": "p" * 64}
    made |= {"calibration": {"m": {"AUC": 0.7, "ECE": 0.1, "Brier": 0.2}}, "stages": {"06_policy": STAGE}}
    return made | {"lists": {"test": [f"s{i}" for i in range(n)]}, "rows": rows, "tables": {}} | changes


def drawn(chance, rates, n=126, spread=0.0, hardness=0.3, count=3):
    """Seeds of which the truth is known: a speech is harder than another, a training luckier than another."""
    speech, found = chance.uniform(-hardness, hardness, n), []
    for number in range(count):
        p = {name: rate + speech + chance.normal(0, spread) for name, rate in rates.items()}
        found.append(seed_of(number, {name: chance.random(n) < own for name, own in p.items()}))
    return found


def test_a_merged_file_equals_a_calculation_by_hand():
    won = np.array([[1, 1, 0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0]])
    records = [seed_of(number, {"dpo": own, "base": 1 - own}) for number, own in enumerate(won)]
    for record in records:
        seeds.write_seed(record)
    table = seeds.seed_table(seeds.read_seeds("laptop")).set_index("result").loc["m + DPO, win rate free, %"]
    assert (table["mean over seeds"], table["each seed"]) == (58.3, "62.5 · 37.5 · 75.0") and table.n == "8 speeches"
    assert table["SD over seeds"] == round(float(np.std([62.5, 37.5, 75], ddof=1)), 1) == 19.1
    low, high = mean_interval(won.ravel(), np.tile(np.arange(8), 3))
    between, ends = won.mean(axis=1).var(ddof=1) / 3, []
    for side, sign in ((won.mean() - low, -1), (high - won.mean(), 1)):
        within = (side / norm.ppf(0.975)) ** 2
        degrees = (within + between) ** 2 / (within**2 / 7 + between**2 / 2)
        ends.append(100 * (won.mean() + sign * t.ppf(0.975, degrees) * np.sqrt(within + between)))
    assert table["95% interval"] == f"{ends[0]:.1f} to {ends[1]:.1f}" and ends[0] < 100 * low < 100 * high < ends[1]


def test_one_seed_is_one_and_two_are_two():
    won = {"dpo": [1, 0, 1, 1]}
    alone = seeds.seed_table([seed_of(0, won)]).iloc[0]
    ends = [100 * end for end in mean_interval([1, 0, 1, 1])]
    assert alone["95% interval"] == "{:.1f} to {:.1f}".format(*ends) and alone["SD over seeds"] is None
    assert "is not measured" in seeds.seed_words([seed_of(0, won)])
    assert seeds.seed_words([seed_of(0, won), seed_of(1, won)]).startswith("2 seeds (0, 1), trained anew on the same")
    own = [seed_of(0, won), seed_of(1, won, pairs="q")]
    assert "each with answers, pairs and trainings of its own" in seeds.seed_words(own)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"stages": {"06_policy": STAGE | {"settings": {"dpo.beta": 0.2}}}},
            "found dpo.beta 0.2 in 06_policy, expected 0.1",
        ),
        ({"stages": {"06_policy": STAGE | {"settings": {}}}}, "found dpo.beta null in 06_policy, expected 0.1"),
        (
            {"stages": {"06_policy": STAGE | {"code": "b" * 64}}},
            "found code bbbbbbbbbb of 06_policy, expected aaaaaaaaaa",
        ),
        ({"stages": {"06_policy": STAGE | {"code": None}}}, "found code unknown of 06_policy"),
        ({"stages": {}}, "found no stage 06_policy"),
        ({"speeches": "t" * 64}, "found speeches tttttttttt (texts and split), expected ssssssssss"),
    ],
)
def test_seeds_of_other_settings_code_or_speeches_are_not_merged(change, said):
    for record in (seed_of(0, {"dpo": [1, 0]}), seed_of(1, {"dpo": [1, 0]}, **change)):
        seeds.write_seed(record)
    assert (line := one_line(lambda: merge_lines("laptop"))).startswith("results/laptop/seed-1.json: ") and said in line
    (project_root() / "results/laptop/seed-1.json").unlink()
    assert "seed 0 alone" in merge_lines("laptop")[0]


def test_trainings_and_whole_repetitions_are_not_merged_and_a_file_keeps_its_name():
    won = {"dpo": [1, 0]}
    mixed = [seed_of(0, won), seed_of(1, won), seed_of(2, won, pairs="q")]
    assert "found 2 sets of pairs among 3 seeds" in one_line(lambda: seeds.check_seeds(mixed))
    place = seeds.write_seed(mixed[0])
    place.rename(place.with_name("seed-4.json"))
    assert "found profile laptop, seed 0" in one_line(lambda: seeds.read_seeds("laptop"))
    assert seeds.read_seeds("demo") == [] and "found no seed-N.json" in one_line(lambda: merge_lines("demo"))


def test_a_seed_s_file_is_small_and_names_no_place_of_the_machine():
    record = seed_of(0, {"dpo": [1, 0]})
    place = seeds.write_seed(record)
    assert json.loads(place.read_text()) == record
    for change in ({"judge": "local:/home/me/judge"}, {"tables": {"S1": "x" * 300_000}}):
        said = one_line(lambda change=change: seeds.write_seed(record | change))
        assert "a path of this machine" in said or "expected at most 300,000" in said
    assert json.loads(place.read_text()) == record, "what was there stays"


def test_readme_s_table_is_written_for_the_profile_that_readme_names():
    path = project_root() / "README.md"
    path.write_text("a\n<!-- results: laptop -->\nold\n<!-- end of results -->\nb\n")
    seeds.write_seed(seed_of(0, {name: [1, 0, 1] for name in POLICIES}))
    seeds.write_seed(seed_of(0, {"dpo": [1, 0, 1]}, "demo"))
    assert write_readme("demo") == [] and "old" in path.read_text()
    assert write_readme("laptop") == ["README.md: the table of laptop"]
    text = path.read_text()
    assert text.startswith("a\n<!-- results: laptop -->\n*Profile `laptop`, seed 0 alone") and text.endswith("\nb\n")
    assert "old" not in text and "| m + DPO, win rate free | 66.7% |" in text and "| can't tell |" in text


@pytest.mark.parametrize("count, spread, least", [(1, 0.0, 0.92), (2, 0.03, 0.92), (3, 0.0, 0.93), (3, 0.06, 0.92)])
def test_the_interval_over_seeds_covers(count, spread, least):
    chance, inside, n = np.random.default_rng(count), [], 60
    clusters, number = np.tile(np.arange(n), count), np.repeat(np.arange(count), n)
    for _ in range(400):
        p = 0.5 + chance.uniform(-0.3, 0.3, n) + chance.normal(0, spread, (count, 1))
        _, low, high = seed_interval((chance.random((count, n)) < p).ravel(), clusters, number)
        inside.append(low <= 0.5 <= high)
    assert np.mean(inside) >= least - 2 * np.sqrt(0.05 * 0.95 / 400)


def test_without_seeds_in_it_an_interval_would_not_cover():
    chance, inside, n = np.random.default_rng(0), [], 60
    for _ in range(300):
        p = 0.5 + chance.uniform(-0.3, 0.3, n) + chance.normal(0, 0.12, (3, 1))
        low, high = mean_interval((chance.random((3, n)) < p).ravel(), np.tile(np.arange(n), 3))
        inside.append(low <= 0.5 <= high)
    assert np.mean(inside) < 0.8


@pytest.mark.parametrize(
    "rates, expected", [((0.35, 0.6), "holds"), ((0.6, 0.35), "does not hold"), ((0.5, 0.52), "can't tell")]
)
def test_a_claim_is_decided_as_the_truth_is(rates, expected):
    chance, outcomes = np.random.default_rng(3), []
    for _ in range(20):
        records = drawn(chance, dict(zip(("base", "dpo"), rates)), spread=0.02)
        found = findings.decide(records, CLAIMS["dpo-above-base"], "m")
        share = [[row["values"].count("1") / 126 for row in record["rows"]] for record in records]
        assert found["estimate"] == pytest.approx(100 * np.mean([dpo - base for base, dpo in share]))
        assert (found["seeds"], found["n"]) == (3, 126)
        outcomes.append(found["outcome"])
    assert outcomes.count(expected) >= 17, outcomes


def test_a_claim_at_its_margin_holds_by_chance_no_more_often_than_said():
    chance = np.random.default_rng(4)
    outcomes = [
        findings.decide(drawn(chance, {"base": 0.5, "dpo": 0.5}, 60, 0.03), CLAIMS["dpo-above-base"], "m")["outcome"]
        for _ in range(200)
    ]
    assert outcomes.count("holds") <= 12 and outcomes.count("does not hold") <= 12  # 2.5% of 200, and chance


def test_a_margin_below_nothing_asks_for_no_great_loss():
    rows = [("length", "0111"), ("free", "1111")]
    record = seed_of(0, {"dpo": [1] * 4})
    record["rows"] = [{"of": f"win/dpo-iter/{s}", "backbone": "m", "on": "test", "values": 30 * v} for s, v in rows]
    record["lists"] = {"test": [f"s{i}" for i in range(120)]}
    lost = findings.decide([record], CLAIMS["length-costs-little"], "m")
    assert lost["estimate"] == -25 and lost["outcome"] == "does not hold"
    record["rows"][0]["values"] = 30 * "1111"
    assert findings.decide([record], CLAIMS["length-costs-little"], "m")["outcome"] == "holds"


def test_other_profiles_and_changed_settings_decide_nothing():
    won = {"base": [0] * 40, "dpo": [1] * 40}
    for record in (seed_of(0, won, "demo"), seed_of(0, won, changed={"dpo.beta": 0.2})):
        table = findings.findings_table([record])
        assert set(table.outcome.str.split(":").str[0]) == {"not decided", "not measured", "can't tell"}
        assert table.outcome[table.outcome.str.startswith("can't tell")].tolist() == ["can't tell: not run"]
        assert table.estimate[0] == "+100.0"


def test_a_toss_is_the_author_s_name_within_one_author():
    record = seed_of(0, {"dpo": [1]})
    record["lists"]["pairs/one-author"] = [f"s{i // 2}" for i in range(80)]
    right = {"of": "right/reward/one-author", "backbone": "m", "on": "pairs/one-author", "values": 60 * "1" + 20 * "0"}
    found = findings.decide([record | {"rows": [right]}], CLAIMS["reward-within-author"], "m")
    assert found["estimate"] == 25 and found["outcome"] == "holds" and found["n"] == 80


def test_the_file_of_claims_is_whole_and_a_wrong_one_is_one_line():
    text = findings.resource_path("findings.yaml").read_text()
    known = "win/ arm/ right/ mixed/ safety/".split()
    for claim in CLAIMS.values():
        assert all(any(side.startswith(own) for own in known) or float(side) == 0.5 for side in claim.sides)
        assert claim.paper == () or isinstance(findings.paper_difference(claim), float)
    assert {*findings.read_findings().decision} == {"holds", "does not hold", "can't tell"}
    for wrong in (text.replace("margin: 0", "margin: none", 1), text.replace("base/free", "base-free ", 1) + "more: 1"):
        assert one_line(lambda wrong=wrong: findings.read_findings(wrong)).startswith("findings.yaml: ")
    doubled = copy.deepcopy(text).replace("win/dpo/free - win/base/free", "win/dpo/free")
    assert "dpo-above-base: expected an estimate" in one_line(lambda: findings.read_findings(doubled))
