"""The workflows on GitHub: they are YAML, run the same script as everybody else, on the versions that are promised."""

import re
import tomllib

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pins import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


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
        assert job["runs-on"].startswith("ubuntu") and job["timeout-minutes"] <= 180
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            for file in re.findall(r"[\w.]+/[\w.]+", step.get("run", "")):
                assert (REPOSITORY / file).is_file(), step["run"]


def test_the_tests_run_on_every_version_that_is_promised():
    workflow = read("ci.yml")
    (job,) = workflow["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    promised = SpecifierSet(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"])
    assert versions == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in promised]
    assert {"push", "pull_request"} <= set(workflow["on"])
    assert "bash .ci/run" in [step.get("run") for step in steps(workflow)]


def test_links_are_checked_weekly():
    workflow = read("links.yml")
    ((when,),) = (one.values() for one in workflow["on"]["schedule"])
    minute, hour, day, month, weekday = when.split()
    assert (day, month) == ("*", "*") and weekday.isdigit() and minute.isdigit() and hour.isdigit()
    assert "python tests/check_links.py" in [step.get("run") for step in steps(workflow)]
