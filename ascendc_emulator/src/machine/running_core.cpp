// SPDX-License-Identifier: Apache-2.0
#include "ascendc_emulator/machine/running_core.h"

#include "machine.h"

namespace ascendc_emulator {

bool is_cube_core() { return Machine::current().core().kind == CoreKind::kCube; }
uint32_t block_count() { return Machine::current().launch().block_dim; }
uint32_t block_index() { return Machine::current().core().block; }
uint32_t sub_block_index() { return Machine::current().core().sub_block; }

int division_ulps() { return Machine::current().options().division_ulps; }
FixpipeRounding fixpipe_rounding() { return Machine::current().options().fixpipe_rounding; }

uint32_t allocate(Memory memory, uint32_t bytes, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  const uint32_t which = static_cast<uint32_t>(memory);
  if ((memory == Memory::kUb) != (core.kind == CoreKind::kVector)) {
    machine.ReportViolation(Detector::kCore, std::string("a buffer in ") + name_of(memory) + ", which the core lacks",
                            at);
  }
  const uint32_t begin = core.allocated[which];
  core.allocated[which] += (bytes + 31) / 32 * 32;
  if (core.allocated[which] > kMemoryBytes[which]) {
    machine.ReportViolation(Detector::kCapacity,
                            std::string(name_of(memory)) + " has " + std::to_string(kMemoryBytes[which]) +
                                " bytes, buffers need " + std::to_string(core.allocated[which]),
                            at);
  }
  return begin;
}

}  // namespace ascendc_emulator
