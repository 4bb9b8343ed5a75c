# SPDX-License-Identifier: Apache-2.0
"""Progress in a log: whole lines, one every ten seconds at most, and none of short work."""

import io
from typing import Any

import pytest

from vllm_w4a4_plugin.cli import bars, log_files
from vllm_w4a4_plugin.cli.progress import ProgressDisplay


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bars, "time", clock)
    return clock


def lines_of(clock: Clock, units: int, seconds_per_unit: float, **kwargs: Any) -> list[str]:
    file = io.StringIO()
    with bars.LogBar(total=units, desc="Work", file=file, **kwargs) as bar:
        for _ in range(units):
            clock.now += seconds_per_unit
            bar.update(1)
            bar.refresh()
    return file.getvalue().splitlines()


def test_a_line_every_ten_seconds_at_most(clock: Clock) -> None:
    lines = lines_of(clock, 45, 1.0)
    assert len(lines) == 4
    assert [line.split("|")[-1].split()[0] for line in lines] == ["10/45", "20/45", "30/45", "40/45"]
    assert all(line.startswith("Work: ") for line in lines)


def test_nothing_of_short_work(clock: Clock) -> None:
    assert lines_of(clock, 1000, 0.001) == []


def test_slow_units_have_a_line_each(clock: Clock) -> None:
    assert len(lines_of(clock, 3, 60.0)) == 3


def test_a_terminal_has_a_drawn_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bars.bar(total=1, file=io.StringIO()) as bar:
        assert not isinstance(bar, bars.LogBar)


def test_other_bars_are_calmed_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in log_files.LOG_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    log_files.calm_in_logs()
    import os

    assert {name: os.environ[name] for name in log_files.LOG_SETTINGS} == log_files.LOG_SETTINGS


def test_tasks_follow_one_another(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as progress:
        for what in ("Reading", "Writing"):
            for done in range(1, 31):
                clock.now += 1
                progress.show(what, done, 30)
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 6
    assert [line.split(":")[0] for line in lines] == sorted(line.split(":")[0] for line in lines)
