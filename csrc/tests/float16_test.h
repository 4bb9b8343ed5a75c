// SPDX-License-Identifier: Apache-2.0
#pragma once

// The conversions between half precision and float, by the compiler's type and in software.
void test_float16();
