// SPDX-License-Identifier: Apache-2.0
// One instruction of the running core. Each emulated instruction makes one of these, declares every access to memory
// (which checks it) and then what it costs.
#pragma once

#include <cstdint>
#include <string>

#include "../report.h"
#include "location.h"
#include "memory.h"

namespace ascendc_emulator {

struct Accessor;
struct Allocation;
struct Conflict;
struct Core;
struct PipeState;
class Machine;

// Accesses outside a buffer are reported and redirected to scratch memory. Addresses that Read and Write return are
// null in Mode::kCostOnly.
class Instruction {
 public:
  Instruction(Pipe pipe, const char* name, const Location& at);
  Instruction(const Instruction&) = delete;

  bool is_full() const;  // Mode::kFull: data is moved
  void ReportViolation(Detector detector, const std::string& what) const;
  bool Check(bool is_right, Detector detector, const char* what) const {
    if (!is_right) ReportViolation(detector, what);
    return is_right;
  }

  // `needs_values`: every byte must have been written. `limit`: where the buffer ends.
  const uint8_t* Read(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool needs_values = true);
  uint8_t* Write(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, bool is_valid = true);
  const uint8_t* ReadGlobal(const void* address, uint64_t bytes);
  uint8_t* WriteGlobal(void* address, uint64_t bytes);
  // One byte for each byte of memory, 1 if it has been written; null outside the memory.
  uint8_t* Validity(Memory memory, uint64_t offset, uint64_t bytes);

  // From here on, accesses of this pipe to the same bytes need no barrier between them (large Mmads).
  void AllowOverlap() { allows_overlap_ = true; }

  void Transfer(Path path, uint64_t bytes);  // bytes of global memory are counted by ReadGlobal and WriteGlobal
  void Compute(uint64_t cycles);

 private:
  bool InBounds(Memory memory, uint64_t offset, uint64_t bytes, uint64_t limit, const char* verb);
  Allocation* FindGlobal(const void* address, uint64_t bytes, const char* verb);
  void CheckWritten(const uint8_t* valid, const std::string& where, uint64_t offset, uint64_t bytes) const;
  Accessor accessor() const;
  void ReportHazard(const Conflict& conflict, const std::string& where) const;
  void CountGlobal(Allocation& allocation, uint64_t offset, uint64_t bytes);
  void Occupy(double microseconds, double latency);

  Machine& machine_;
  Core& core_;
  PipeState& state_;
  const Pipe pipe_;
  const char* const name_;
  const Location at_;
  uint32_t index_;
  bool allows_overlap_ = false;
  double hbm_bytes_ = 0;  // what this instruction moves from or to the HBM
};

}  // namespace ascendc_emulator
