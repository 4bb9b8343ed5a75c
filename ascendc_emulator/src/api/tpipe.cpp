// SPDX-License-Identifier: Apache-2.0
#include "ascendc_emulator/api/flags.h"
#include "ascendc_emulator/api/tensor.h"

namespace AscendC {
namespace {

constexpr int kOwnFlags = 3;

}  // namespace

TPipe::TPipe(Location at) : at_(at) {
  if (!ascendc_emulator::is_cube_core()) return;
  for (int id = 0; id < kOwnFlags; ++id) SetFlag<HardEvent::M_MTE1>(id, at_);
}

TPipe::~TPipe() {
  if (ascendc_emulator::is_cube_core()) {
    for (int id = 0; id < kOwnFlags; ++id) WaitFlag<HardEvent::M_MTE1>(id, at_);
  }
  PipeBarrier<PIPE_ALL>(at_);
}

}  // namespace AscendC
