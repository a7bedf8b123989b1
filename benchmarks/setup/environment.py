"""Make a virtual environment, check it, and run pip in it: what the Makefile does before its commands.

    python benchmarks/setup/environment.py FOLDER [--constraints FILE] check
    python benchmarks/setup/environment.py FOLDER [--constraints FILE] pip install ...

``check`` refuses an old Python, a half-made environment and another torch than the constraints name. ``pip`` makes
the environment if there is none and runs pip under the constraints. Each failure ends in one message.
It runs before anything is installed and under any Python 3.8 or newer, so it needs the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
"""``requires-python`` in pyproject.toml."""
CHECKED = ("torch", "transformers", "torch-geometric", "peft", "accelerate")
"""Packages on which the results depend most; another version of one of them is refused, not replaced."""
RECORD = ".constraints"
"""Copy of the constraints that an environment was last made with."""

NO_INDEX = re.compile(
    r"NewConnectionError|ConnectTimeout|NameResolutionError|ReadTimeout|ProxyError|SSLError|ConnectionReset|"
    r"Connection refused|Could not fetch URL|Temporary failure in name resolution|from versions: none"
)


class SetupError(Exception):
    """The environment cannot be used; the message names the argument, the rule, the value and the remedy."""


def check_python(target: str) -> None:
    """Refuse to make an environment with a Python that is too old or that lacks venv.

    Raises:
        SetupError: Python before 3.11, or without ensurepip.
    """
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(str(part) for part in sys.version_info[:3])
        raise SetupError(
            f"PYTHON: must be Python 3.11 or newer, got {version} ({sys.executable}); "
            f"name another one, as in: make {target} PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            f"PYTHON: must have the modules venv and ensurepip, got {sys.executable} without; "
            "install them (Debian and Ubuntu: apt-get install python3-venv)"
        ) from None


def check_environment(folder: Path, target: str) -> None:
    """Refuse an environment that was left half-made or whose Python has gone.

    Raises:
        SetupError: a part is missing, or its Python is before 3.11.
    """
    missing = missing_part(folder)
    if missing:
        raise SetupError(
            f"{folder}: must be a complete environment, got one without {missing}; remove it and repeat the command: "
            f"rm -rf {folder}"
        )
    version = python_version(folder)
    if version < OLDEST_PYTHON:
        found = ".".join(str(part) for part in version)
        raise SetupError(
            f"{folder}: must have Python 3.11 or newer, got {found}; make it with another Python: "
            f"rm -rf {folder} && make {target} PYTHON=python3.12"
        )


def missing_part(folder: Path) -> str | None:
    """The first missing part of an environment, None where it is complete."""
    if not (folder / "pyvenv.cfg").is_file() or not python_version(folder):
        return "pyvenv.cfg"
    python = folder / "bin" / "python"
    if not os.access(str(python), os.X_OK):  # false for a link to a Python that was removed
        return "a working bin/python"
    packages = list(folder.glob("lib/python3*/site-packages/*.dist-info"))
    if not any(path.name.startswith("pip-") for path in packages):
        return "pip"
    # pip writes RECORD last: without it the installation of that package was interrupted.
    for path in sorted(packages):
        if not (path / "RECORD").is_file():
            return f"all files of {path.name[: -len('.dist-info')]}"
    return None


def python_version(folder: Path) -> tuple[int, ...]:
    """The version that ``pyvenv.cfg`` states, empty where it states none."""
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", (folder / "pyvenv.cfg").read_text(), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else ()


def pins(text: str) -> dict[str, set[str]]:
    """The versions that a constraints file allows of each package; several where environments differ."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def installed_version(folder: Path, package: str) -> str | None:
    """The version of a package in an environment, without the label of its build (``+cpu``)."""
    for path in folder.glob(f"lib/python3*/site-packages/{package.replace('-', '_')}-*.dist-info"):
        return path.name[len(package) + 1 : -len(".dist-info")].split("+")[0]
    return None


