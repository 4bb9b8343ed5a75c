// SPDX-License-Identifier: Apache-2.0
// A few small linears that together make every flag, barrier and guard of the kernels matter: each ring wraps around,
// each stage and slot is reused, each tail occurs.
#pragma once

#include <vector>

#include "linear.h"
#include "run.h"

struct MutationCase {
  Linear16 linear;
  uint32_t cores;
  Launch launch;
};

inline std::vector<MutationCase> mutation_cases() {
  const auto linear = [](const w4a4::npu::LinearShape& shape, Dtype dtype) {
    return random_linear(shape, dtype, Values::kSmallIntegers, 7);
  };
  const Dtype half = Dtype::kHalf, bfloat16 = Dtype::kBFloat16;
  return {
      // One row, which every core transforms for itself; a tile of the last core has no row for the second AIV.
      {linear({1, 192, 72, 12, 16, 1, true}, bfloat16), 2, Launch::kFused},
      // Shared tokens, the barrier, three ring slots of transformed tokens per core, several tiles.
      {linear({40, 384, 600, 16, 24, 1, true, 0.8f}, half), 2, Launch::kFused},
      // More than one chunk of features, more steps than stages, several passes.
      {linear({14, 5120, 300, 64, 80}, bfloat16), 2, Launch::kFused},
      // One token per pass, in two blocks of columns.
      {linear({7, 18496, 40, 136, 136}, half), 1, Launch::kFused},
      // One factor.
      {linear({12, 2048, 40, 16, 0}, bfloat16), 1, Launch::kFused},
      {linear({40, 2304, 40, 0, 72}, half), 1, Launch::kTwo},
      // Resident activations over two rows of tiles; streamed ones in two units; groups.
      {linear({150, 2120, 400, 0, 0}, half), 2, Launch::kFused},
      {linear({150, 1000, 600, 0, 0, 1, true}, bfloat16), 1, Launch::kTwo},
      {linear({20, 1536, 300, 0, 0, 6, true}, half), 1, Launch::kFused},
      {linear({70, 1152, 200, 0, 0, 3}, bfloat16), 1, Launch::kFused},
      // A product with few results whose depth does not fit in L0 at once.
      {linear({2, 2304, 40, 144, 16}, bfloat16), 1, Launch::kFused},
      // Activations that leave room for fewer stages of weights, and those that do not fit in L1.
      {linear({2, 5120, 1030, 0, 0}, half), 1, Launch::kFused},
      {linear({128, 9216, 256, 0, 0}, bfloat16), 1, Launch::kFused},
      {linear({112, 5200, 600, 0, 0}, half), 1, Launch::kFused},
      // As many depth steps as stages; the next row of tiles overwrites them.
      {linear({150, 2040, 400, 0, 0}, bfloat16), 1, Launch::kFused},
      // A last block of columns that is narrower.
      {linear({3, 12288, 40, 256, 48}, half), 1, Launch::kFused},
      // A last chunk of fewer features than a vector repeat.
      {linear({1, 4136, 24, 0, 0}, half), 1, Launch::kFused},
      // A core without tokens.
      {linear({1, 192, 40, 12, 16}, bfloat16), 2, Launch::kTwo},
      // The next chunk transformed between this chunk's tiles: both factors and one, a core without tiles.
      {linear({300, 1024, 130, 16, 64, 1, true}, bfloat16), 2, Launch::kPipelined},
      {linear({290, 1024, 24, 16, 0}, half), 3, Launch::kPipelined},
      {linear({330, 1088, 240, 0, 64}, bfloat16), 1, Launch::kPipelined},
      // A last chunk of fewer tokens than cores.
      {linear({194, 1024, 24, 16, 64}, half), 3, Launch::kPipelined},
      // Tall tiles of tokens that do not fit in UB together with the epilogue.
      {linear({70, 9216, 16, 96, 96}, half), 2, Launch::kFused},
      // A tile of one row after full ones.
      {linear({1153, 64, 16, 0, 0}, half), 2, Launch::kFused},
  };
}
