"""What GitHub reads: workflows that run what everybody runs, on the versions that are promised, and forms."""

import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pins import REPOSITORY
from test_readme import check_pip

from dopamine_lib import __main__ as command_line

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> dict:
    content = yaml.safe_load((REPOSITORY / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    content["on"] = content.pop(True)  # YAML 1.1 reads the word on as true
    return content


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_what_github_asks_for(path):
    workflow = read(path.name)
    assert workflow["name"] and workflow["on"] and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        systems = job.get("strategy", {}).get("matrix", {}).get("os", [job["runs-on"]])
        assert all(re.fullmatch("(ubuntu|macos|windows)-latest", name) for name in systems)
        assert job["runs-on"] in (*systems, "${{ matrix.os }}") and job["timeout-minutes"] <= 180
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            for file in re.findall(r"[\w.]+/[\w.]+", step.get("run", "")):
                assert (REPOSITORY / file).is_file(), step["run"]


def test_the_tests_run_on_every_version_that_is_promised():
    workflow = read("ci.yml")
    versions = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = SpecifierSet(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"])
    assert versions == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in promised]
    assert workflow["jobs"]["elsewhere"]["strategy"]["matrix"]["python"] == versions
    assert {"push", "pull_request"} <= set(workflow["on"])
    assert "bash .ci/run" in [step.get("run") for step in steps(workflow)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_of_a_workflow_is_one(path):
    for step in steps(read(path.name)):
        words = shlex.split(step.get("run", "true"))
        if words[0] == "dopamine":
            command_line.parser().parse_args(words[1:])
        elif words[0] == "pip":
            check_pip(words[1:])
        else:
            assert words[0] in ("true", "bash", "pytest", "python", "test", "gh"), f"say how to check: {step['run']}"


def test_a_tag_makes_a_draft_of_wheel_site_and_students_copies():
    """And only the tag of the version that the library has; nothing but this job may write."""
    workflow = read("release.yml")
    (job,) = workflow["jobs"].values()
    assert workflow["on"] == {"push": {"tags": ["v*"]}} and job["permissions"] == {"contents": "write"}
    commands = [step.get("run", "") for step in steps(workflow)]
    (checked,) = (at for at, run in enumerate(commands) if "v$(dopamine --version)" in run)
    (made,) = (at for at, run in enumerate(commands) if run.startswith("gh release create"))
    assert checked < made and "--draft" in commands[made]
    assert re.findall(r"\S+\.(?:whl|zip)", commands[made]) == ["*.whl", "site.zip", "homework.zip"]
    before = commands[checked:made]
    assert {"pip wheel --no-deps --wheel-dir . .", "dopamine site site", "dopamine homework homework"} <= set(before)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert form["name"] and form["description"] and isinstance(form["labels"], list)
    parts = form["body"]
    assert {part["type"] for part in parts} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert len({part["id"] for part in parts}) == len(parts) and all(part["attributes"]["label"] for part in parts)
    assert any(part.get("validations", {}).get("required") for part in parts)


def test_the_form_for_faults_asks_for_what_a_machine_prints():
    form = yaml.safe_load((FORMS[0].parent / "fault.yml").read_text(encoding="utf-8"))
    (value,) = (part["attributes"]["value"] for part in form["body"] if "value" in part["attributes"])
    program, *words = shlex.split(value)
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8")
    assert program == "python" and ran.returncode == 0 and "torch" in ran.stdout, ran.stderr


def test_links_are_checked_weekly():
    workflow = read("links.yml")
    ((when,),) = (one.values() for one in workflow["on"]["schedule"])
    minute, hour, day, month, weekday = when.split()
    assert (day, month) == ("*", "*") and weekday.isdigit() and minute.isdigit() and hour.isdigit()
    assert "python tests/check_links.py" in [step.get("run") for step in steps(workflow)]
