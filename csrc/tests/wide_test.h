// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"

// Products with activations over the whole range of int8, and products with float activations.
void test_wide(const w4a4::Kernels& kernels);
