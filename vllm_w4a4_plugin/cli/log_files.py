# SPDX-License-Identifier: Apache-2.0
"""Progress bars in log files."""

import sys

from vllm_w4a4_plugin import envs

LOG_INTERVAL_S = 10.0
"""Shortest time between two lines of progress."""

LOG_SETTINGS = {"TQDM_MININTERVAL": str(LOG_INTERVAL_S), "TQDM_DELAY": str(LOG_INTERVAL_S)}
"""tqdm's own variables, which calm the bars of vLLM and of the processes that it starts."""


def calm_in_logs() -> None:
    """Calm the bars of libraries, unless they are drawn in a terminal. tqdm must not have been imported yet."""
    if not sys.stderr.isatty():
        for name, value in LOG_SETTINGS.items():
            envs.set_default(name, value)
