"""The set-up of make: exact versions for all that it installs, and one message for each thing that can be wrong."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.setup import environment
from benchmarks.setup.environment import SetupError, main, missing_part, pins, run_pip
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import conftest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "setup" / "environment.py"
NEWEST, OLDEST = ROOT / "constraints.txt", ROOT / "constraints-oldest.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_310 = """\
import sys, runpy
sys.version_info = (3, 10, 13)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def requirements(*lists: list) -> list[Requirement]:
    return [Requirement(entry) for entries in lists for entry in entries if isinstance(entry, str)]


def stub(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, whether or not make runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "-s", *arguments], cwd=ROOT, env=kept, capture_output=True, text=True, check=False)


def record_of(folder: Path, package: str) -> Path:
    return folder / f"lib/python3.11/site-packages/{package}.dist-info/RECORD"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What counts as an environment: its description, a Python and pip."""
    made = tmp_path / "environment"
    stub(made / "bin" / "python", f'exec "{sys.executable}" "$@"')
    (made / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    install(made, "pip-26.3", "torch-2.13.0+cpu", "torch_geometric-2.8.1")
    return made


@pytest.fixture
def constraints(tmp_path: Path) -> Path:
    path = tmp_path / "constraints.txt"
    path.write_text("# Exact versions.\ntorch==2.13.0\ntorch-geometric==2.8.1 ; python_full_version < '3.12'\n")
    return path


def install(folder: Path, *packages: str) -> None:
    for package in packages:
        record_of(folder, package).parent.mkdir(parents=True)
        record_of(folder, package).touch()


# The files ------------------------------------------------------------------------------------------------


def test_every_requirement_has_exact_versions_that_it_allows():
    allowed = pins(NEWEST.read_text())
    wanted = requirements(
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
        PROJECT["build-system"]["requires"],
    )
    for requirement in wanted:
        versions = allowed.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement}: constraints.txt has no version of it; run make lock"
        for version in versions:
            assert version in requirement.specifier, f"{requirement}: got {version}; run make lock"


def test_the_oldest_versions_are_the_lower_bounds():
    """A bound that no test has seen would be a guess."""
    allowed = pins(OLDEST.read_text())
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in requirements(
        PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name not in ("scatter", "ray"))
    ):
        (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
        (version,) = allowed[canonicalize_name(requirement.name)]
        assert Version(version) == Version(bound), f"{requirement}: got {version}; raise the bound or run make lock"


@pytest.mark.parametrize("path", [NEWEST, OLDEST], ids=["newest", "oldest"])
def test_a_constraints_file_names_versions_alone(path: Path):
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"#[^/]*|[a-z0-9-]+==[a-z0-9.]+( ; [^/]*)?", line), line


# What can be wrong ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("command", ["check", "demo", "test"])
def test_make_with_an_old_python_says_so(command: str, tmp_path: Path):
    python = stub(tmp_path / "python3.10", f'exec "{sys.executable}" -c \'{PYTHON_310}\' "$@"')
    done = make(command, f"PYTHON={python}", f"VENV={tmp_path / 'none'}")
    assert done.returncode == 2
    assert "set-up: PYTHON: must be Python 3.11 or newer, got 3.10.13" in done.stderr
    assert f"as in: make {command} PYTHON=python3.12" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_its_python_says_so(tmp_path: Path):
    done = make("demo", "PYTHON=python3.99", f"VENV={tmp_path / 'none'}")
    assert done.returncode == 2
    assert "PYTHON: must name Python 3.11 or newer, got python3.99, which is not there" in done.stderr


def test_a_complete_environment_passes(folder: Path, constraints: Path):
    assert missing_part(folder) is None
    assert main([str(folder), "--constraints", str(constraints), "check"]) == 0


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("pyvenv.cfg", "pyvenv.cfg"),
        ("bin/python", "a working bin/python"),
        ("lib", "pip"),
        ("lib/python3.11/site-packages/torch-2.13.0+cpu.dist-info/RECORD", r"all files of torch-2.13.0\+cpu"),
    ],
)
def test_a_half_made_environment_is_refused(removed: str, named: str, folder: Path, capsys: pytest.CaptureFixture):
    path = folder / removed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if removed == "bin/python":  # as left behind when the Python of an environment is removed
        path.symlink_to(folder / "gone")
    assert main([str(folder), "check"]) == 2
    printed = capsys.readouterr().err
    assert re.search(rf"{folder}: must be a complete environment, got one without {named}; .*rm -rf {folder}$", printed)


def test_an_environment_of_an_old_python_is_refused(folder: Path, capsys: pytest.CaptureFixture):
    (folder / "pyvenv.cfg").write_text("version = 3.10.13\n")
    assert main([str(folder), "--target", "demo", "check"]) == 2
    assert re.search(r"must have Python 3.11 or newer, got 3.10; .*make demo PYTHON=", capsys.readouterr().err)


def test_another_torch_is_refused_and_never_replaced(
    folder: Path, constraints: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    record_of(folder, "torch-2.13.0+cpu").parent.rename(record_of(folder, "torch-2.12.0+rocm").parent)
    monkeypatch.setattr(environment, "run_pip", lambda *arguments: pytest.fail("pip ran"))
    for action in (["check"], ["pip", "install", "--editable", "."]):
        assert main([str(folder), "--constraints", str(constraints), "--target", "demo", *action]) == 2
        printed = capsys.readouterr().err
        assert f"torch: must be 2.13.0 as {constraints} says, got 2.12.0 in {folder}; install" in printed
        assert printed.endswith("make demo CONSTRAINTS=\n")
    assert main([str(folder), "check"]) == 0, "no constraints, no demands"


def test_renewed_constraints_replace_what_the_former_ones_installed(
    folder: Path, constraints: Path, monkeypatch: pytest.MonkeyPatch
):
    ran = []
    monkeypatch.setattr(environment, "run_pip", lambda folder, arguments: ran.append(arguments))
    install_it = [str(folder), "--constraints", str(constraints), "pip", "install", "--editable", "."]
    assert main(install_it) == 0
    constraints.write_text("torch==2.14.0\n")
    assert main(install_it) == 0
    limits = ["--constraint", str(constraints), "--build-constraint", str(constraints)]
    assert ran == [["install", *limits, "--editable", "."]] * 2


def test_constraints_that_are_not_there_are_named(folder: Path, capsys: pytest.CaptureFixture):
    assert main([str(folder), "--constraints", "nowhere.txt", "check"]) == 2
    assert "CONSTRAINTS: must be a file of exact versions, got nowhere.txt; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("retries", ["0", "1"])
def test_no_network_ends_in_one_message(retries: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    closed = {"CONFIG_FILE": os.devnull, "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": retries}
    for name, value in closed.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SetupError, match=r"network: must reach an index that has the packages, got no answer"):
        run_pip(folder, ["download", "--no-deps", "--no-cache-dir", "torch"])


@pytest.mark.parametrize(
    ("complaints", "message"),
    [
        (
            "OSError: [Errno 28] No space left on device",
            r"disk: must have room for the packages, got a full disk; free",
        ),
        ("ERROR: No matching distribution found for a==1", r"constraints: must fit this Python and .*CONSTRAINTS="),
        ("error: subprocess-exited-with-error", r"pip: must install without error, got exit status 1; see"),
    ],
)
def test_other_failures_of_pip_are_told_apart(complaints: str, message: str, folder: Path):
    stub(folder / "bin" / "python", f'echo "{complaints}" >&2; exit 1')
    with pytest.raises(SetupError, match=message):
        run_pip(folder, ["install", "a"])


def test_a_failure_while_an_environment_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(command: list[str], **options: object) -> None:
        Path(command[-1]).mkdir()
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", broken)
    assert main([str(tmp_path / "made"), "pip", "install", "a"]) == 2
    assert not (tmp_path / "made").exists()


def test_old_pythons_can_read_the_script():
    """They are told that they are too old, which takes a script that they can parse."""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


# The end of the tests -------------------------------------------------------------------------------------


def test_skipped_browser_tests_are_counted_at_the_end():
    lines: list[str] = []
    skipped = [SimpleNamespace(longrepr=("f", 1, f"Skipped: {reason}")) for reason in (
        "needs chromium or google-chrome on the PATH", "no Chromium on the PATH", "needs nbformat",
    )]  # fmt: skip
    reporter = SimpleNamespace(stats={"skipped": skipped}, write_line=lambda line, **style: lines.append(line))
    conftest.pytest_terminal_summary(reporter)
    (line,) = lines
    assert "2 tests were skipped; install one, as in: apt-get install chromium" in line
    conftest.pytest_terminal_summary(SimpleNamespace(stats={"skipped": skipped[2:]}, write_line=pytest.fail))
