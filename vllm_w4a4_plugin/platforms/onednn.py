# SPDX-License-Identifier: Apache-2.0
"""How many compiled products oneDNN keeps, which is what a server's memory grows by.

oneDNN compiles a product for each number of tokens and each shape of weights that it meets, and keeps the last 1,024 of
them, some hundred KB each. A server meets another number of tokens in nearly every step with prompts: its engine grew
by half a gigabyte within a minute, and still after a quarter of an hour (docs/reliability.md).
Drop this when vLLM's CPU backend bounds what oneDNN keeps.
"""

from vllm_w4a4_plugin import envs

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
FORMER_NAME = "DNNL_PRIMITIVE_CACHE_CAPACITY"

PRODUCTS = 64
"""Decoding repeats the same few shapes; those of a step must all find room."""


def bound_cache() -> None:
    """Before the first product of this process and of those that it starts. What the user has set stays."""
    if FORMER_NAME not in envs.snapshot():
        envs.set_default(CAPACITY, str(PRODUCTS))
