// SPDX-License-Identifier: Apache-2.0
// An instruction's accesses to memory.
#include "ascendc_emulator/machine/instruction.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ascendc_emulator {

Instruction::Instruction(Pipe pipe, const char* name, const Location& at)
    : machine_(Machine::current()),
      core_(machine_.core()),
      state_(core_.pipe(pipe)),
      pipe_(pipe),
      name_(name),
      at_(at) {
  machine_.Issue(core_, pipe);
  index_ = ++state_.issued;
  if (pipe == Pipe::kS) {
    // The scalar unit finishes one access before it does anything else.
    if (is_full()) state_.clock[core_.index * kPipes] = index_ - 1;
    ++core_.scalar_version;
  }
  if (is_full()) state_.log.push_back({at, name});
  if (!core_.has_pipe(pipe)) ReportViolation(Detector::kCore, "is not for this kind of core");
}

bool Instruction::is_full() const { return machine_.is_full(); }

void Instruction::ReportViolation(Detector detector, const std::string& what) const {
  machine_.ReportViolation(detector, std::string(name_) + " (" + name_of(pipe_) + "): " + what, at_);
}

void Instruction::ReportHazard(const Conflict& conflict, const std::string& where) const {
  Core& core = machine_.core(conflict.core);
  const Issued& earlier = core.pipe(conflict.pipe).log[conflict.index - 1];
  ReportViolation(Detector::kHazard,
                  std::string(conflict.what) + " after " + earlier.name + " (" + name_of(conflict.pipe) +
                      (conflict.core == core_.index ? "" : ", " + core.text()) + ") at " + text_of(earlier.at) +
                      ", which nothing orders before it: " + range_text(where, conflict.begin, conflict.bytes));
}

Accessor Instruction::accessor() const { return {core_.index, pipe_, index_, state_.clock, allows_overlap_}; }

void Instruction::CheckWritten(const uint8_t* valid, const std::string& where, uint64_t offset, uint64_t bytes) const {
  const void* hole = std::memchr(valid, 0, bytes);
  if (!hole) return;
  const uint64_t at = offset + static_cast<uint64_t>(static_cast<const uint8_t*>(hole) - valid);
  ReportViolation(Detector::kUninitialised, "reads what nothing has written: " + range_text(where, at, 1));
}

// --- on-chip memory ---

bool Instruction::InBounds(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, const char* verb) {
  const uint64_t capacity = kMemoryBytes[static_cast<uint32_t>(memory)];
  if (bytes == 0 || (offset + bytes <= limit && offset + bytes <= capacity)) return bytes > 0;
  ReportViolation(Detector::kBounds, std::string(verb) + " " + range_text(name_of(memory), offset, bytes) +
                                         ", but the buffer ends at " + std::to_string(std::min(limit, capacity)));
  return false;
}

const uint8_t* Instruction::Read(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool needs_values) {
  if (!InBounds(memory, offset, bytes, limit, "reads")) return machine_.Scratch(bytes);
  if (!is_full()) return nullptr;
  const uint32_t which = static_cast<uint32_t>(memory);
  if (core_.data[which].empty()) return machine_.Scratch(bytes);
  core_.shadow[which].Read(accessor(), offset, bytes,
                           [&](const Conflict& conflict) { ReportHazard(conflict, name_of(memory)); });
  if (needs_values) CheckWritten(core_.valid[which].data() + offset, name_of(memory), offset, bytes);
  return core_.data[which].data() + offset;
}

uint8_t* Instruction::Write(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool is_valid) {
  if (!InBounds(memory, offset, bytes, limit, "writes")) return machine_.Scratch(bytes);
  if (!is_full()) return nullptr;
  const uint32_t which = static_cast<uint32_t>(memory);
  if (core_.data[which].empty()) return machine_.Scratch(bytes);
  core_.shadow[which].Write(accessor(), offset, bytes,
                            [&](const Conflict& conflict) { ReportHazard(conflict, name_of(memory)); });
  if (is_valid) std::memset(core_.valid[which].data() + offset, 1, bytes);
  return core_.data[which].data() + offset;
}

uint8_t* Instruction::Validity(Memory memory, uint64_t offset, uint64_t bytes) {
  const uint32_t which = static_cast<uint32_t>(memory);
  if (!is_full() || offset + bytes > core_.valid[which].size()) return nullptr;
  return core_.valid[which].data() + offset;
}

// --- global memory ---

// Null, and a violation, if the bytes are not within one allocation.
Allocation* Instruction::FindGlobal(const void* address, uint64_t bytes, const char* verb) {
  const uint8_t* begin = static_cast<const uint8_t*>(address);
  Allocation* allocation = machine_.Find(begin);
  if (!allocation) {
    ReportViolation(Detector::kBounds, std::string(verb) + " global memory that is not allocated");
    return nullptr;
  }
  if (begin + bytes > allocation->begin + allocation->bytes) {
    const uint64_t offset = static_cast<uint64_t>(begin - allocation->begin);
    ReportViolation(Detector::kBounds, std::string(verb) + " " + range_text(allocation->name, offset, bytes) +
                                           ", which has " + std::to_string(allocation->bytes) + " bytes");
    return nullptr;
  }
  return allocation;
}

const uint8_t* Instruction::ReadGlobal(const void* address, uint64_t bytes) {
  if (bytes == 0) return machine_.Scratch(1);
  Allocation* allocation = FindGlobal(address, bytes, "reads");
  if (!allocation) return machine_.Scratch(bytes);
  const uint8_t* begin = static_cast<const uint8_t*>(address);
  const uint64_t offset = static_cast<uint64_t>(begin - allocation->begin);
  CountGlobal(*allocation, offset, bytes);
  if (!is_full() || allocation->is_input) return begin;
  allocation->shadow.Access(accessor(), allocation->bytes, offset, bytes, false,
                            [&](const Conflict& conflict) { ReportHazard(conflict, allocation->name); });
  CheckWritten(allocation->valid.data() + offset, allocation->name, offset, bytes);
  return begin;
}

uint8_t* Instruction::WriteGlobal(void* address, uint64_t bytes) {
  if (bytes == 0) return machine_.Scratch(1);
  Allocation* allocation = FindGlobal(address, bytes, "writes");
  if (!allocation) return machine_.Scratch(bytes);
  uint8_t* begin = static_cast<uint8_t*>(address);
  const uint64_t offset = static_cast<uint64_t>(begin - allocation->begin);
  if (allocation->is_input) {
    ReportViolation(Detector::kBounds, "writes an input: " + range_text(allocation->name, offset, bytes));
    return machine_.Scratch(bytes);
  }
  CountGlobal(*allocation, offset, bytes);
  if (!is_full()) return begin;
  allocation->shadow.Access(accessor(), allocation->bytes, offset, bytes, true,
                            [&](const Conflict& conflict) { ReportHazard(conflict, allocation->name); });
  std::memset(allocation->valid.data() + offset, 1, bytes);
  return begin;
}

}  // namespace ascendc_emulator
