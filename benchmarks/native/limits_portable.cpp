// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "limits.h"

namespace w4a4 {

uint64_t read_portable(const uint64_t* words, int64_t count) { return read(words, count); }

}  // namespace w4a4
