# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with damaged files load correctly or end in CheckpointError, and `verify` and loading agree on each.

W4A4_FUZZ=20000 tries so many; W4A4_FUZZ_FIRST=N starts at case N, whose damage depends on its number alone. A case that
hangs ends the process and prints where.
"""

import faulthandler
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.cases import write_case
from tests.conftest import MICRO
from tests.engine.packed_cases import write_packed
from tests.fuzz.answers import findings, load, one_rank, unchecked
from tests.fuzz.damage import Expected, damage

CASES = int(os.environ.get("W4A4_FUZZ", "1000"))
FIRST = int(os.environ.get("W4A4_FUZZ_FIRST", "0"))
LOADED = 25
"""One of so many cases is loaded too, which takes twenty times as long; all of them are verified."""

SECONDS, EXTRA_MEMORY = 60, 400e6
"""Most time for one case, and most memory in bytes that all of them together may need on top."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bases")
    write_case("n3_glm4", root / "n3_glm4")
    write_case("c4_moe_mixed", root / "c4_moe_mixed")
    write_packed(MICRO, root / "packed")
    return [MICRO, root / "n3_glm4", root / "c4_moe_mixed", root / "packed"]


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


def case(number: int, bases: list[Path], folder: Path) -> tuple[Path, str, Expected]:
    """The damaged checkpoint of a number, what was done to it, and what must come of it."""
    random = Random(number)
    base = random.choice(bases)
    directory, outside = folder / "inside", folder / "outside"
    shutil.copytree(base, directory)
    shutil.copytree(base, outside)
    said, expected = damage(directory, outside, random)
    return directory, f"case {number}, {base.name}, {said}", expected


def check(directory: Path, text: str, expected: Expected, is_loaded: bool) -> str:
    """Check the answers to one case; returns what they were."""
    found = findings(directory)
    said = f"{text}\nverify: {found[:2] or 'good'}"
    assert expected is not Expected.GOOD or not found, said
    assert expected is not Expected.BAD or found, said
    if not is_loaded:
        return "refused" if found else "good"
    answer = load(directory)
    error = "" if answer.error is None else f"{type(answer.error).__name__}: {answer.error}"
    said += f"\nloading: {error[:500] or 'loads'}"
    # transformers and vLLM check every key of config.json, `verify` those that the weights depend on.
    cannot_know = answer.of_vllm and (bool(unchecked(directory)) or ", config.json: " in text)
    assert cannot_know or bool(found) == bool(error), said
    assert not error or answer.is_ours or answer.of_vllm, said
    assert answer.wrong == (), said
    return "refused by both" if error else "loaded"


@pytest.mark.timeout(0)
def test_damaged_files(bases: list[Path], tmp_path: Path) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    count: Counter[str] = Counter()
    failures: list[str] = []
    for number in range(FIRST, FIRST + CASES):
        folder = tmp_path / "case"
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            count[check(*case(number, bases, folder), is_loaded=number % LOADED == 0)] += 1
        except Exception as error:  # the cases after it are tried all the same
            failures.append(f"case {number}: {type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(folder)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    seconds = time.process_time() - started
    print(
        f"cases {FIRST} to {FIRST + CASES - 1}: {dict(count)}, {seconds:.0f} CPU seconds, {grown / 1e6:.0f} MB more",
        file=sys.stderr,
    )
    assert failures == [], "\n\n".join(failures)
    assert grown < EXTRA_MEMORY
    assert count["refused"] + count["refused by both"] > CASES / 3, "the damage must show, or nothing was tried"
    assert count["good"] + count["loaded"] > CASES / 20, "some of it must not, or nothing was loaded"
