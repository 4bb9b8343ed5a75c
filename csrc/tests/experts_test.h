// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

// The operator for the experts of a layer, against the oracle.
void test_experts(const w4a4::Kernels& kernels);
