// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

// NaN, infinities and the ends of the dtypes' ranges, in every operand of every operator.
void test_nonfinite(const w4a4::Kernels& kernels);
