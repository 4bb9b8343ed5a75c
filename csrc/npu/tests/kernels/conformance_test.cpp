// SPDX-License-Identifier: Apache-2.0
// The kernels against the reference, bit for bit wherever sums are exact.
#include <cstdlib>

#include "check.h"
#include "models.h"
#include "run.h"

using w4a4::npu::LinearShape;

namespace {

void check_equal(const Linear16& linear, uint32_t cores, bool fused) {
  const std::string what = linear.text() + ", " + std::to_string(cores) + " cores" + (fused ? "" : ", two launches");
  const Result found = run_linear(linear, cores, fused);
  const Quantized16 activations = reference_quantize(linear, reference_transform(linear));
  check(found.activations.scale == activations.scale, what + ": token scales");
  check(found.activations.q == activations.q, what + ": int4 activations");
  check(found.y == reference_multiply(linear, activations), what + ": y");
}

}  // namespace

int main() {
  check_equal(random_linear({3, 96, 40, 0, 0}, Dtype::kBFloat16, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({3, 192, 40, 12, 16}, Dtype::kHalf, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({3, 512, 40, 0, 32}, Dtype::kHalf, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({3, 512, 40, 16, 0}, Dtype::kHalf, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({70, 5120, 700, 64, 80}, Dtype::kBFloat16, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({1, 5120, 700, 64, 80}, Dtype::kBFloat16, Values::kSmallIntegers, 1), 2, true);
  check_equal(random_linear({1, 5120, 700, 64, 80, 20, true, 0.7f}, Dtype::kBFloat16, Values::kSmallIntegers, 1), 2,
              true);
  check_equal(random_linear({130, 3072, 300, 48, 64, 12, true, 0.7f}, Dtype::kHalf, Values::kSmallIntegers, 1), 3,
              false);
  return finish("conformance_test");
}
