# SPDX-License-Identifier: Apache-2.0
"""Comparison of installed versions with those that the tests run with."""


def is_tested(version: str, tested: tuple[str, str]) -> bool:
    """Whether `version` lies within a range of minor versions; one without numbers (a development build) does."""
    first, last = (tuple(map(int, text.split("."))) for text in tested)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return not numbers or first <= numbers <= last
