// SPDX-License-Identifier: Apache-2.0
// Where in a kernel an instruction stands; reports name it.
#pragma once

#include <source_location>

namespace ascendc_emulator {

using Location = std::source_location;

}  // namespace ascendc_emulator
