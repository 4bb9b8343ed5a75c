# SPDX-License-Identifier: Apache-2.0
"""The one exception that calibration raises for mistakes that the user can correct."""

from vllm_w4a4_plugin.checkpoint import CheckpointError


class CalibrationError(CheckpointError):
    """A model, text, recipe, option or directory cannot be used; the message says which, why, and what to do.

    Options are named in backquotes, as in `calib_file`: the command line replaces them by its own spelling.
    """
