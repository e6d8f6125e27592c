"""Runs the commands of gpu_check.py so that nothing is lost: output goes to a file as it comes, whoever is killed,
and a command past its limit ends with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

FAILED = "FAILED"
STOPPED = 124  # exit status past the limit, as of `timeout`
SHOWN = 3000  # characters of a command's output that are printed too


@dataclass
class Step:
    name: str
    result: str  # "ok", "FAILED" or why it did not run
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Runner:
    """Where the commands run and how long they may take together."""

    folder: Path
    log: Path  # the whole output of every command
    deadline: float  # of time.monotonic
    environment: dict[str, str] = field(default_factory=dict)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(
        self,
        command: list[str],
        limit: float,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[int, str, float]:
        """Exit status (124: past the limit), output and seconds; the end of the output is printed."""
        heading = f"\n$ {' '.join(command)}\n"
        print(heading, end="", flush=True)
        start = time.monotonic()
        limit = max(1.0, min(limit, self.left()))
        with self.log.open("ab") as log:
            log.write(heading.encode())
            log.flush()
            before = log.tell()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder or self.folder,
                    env={**os.environ, **self.environment, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    status = STOPPED
                    log.write(f"\nstopped after {limit:.0f} s\n".encode())
            except OSError as error:
                status = 127
                log.write(f"{error}\n".encode())
        with self.log.open("rb") as log:
            log.seek(before)
            output = log.read().decode(errors="replace")
        print(output[-SHOWN:], flush=True)
        return status, output, time.monotonic() - start


def outcome(status: int) -> str:
    return "ok" if status == 0 else FAILED


class Reports:
    """The junit reports of several pytest processes in one file, written anew after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, ElementTree.Element("testsuites")

    def add(self, report: Path) -> ElementTree.Element | None:
        """The report's suite; None where pytest wrote none: it crashed or was stopped."""
        if not report.exists():
            return None
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        self.root.append(suite)
        ElementTree.ElementTree(self.root).write(self.path)
        return suite


def counts(suite: ElementTree.Element) -> tuple[int, str]:
    """Tests that passed, and a line about all of them."""
    total, failed, errors, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
    )
    passed = total - failed - errors - skipped
    return passed, f"{passed} passed, {failed + errors} failed, {skipped} skipped"


def first_failure(suite: ElementTree.Element) -> str | None:
    """The name of the first test that failed, as pytest selects it within its file."""
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            return case.get("name")
    return None
