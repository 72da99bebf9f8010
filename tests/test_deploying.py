"""What starts a server elsewhere, and the workflows: their flags exist, their times fit, and they name all that is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from lorax_core.cli.serve import app

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
UNIT = (ROOT / "packaging/lorax.service").read_text("utf-8").replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["lorax"]
EXEC = shlex.split(re.search(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)[1])
ENTRYPOINT = yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[1])
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}


def given(words: list[str]) -> dict[str, str | int | float]:
    """What `lorax serve` reads of these words; whatever it does not know is an error."""
    command = typer.main.get_command(app)
    return command.make_context("serve", words, resilient_parsing=False).params


@pytest.mark.parametrize(
    ("words", "stop_after"),
    [
        (EXEC[2:], re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1]),
        ([*ENTRYPOINT[2:], *COMPOSE["command"]], COMPOSE["stop_grace_period"].removesuffix("s")),
    ],
    ids=["unit", "compose"],
)
def test_the_flags_exist_and_a_server_has_time_to_finish(words, stop_after):
    read = given(words)

    assert read["path"]
    assert read["port"] == 8000
    assert int(stop_after) >= read["drain_timeout"] + 10


def test_the_image_has_every_distribution_and_sees_nothing_else():
    folders = {"core", *(file.parent.name for file in ROOT.glob("lorax_*/pyproject.toml"))}

    copied = dict(re.findall(r"^COPY (\w+) (\w+)$", DOCKERFILE, re.MULTILINE))
    installed = set(re.findall(r"\./(\w+)", DOCKERFILE))
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert copied == {folder: folder for folder in folders}
    assert installed == folders
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    assert {line[1:] for line in ignored if line[:1] == "!"} == {"core", "lorax_*", "constraints.txt", "LICENSE"}


def test_the_image_runs_as_nobody_and_says_whether_it_is_well():
    last = DOCKERFILE.rpartition("\nFROM ")[2]

    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*\n +CMD .*/health'", last, re.MULTILINE)
    assert ENTRYPOINT[:2] == ["lorax", "serve"]


def test_the_unit_is_shut_in_and_keeps_keys_out_of_the_environment():
    lines = set(UNIT.splitlines())

    assert {"DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet="} <= lines
    assert len([line for line in lines if line.startswith("LoadCredential=")]) == 2
    assert "KEY" not in UNIT


def test_ci_runs_what_every_change_must_pass_on_every_python_that_is_named():
    project = tomllib.loads((ROOT / "core/pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))

    [job] = WORKFLOWS["ci"]["jobs"].values()

    assert job["strategy"]["matrix"]["python"] == named
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]


def test_a_release_is_trusted_and_only_its_last_step_may_publish():
    build, publish = WORKFLOWS["release"]["jobs"].values()

    assert WORKFLOWS["release"]["permissions"] == {}
    assert (build["permissions"], publish["permissions"]) == ({"contents": "read"}, {"id-token": "write"})
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text("utf-8")


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_actions_are_pinned_by_their_content(workflow):
    used = [step["uses"] for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"] if "uses" in step]

    assert len(used) >= 2
    assert [one for one in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one)] == []


def test_the_page_names_the_files_and_the_variables():
    page = (ROOT / "docs/deploying.md").read_text("utf-8")
    variables = re.findall(r"\$\{(\w+):-", (ROOT / "compose.yaml").read_text("utf-8"))

    assert len(variables) == 4
    wanted = [f"`{one}`" for one in ("Dockerfile", "compose.yaml", "packaging/lorax.service", *variables)]
    assert [one for one in wanted if one not in page] == []


def test_the_page_and_the_image_take_torch_for_a_cpu_from_one_index():
    [index] = re.findall(r"^ARG TORCH_INDEX=(\S+)$", DOCKERFILE, re.MULTILINE)
    page = (ROOT / "docs/deploying.md").read_text("utf-8")

    [command] = re.findall(r"^/usr/local/lib/lorax/bin/pip install .*$", page, re.MULTILINE)

    assert f"--extra-index-url {index} " in command
