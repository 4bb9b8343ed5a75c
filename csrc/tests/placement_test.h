// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which thread zeroes, packs and multiplies which part of a weight.
void test_placement();
