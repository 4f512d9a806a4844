"""Accelerate understands the configurations that we ship, and one that can't be read is one line."""

import os

import pytest
import yaml
from refusals import one_line

from psycopref.core.paper import resource_path
from psycopref.training.jobs import accelerate_strategy

CONFIGURATIONS = sorted(resource_path("accelerate").glob("*.yaml"))


def launched(path):
    "What `accelerate launch` makes of a configuration: its arguments, and the file's settings."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    own = ["--config_file", str(path), "--num_processes", "4", "--no_python", "psycopref", "train", "x"]
    return *_validate_launch_command(parser.parse_args(own))[:2], {action.dest for action in parser._actions}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_understands_the_configurations(path, monkeypatch):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    plain = yaml.safe_load(path.read_text())
    assert isinstance(load_config_from_file(str(path)), ClusterConfig) and path.read_text().startswith("# ")
    assert set(plain) <= set(ClusterConfig.__dataclass_fields__)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    args, _, known = launched(path)
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(plain.get(section, {})) <= known, "a key that nobody reads would be passed over in silence"
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    used = {"FSDP2": args.use_fsdp, "ZeRO-3": args.use_deepspeed, "DDP": args.multi_gpu}
    assert used[accelerate_strategy()] and args.num_processes == 4
    assert isinstance(args.mixed_precision, str), "no in YAML is false"


def test_zero3_hands_on_what_the_trainer_fills_in():
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    args, defaults, _ = launched(resource_path("accelerate/zero3.yaml"))
    args.deepspeed_fields_from_accelerate_config, args.no_python = ",".join(defaults.deepspeed_config), False
    own = {name: value for name, value in prepare_deepspeed_cmd_env(args)[1].items() if name not in os.environ}
    expected = {"DEEPSPEED_ZERO_STAGE": "3", "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true", "DEEPSPEED_ZERO3_INIT": "true"}
    expected |= {"GRADIENT_ACCUMULATION_STEPS": "auto", "GRADIENT_CLIPPING": "auto", "MIXED_PRECISION": "bf16"}
    assert {name: own.get(f"ACCELERATE_{name}") for name in expected} == expected


@pytest.mark.parametrize("content", [None, "", "- 1", "compute_environment: LOCAL_MACHINE", "a: [", "\x00"])
def test_an_unreadable_configuration_is_one_line(content, monkeypatch, tmp_path):
    path = tmp_path / "own.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("PSYCOPREF_ACCELERATE", str(path))
    assert "PSYCOPREF_ACCELERATE" in one_line(accelerate_strategy)
