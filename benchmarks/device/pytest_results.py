"""Plugin of pytest for the stage `tests`: a line of results.jsonl per test, none run twice, an orderly end in time.

pytest writes its own report only when it ends, and it may be cut before.
"""

from __future__ import annotations

from typing import Any

import pytest

from .stage import Check

TIME_IS_UP = "the time of this stage is up"


class Results:
    """In the process that reports: the only one, or the one that leads the workers."""

    def __init__(self, check: Check, config: pytest.Config) -> None:
        self.check, self.config = check, config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and teardown count where they go wrong
            values: dict[str, Any] = {"seconds": round(report.duration, 2)}
            if report.outcome == "skipped":
                values["skipped"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            if report.outcome == "failed":
                values["error"] = report.longreprtext[-1000:]
            self.check.write(report.nodeid, ok=report.outcome != "failed", **values)
        if self.check.left() <= 0:
            self._stop()

    def _stop(self) -> None:
        workers = self.config.pluginmanager.getplugin("dsession")
        (workers or self.session).shouldstop = TIME_IS_UP

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Check.from_environment(), config), "device_check_results")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an earlier call has seen pass: not this one, for a worker that is replaced must collect alike."""
    done = Check.from_environment().passed_before()
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = left
