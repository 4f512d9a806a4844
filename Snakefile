# One rule for each stage of the package's stage list. `make reproduce` calls this; so can you:
#   snakemake --cores 2 --rerun-incomplete --config profile=demo run=mine overrides='{"reward.learning_rate": 1e-4}'
# Stages that ask models can be cut into shards, which run side by side, on this machine or on a cluster's:
#   snakemake --workflow-profile psycopref/resources/snakemake/slurm-gpu --config profile=paper shards=8
# Further seeds repeat the stages that train or judge what was trained; the first of seeds is the run itself.
import json
import os
import re
import sys

from psycopref.core.reading import parse_json
from psycopref.core.settings import StudyError, load_profile, suggest
from psycopref.core.stages import parse_seeds
from psycopref.run.console import Console
from psycopref.run.runner import stage_rules



def typed(value):
    "Snakemake reads every leaf of a --config mapping as text; read numbers and lists as the JSON that they were."
    if isinstance(value, dict):
        return {name: typed(leaf) for name, leaf in value.items()}
    if isinstance(value, list):
        return [typed(leaf) for leaf in value]
    try:
        return parse_json(value)
    except (TypeError, ValueError):
        return value


def name_of(what, usual):
    "Return a name, alone or in brackets; Snakemake reads 2024 and 1e3 as numbers, and nobody knows then what was typed."
    value = usual if config.get(what) in (None, "") else config[what]
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        found = f"psycopref: {what}={value}: found a {type(value).__name__}, expected a name"
        sys.exit(f"""{found}; write {what}='["NAME"]' with the name as you meant it, or use make""")
    return value


def given(what, usual):
    "Return what --config says, None and an empty text being nothing; a text in brackets is that text, as it was typed."
    value = config.get(what)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    return usual if value in (None, "") else value


KNOWN = ("profile", "run", "seed", "seeds", "overrides", "sources", "shards")
if strange := [name for name in config if name not in KNOWN]:
    sys.exit(f"psycopref: --config {strange[0]}=…: there is no such setting. {suggest(strange[0], KNOWN)}")
PROFILE = name_of("profile", "demo")
RUN = name_of("run", PROFILE)
OVERRIDES, SHARDS, SOURCES = given("overrides", {}), given("shards", 1), given("sources", None)
if os.environ.get("PSYCOPREF_LOG"):  # `make reproduce` tells them as they were typed, before Snakemake read them
    OVERRIDES = os.environ.get("GIVEN_OVERRIDES") or OVERRIDES

try:
    OVERRIDES = parse_json(OVERRIDES) if isinstance(OVERRIDES, str) else typed(OVERRIDES)
except ValueError as error:
    sys.exit(f"""psycopref: OVERRIDES={OVERRIDES}: {error}; expected a JSON object, such as OVERRIDES='{{"dpo.beta": 0.05}}'""")
if not isinstance(OVERRIDES, dict):
    sys.exit(f"""psycopref: OVERRIDES={OVERRIDES}: expected a JSON object, such as OVERRIDES='{{"dpo.beta": 0.05}}'""")
if not re.fullmatch("[1-9][0-9]*", str(SHARDS)):
    sys.exit(f"psycopref: SHARDS={SHARDS}: expected a whole number from 1 on")
SHARDS = int(SHARDS)
if SOURCES is not None:
    if not isinstance(SOURCES, str):
        sys.exit(f"psycopref: SOURCES={SOURCES}: expected names of sources, with commas between them")
    OVERRIDES["speeches.sources"] = SOURCES.split(",")


scattergather:
    shards=SHARDS,


try:
    load_profile(PROFILE, OVERRIDES)
    if "budget_usd" in OVERRIDES:  # no setting of a stage: raising it must not redo what is finished
        os.environ["BUDGET_USD"] = str(OVERRIDES.pop("budget_usd"))
    os.environ["PSYCOPREF_ASKED"] = json.dumps({"name": PROFILE, "overrides": OVERRIDES})  # chapters refuse what was made otherwise
    SEED, *FURTHER = parse_seeds(config.get("seeds", config.get("seed", 0)))
    RULES = stage_rules(PROFILE, RUN, SEED, OVERRIDES, FURTHER)
except StudyError as error:
    sys.exit(f"psycopref: {error}")

if os.environ.get("PSYCOPREF_LOG"):  # `make reproduce`: Snakemake's words go to that file, ours and a stage's errors to the terminal
    logger.addHandler(Console(RULES, SHARDS))
    shell.suffix("2>&1 >/dev/null")


