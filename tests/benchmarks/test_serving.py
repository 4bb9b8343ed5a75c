# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server: what it measures of streams, and its page."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks import publishing, report, serving


def test_every_token_of_its_tokenizer_is_a_word(tmp_path: Path) -> None:
    serving.write_tokenizer(tmp_path, 50)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("w7 w49 w0") == [7, 49, 0]
    assert tokenizer.decode([7, 49, 0]).split() == ["w7", "w49", "w0"]


class Session:
    """Streams an answer whose first token comes after one second, and the others every tenth of a second."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def post(self, url: str, json: dict[str, Any]) -> "Session":
        assert url == "http://server/v1/completions"
        assert len(json["prompt"]) == serving.PROMPT
        return self

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    def raise_for_status(self) -> None:
        return None

    @property
    async def content(self) -> AsyncIterator[bytes]:
        self.clock[0] += 0.9
        for _ in range(serving.ANSWER):
            self.clock[0] += 0.1
            yield b'data: {"choices": []}\n'
            yield b"\n"
        yield b"data: [DONE]\n"


def test_times_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5.0]
    monkeypatch.setattr(serving.time, "perf_counter", lambda: clock[0])
    first, later = asyncio.run(serving.stream(Session(clock), "http://server", 3))
    assert first == pytest.approx(1)
    assert later == pytest.approx(0.1)


def a_run(load: float) -> dict[str, Any]:
    machine = {"date": "d", "cpu": "c", "threads": 2, "instruction_set": "i", "torch": "t", "vllm": "v", "commit": "x"}
    times = {"first": 0.5, "later": 0.025, "rate": 40.0}
    records = {"a server": {"1": times, "8": times | {"rate": 99.0}}}
    return {"machine": machine | {"load": load}, "model": "m", "prompt": 128, "answer": 64, "records": records}


def test_the_page_has_a_row_for_each_server() -> None:
    page = report.serving(a_run(0.0))
    alone, together = page.split("## 8 at once")
    assert "| a server | 500 | 25.0 | 40 |" in alone
    assert "| a server | 500 | 25.0 | 99 |" in together


@pytest.mark.parametrize("load", [0.4, 2.4])
def test_a_run_beside_other_work_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float) -> None:
    run, page = tmp_path / "run.json", tmp_path / "performance-serving.md"
    run.write_text(json.dumps(a_run(load)))
    monkeypatch.setattr("sys.argv", ["serving", "--from-json", str(run), "--docs", str(tmp_path)])
    if load < publishing.LARGEST_LOAD:
        serving.main()
        assert page.read_text() == report.serving(a_run(load))
    else:
        with pytest.raises(SystemExit, match=r"the load average was 2\.4"):
            serving.main()
        assert not page.exists()
