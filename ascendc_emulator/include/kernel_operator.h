// SPDX-License-Identifier: Apache-2.0
// Stands in for the Ascend C header of this name, so that kernels compile and run on a host: a subset of Ascend C, with
// the names and signatures of the public documents. README.md says what is checked.
#pragma once

#include "ascendc_emulator/api/cube.h"
#include "ascendc_emulator/api/data_copy.h"
#include "ascendc_emulator/api/flags.h"
#include "ascendc_emulator/api/parameters.h"
#include "ascendc_emulator/api/tensor.h"
#include "ascendc_emulator/api/vector.h"
