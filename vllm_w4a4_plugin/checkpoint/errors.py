# SPDX-License-Identifier: Apache-2.0
"""The one exception that reading and checking checkpoints raises, and parts of its messages."""

from vllm_w4a4_plugin.text import printable

DAMAGED = "The checkpoint is damaged or does not fit config.json; copy or quantize it again."
"""What to do about values and shapes that no quantization makes."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as it stands.

    The message names the file, the layer and the tensor as far as they are known, what was expected and what
    was found, and what to do about it. It is no ValueError: vLLM builds its configuration inside pydantic, which hides
    those in lines of its own.

    Much of a message comes from files that somebody else made, so nothing in it can steer a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def in_file(file: str) -> str:
    """The beginning of a message about something in a file; "" where the file is not known."""
    return f"{file}: " if file else ""
