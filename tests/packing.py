# SPDX-License-Identifier: Apache-2.0
"""The packed form of int4 weights in plain arithmetic: an oracle that shares no code with the package."""

import numpy as np


def packed(codes: np.ndarray) -> np.ndarray:
    """uint8 [rows / 2, columns] of int4 values [rows, columns]: even rows in the low halves, odd rows in the high."""
    nibbles = codes.astype(np.int64) % 16
    return (nibbles[0::2] + 16 * nibbles[1::2]).astype(np.uint8)


def unpacked(data: np.ndarray) -> np.ndarray:
    """int8 [2 rows, columns] of packed values, uint8 [rows, columns]."""
    values = data.astype(np.int64)
    result = np.zeros((2 * len(data), data.shape[1]), np.int64)
    result[0::2], result[1::2] = values % 16, values // 16
    return np.where(result > 7, result - 16, result).astype(np.int8)
