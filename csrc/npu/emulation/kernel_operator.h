// SPDX-License-Identifier: Apache-2.0
// Stands in for the Ascend C header of this name, so that kernels compile and run on a host: the calls that the kernels
// of this project use, by the names and signatures of the public documents. README.md says what is checked.
#pragma once

#include "cube.h"
#include "data_copy.h"
#include "parameters.h"
#include "synchronisation.h"
#include "tensor.h"
#include "vector.h"
