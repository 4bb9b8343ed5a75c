# SPDX-License-Identifier: Apache-2.0
"""Targets whose residual stream is rotated, which a head that drafts for them does not know."""

from vllm.logger import init_logger

from vllm_w4a4_plugin.checkpoint import CheckpointReader
from vllm_w4a4_plugin.constants import LOGGER

logger = init_logger(LOGGER)

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def is_rotated(reader: CheckpointReader) -> bool:
    """Whether the norms before all linear layers have lost their weights to them, as QuaRot's rotation requires."""
    norms = (reader.load(name) for name in reader.tensors if name.endswith(NORMS))
    have_one_value = [bool((norm == norm[0]).all()) for norm in norms]
    return bool(have_one_value) and all(have_one_value)


def warn_of_rotation(reader: CheckpointReader) -> None:
    """Say, before a head is loaded that reads the target's residual stream, that it may not understand it."""
    if is_rotated(reader):
        logger.warning(
            "%s: the residual stream of this model is rotated (QuaRot). A head trained with the model before that "
            "reads other numbers than it knows, so that few of its tokens will be accepted; what is generated stays "
            "the same. Rotate the inputs of the head's fc too, or use a draft model (vllm-ascend issue 5974).",
            reader.directory,
        )