def check_versions(folder: Path, constraints: Path, target: str) -> None:
    """Refuse packages that were put into an environment by hand in another version than the constraints name.

    What the environment was made with passes too: the next step of make replaces it after new constraints.

    Raises:
        SetupError: another version of a package in ``CHECKED``.
    """
    record = folder / RECORD
    former = pins(record.read_text()) if record.is_file() else {}
    current = pins(constraints.read_text())
    for package in CHECKED:
        found = installed_version(folder, package)
        wanted = current.get(package, set())
        if found is not None and wanted and found not in wanted | former.get(package, set()):
            expected = sorted(wanted)[0]
            raise SetupError(
                f"{package}: must be {expected} as {constraints} says, got {found} in {folder}; install that "
                f"version ({folder}/bin/python -m pip install {package}=={expected}), or use what is there: "
                f"make {target} CONSTRAINTS="
            )


def make_environment(folder: Path, options: list[str]) -> None:
    """Make an environment with the newest pip that the options allow; on failure leave nothing.

    Raises:
        SetupError: venv or pip fails.
    """
    print(f"Making {folder} with Python {sys.version.split()[0]}", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # pip and setuptools come with Python in an old version, which knows no dependency groups.
        run_pip(folder, ["install", "--quiet", "--upgrade", *options, "pip>=25.3", "setuptools"])
    except subprocess.CalledProcessError as error:
        shutil.rmtree(str(folder), ignore_errors=True)
        raise SetupError(
            f"PYTHON: must make an environment with -m venv, got exit status {error.returncode} from "
            f"{sys.executable}; use another Python, as in PYTHON=python3.12"
        ) from error
    except BaseException:
        shutil.rmtree(str(folder), ignore_errors=True)
        raise


def run_pip(folder: Path, arguments: list[str]) -> None:
    """Run pip in an environment; its output appears as it comes, repeated attempts at a connection once.

    Raises:
        SetupError: pip fails.
    """
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    complaints: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Retrying" not in line or not any("Retrying" in earlier for earlier in complaints):
                sys.stderr.write(line)
                sys.stderr.flush()
            complaints.append(line)
    if process.returncode:
        raise SetupError(pip_failure("".join(complaints), arguments[0], process.returncode))


def pip_failure(complaints: str, command: str, status: int) -> str:
    """What to do about a pip that failed."""
    if NO_INDEX.search(complaints):
        return (
            "network: must reach an index that has the packages, got no answer or none of them; connect, or name an "
            "index that can be reached in PIP_INDEX_URL, and repeat the command"
        )
    if "No space left" in complaints:
        return "disk: must have room for the packages, got a full disk; free some and repeat the command"
    if "ResolutionImpossible" in complaints or "No matching distribution" in complaints:
        return (
            "constraints: must fit this Python and this machine, got no set of packages that does (pip names them "
            "above); renew them with make lock, or do without: CONSTRAINTS="
        )
    return f"pip: must {command} without error, got exit status {status}; see its message above, and repeat the command"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the environment")
    parser.add_argument("--constraints", type=Path, help="file of exact versions")
    parser.add_argument("--target", default="test", help="the command of make that runs this, for messages")
    parser.add_argument("action", choices=["check", "pip"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pip")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Check an environment, or make it and run pip in it."""
    folder, constraints = options.folder, options.constraints
    if constraints and not constraints.is_file():
        raise SetupError(f"CONSTRAINTS: must be a file of exact versions, got {constraints}; leave it out")
    if folder.exists():
        check_environment(folder, options.target)
        if constraints:
            check_versions(folder, constraints, options.target)
    else:
        check_python(options.target)
    if options.action == "check":
        return
    limits = ["--constraint", str(constraints)] if constraints else []
    if not folder.exists():
        make_environment(folder, limits)
    if constraints and "--no-build-isolation" not in options.arguments:
        limits += ["--build-constraint", str(constraints)]
    run_pip(folder, [options.arguments[0], *limits, *options.arguments[1:]])
    if constraints:
        shutil.copyfile(str(constraints), str(folder / RECORD))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 2 after a message."""
    try:
        run(parsed(arguments))
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("set-up: interrupted; repeat the command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
