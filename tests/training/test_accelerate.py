"""Accelerate understands the configurations that we ship, and one that can't be read is one line."""

import dataclasses
import os

import pytest
import yaml
from refusals import one_line

from psycopref.core.paper import resource_path
from psycopref.training.jobs import accelerate_strategy

CONFIGURATIONS = sorted(resource_path("accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_understands_the_configurations(path, monkeypatch):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    found, parser = load_config_from_file(str(path)), launch_command_parser()
    known, plain = {action.dest for action in parser._actions}, yaml.safe_load(path.read_text())
    assert isinstance(found, ClusterConfig) and set(plain) <= {
        field.name for field in dataclasses.fields(ClusterConfig)
    }
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(plain.get(section, {})) <= known, "a key that nobody reads would be passed over in silence"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args, _, _ = _validate_launch_command(
        parser.parse_args(
            ["--config_file", str(path), "--num_processes", "4", "--no_python", "psycopref", "train", "x"]
        )
    )
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    assert {"FSDP2": args.use_fsdp, "ZeRO-3": args.use_deepspeed, "DDP": args.multi_gpu}[
        accelerate_strategy()
    ] and args.num_processes == 4
    assert isinstance(args.mixed_precision, str), "no in YAML is false"
    assert path.read_text().startswith("# ")


def test_zero3_hands_on_what_the_trainer_fills_in():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = resource_path("accelerate/zero3.yaml")
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "x.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    own = {
        name.removeprefix("ACCELERATE_"): value
        for name, value in environment.items()
        if name.startswith("ACCELERATE_") and name not in os.environ
    }
    assert (
        own["DEEPSPEED_ZERO_STAGE"] == "3"
        and own["DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        and own["DEEPSPEED_ZERO3_INIT"] == "true"
    )
    assert own["GRADIENT_ACCUMULATION_STEPS"] == own["GRADIENT_CLIPPING"] == "auto" and own["MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("content", [None, "", "- 1", "compute_environment: LOCAL_MACHINE", "a: [", "\x00"])
def test_an_unreadable_configuration_is_one_line(content, monkeypatch, tmp_path):
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    assert "PSYCOPREF_ACCELERATE" in one_line(accelerate_strategy)
