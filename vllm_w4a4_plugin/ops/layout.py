# SPDX-License-Identifier: Apache-2.0
"""Shape of the CPU's packed int4 weights. `csrc/cpu/layout.h` defines it; `load_library` compares."""

from vllm_w4a4_plugin.constants import INT4_GROUP_MULTIPLE

INT4_TILE_ROWS = 16
"""Output features that are interleaved in one tile."""

INT8_BLOCK_BYTES = INT4_TILE_ROWS * INT4_GROUP_MULTIPLE
INT4_BLOCK_BYTES = INT4_TILE_ROWS * INT4_GROUP_MULTIPLE // 2


def packed_int4_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Shape of the packed form of an int4 weight [out_features, in_features]; one byte per element."""
    return (*_tiles_and_blocks(out_features, in_features), INT4_BLOCK_BYTES)


def packed_int8_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """Shape of the packed form of an int8 weight [out_features, in_features]."""
    return (*_tiles_and_blocks(out_features, in_features), INT8_BLOCK_BYTES)


def _tiles_and_blocks(out_features: int, in_features: int) -> tuple[int, int]:
    tiles = -(-out_features // INT4_TILE_ROWS)
    blocks = -(-in_features // INT4_GROUP_MULTIPLE)
    return tiles, blocks
