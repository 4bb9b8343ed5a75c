// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

// RMSNorm, and linears that begin with it or with SiLU, against double precision and against the separate operators.
void test_steps(const w4a4::Kernels& kernels);