def shards_of(stage):
    "Receipts of a stage's shards, where it is cut into some."
    return gather.shards(f"outputs/{RUN}/{stage['name']}.shards/{{scatteritem}}/receipt.json") if stage["shards"] and SHARDS > 1 else []


def cells_of(stage):
    "Receipts of a grid's cells."
    return [f"outputs/{RUN}/{stage['name']}.cells/{cell}/receipt.json" for cell in stage["cells"]]


rule all:
    input:
        RULES[-1]["receipt"],
        f"outputs/{RUN}/13_report/show",
        f"outputs/{RUN}/13_report/overview.html",


for stage in RULES:
    if stage["name"] == "13_report":
        continue

    rule:
        name: stage["name"]
        input:
            needs=stage["needs"],
            parts=shards_of(stage) + cells_of(stage),
        output:
            update(stage["receipt"]),  # a stage that fails leaves its last result in place
        params:
            notebook=stage["notebook"],
            parameters=stage["parameters"],
            settings=stage["settings"],
            code=stage["code"],
        priority: len(RULES) - RULES.index(stage)  # of chapters that could run, the first in reading order does
        message: f"{stage['name']}: {stage['title']}"
        threads: workflow.cores
        shell: "psycopref run {params.notebook} --parameters {params.parameters:q}"

    if shards_of(stage):

        rule:  # one shard; the rule above gathers them
            name: f"{stage['name']}_shard"
            input:
                needs=stage["needs"],
            output:
                update(f"outputs/{RUN}/{stage['name']}.shards/{{scatteritem}}/receipt.json"),
            params:
                notebook=stage["notebook"],
                parameters=stage["parameters"],
                settings=stage["settings"],
                code=stage["code"],
            priority: len(RULES) - RULES.index(stage)
            message: f"{stage['name']}: {stage['title']}, shard {{wildcards.scatteritem}}"
            threads: max(1, workflow.cores // SHARDS)
            shell: "psycopref run {params.notebook} --parameters {params.parameters:q} -p SHARD={wildcards.scatteritem}"

    if stage["cells"]:

        rule:  # one cell of a grid; the rule above gathers them
            name: f"{stage['name']}_cell"
            input:
                needs=stage["needs"],
            output:
                update(f"outputs/{RUN}/{stage['name']}.cells/{{cell}}/receipt.json"),
            wildcard_constraints:
                cell="|".join(map(re.escape, stage["cells"])),
            params:
                notebook=stage["notebook"],
                parameters=stage["parameters"],
                settings=stage["settings"],
                code=stage["code"],
            priority: len(RULES) - RULES.index(stage)
            message: f"{stage['name']}: {stage['title']}, cell {{wildcards.cell}}"
            threads: workflow.cores
            shell: "psycopref run {params.notebook} --parameters {params.parameters:q} -p CELL={wildcards.cell}"


    if stage["seeds"]:

        rule:  # each further seed; what does not train is the run's
            name: f"{stage['name']}_seed"
            input:
                needs=stage["seeds"]["needs"],
            output:
                update(stage["seeds"]["receipt"]),
            wildcard_constraints:
                seed="|".join(map(str, FURTHER)),
            params:
                notebook=stage["notebook"],
                parameters=stage["parameters"],
                settings=stage["settings"],
                code=stage["code"],
                run=RUN,
            priority: len(RULES) - RULES.index(stage)
            message: f"{stage['name']}: {stage['title']}, seed {{wildcards.seed}}"
            threads: workflow.cores
            shell:
                "psycopref run {params.notebook} --parameters {params.parameters:q} "
                "-p RUN={params.run}/seeds/{wildcards.seed} -p SEED={wildcards.seed}"


rule report:
    input:
        needs=RULES[-1]["needs"],
    output:
        receipt=update(RULES[-1]["receipt"]),
        overview=report(f"outputs/{RUN}/13_report/overview.html", category="Overview", labels={"result": "all on one page"}),
        show=report(directory(f"outputs/{RUN}/13_report/show"), patterns=["{name}.html", "{name}.png"], category="Tables and figures",
                    labels={"result": "{name}"}),
    params:
        notebook=RULES[-1]["notebook"],
        parameters=RULES[-1]["parameters"],
        code=RULES[-1]["code"],
    message: "13_report: every table and figure"
    shell: "psycopref run {params.notebook} --parameters {params.parameters:q}"
