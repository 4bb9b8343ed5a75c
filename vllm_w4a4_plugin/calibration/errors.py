# SPDX-License-Identifier: Apache-2.0
"""The one exception that calibration raises for what the user can repair."""

from vllm_w4a4_plugin.checkpoint import CheckpointError


class CalibrationError(CheckpointError):
    """A model, text, recipe or directory cannot be used; the message says which, why, and what to do."""
