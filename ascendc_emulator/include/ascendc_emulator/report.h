// SPDX-License-Identifier: Apache-2.0
// The result of a launch: everything that broke the rules of the hardware, and a prediction of the time.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace ascendc_emulator {

enum class Detector : uint8_t {
  kCapacity,       // buffers larger than their memory
  kBounds,         // an access outside its buffer or allocation, or a write to an input
  kAlignment,      // an address that the memory or the instruction does not accept
  kParameter,      // a count, stride, type or mode that the instruction does not accept
  kCore,           // an instruction of the other kind of core
  kUninitialised,  // a read of bytes that nothing has written
  kFlag,           // SetFlag and WaitFlag that do not match
  kCrossCore,      // CrossCoreSetFlag and CrossCoreWaitFlag that do not match, or too many of them
  kHazard,         // two accesses to the same bytes that nothing orders
  kDeadlock        // all remaining cores wait
};
const char* name_of(Detector detector);

struct Violation {
  Detector detector;
  std::string text;    // with the kernel's lines, core, pipe, buffer and bytes
  uint64_t count = 1;  // how often it occurred
};

enum class Pipe : uint8_t { kS, kV, kM, kMte1, kMte2, kMte3, kFix };
inline constexpr uint32_t kPipes = 7;
const char* name_of(Pipe pipe);

enum class Path : uint8_t { kGmToL1, kGmToUb, kUbToGm, kL0cToGm, kL0cToL1, kL1ToL0a, kL1ToL0b };
inline constexpr uint32_t kPaths = 7;
const char* name_of(Path path);

// A prediction from published rates. Times are in microseconds.
struct Cost {
  double critical_path = 0;  // through the dependencies that the launch recorded
  double memory_bound = 0;   // bytes from and to the HBM over its bandwidth
  double cube_bound = 0;     // cube cycles of all cores, shared evenly, over the clock
  double microseconds() const { return critical_path > memory_bound ? critical_path : memory_bound; }
  std::array<double, kPipes> busiest{};  // by Pipe: the longest time that this pipe works on any core
  std::array<uint64_t, kPaths> bytes{};  // by Path
  double memory_bytes = 0;               // from and to the HBM
  uint64_t cube_cycles = 0;
  uint64_t vector_cycles = 0;
  uint64_t instructions = 0;  // including flags and barriers
};

struct Report {
  std::vector<Violation> violations;  // each kind once for each pair of lines
  Cost cost;

  bool clean() const { return violations.empty(); }
  bool has(Detector detector) const;
  std::string text() const;  // one line for each violation
};

}  // namespace ascendc_emulator
