"""The command `moetron`, run as `python -m moetron`."""

import json
import subprocess
import sys

import pytest

from moetron.__main__ import COMMANDS, dispatch
from moetron.commands.plan import main as plan
from moetron.common.errors import UserError


def moetron(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moetron", *words], capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: importing torch once per command would take a minute."""
    monkeypatch.setattr(sys, "argv", ["moetron", name, "--help"])
    with pytest.raises(SystemExit) as end:
        sys.exit(dispatch())
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_an_unknown_command_exits_with_2_and_the_list() -> None:
    done = moetron("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moetron trian: no such command")
    assert all(f"  {name} " in done.stderr for name in COMMANDS)


def test_help_and_version_exit_with_0() -> None:
    assert "usage: moetron COMMAND" in moetron().stdout
    done = moetron("--version")
    assert done.returncode == 0 and done.stdout.startswith("moetron ")


def test_doctor_prints_json_and_exits_with_0() -> None:
    done = moetron("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = {entry["name"]: entry["state"] for entry in json.loads(done.stdout)}
    assert found["torch"] == found["collectives"] == "ok"


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (
            "olmoe_1b_7b --published-coefficients megablocks 0.01 0.001",  # M 16, k 8
            "--moe-aux-loss-coeff 0.000625 --moe-z-loss-coeff 7.8125e-06",
        ),
        (
            "openmoe_8b --published-coefficients flaxformer 0.01 1e-4",  # M 4, k 2
            "--moe-aux-loss-coeff 0.005 --moe-z-loss-coeff 2.5e-05",
        ),
        (
            "st_moe_l --published-coefficients mesh_tensorflow 0.01 0.001",
            "--moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 --moe-aux-loss-first-choice-only",
        ),
    ],
)
def test_plan_converts_published_coefficients(
    words: str, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *words.split()])
    assert plan() == 0
    assert capsys.readouterr().out == flags + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("olmoe_1b_7b --published-coefficients fairseq 0.01 0", "fairseq: must be one of megatron"),
        ("olmoe_1b_7b --published-coefficients switch nan 0", "nan: must be a number >= 0"),
        ("olmo_1b --published-coefficients switch 0.01 0", "the recipe has no experts"),
    ],
)
def test_plan_refuses_coefficients_that_it_cannot_convert(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *words.split()])
    with pytest.raises(UserError, match=message):
        plan()
