// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "linear.h"

namespace w4a4 {

// Writes rows [first_row, first_row + rows) of a weight with `in_features` features into `packed` (see layout.h).
// `weight` is [rows, in_features], row-major. Returns whether all values are in [-8, 7]; others are packed as any
// value.
bool pack_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, uint8_t* packed,
               const Pool& pool);

// The inverse, for rows [0, rows).
void unpack_rows(const uint8_t* packed, int64_t rows, int64_t in_features, int8_t* weight);

// The same for int8 weights.
void pack_int8_rows(const int8_t* weight, int64_t rows, int64_t in_features, int64_t first_row, int8_t* packed,
                    const Pool& pool);

// Index of the first value outside [-8, 7], or -1.
int64_t find_outside_int4(const int8_t* values, int64_t count);

}  // namespace w4a4
