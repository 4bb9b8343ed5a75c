// SPDX-License-Identifier: Apache-2.0
// What a launch leaves behind: everything that it did against the rules of the hardware, and what it would cost.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulation {

enum class Detector : uint8_t {
  kCapacity,       // a buffer is larger than its memory
  kBounds,         // an access outside of its buffer or allocation, or a write to an input
  kAlignment,      // an address that the memory or the instruction does not take
  kParameter,      // a count, stride, type or mode that the instruction does not take
  kCore,           // an instruction of the other kind of core
  kUninitialised,  // bytes that nothing has written
  kFlag,           // SetFlag and WaitFlag that do not match
  kCrossCore,      // CrossCoreSetFlag and CrossCoreWaitFlag that do not match, or too many of them
  kHazard,         // two accesses to the same bytes that nothing orders
  kDeadlock        // every core that is left waits
};
const char* name_of(Detector detector);

struct Violation {
  Detector detector;
  std::string text;    // with kernel lines, core, pipe, buffer and bytes
  uint64_t count = 1;  // times seen
};

// Order of the arrays in Cost.
enum class Pipe : uint8_t { kS, kV, kM, kMte1, kMte2, kMte3, kFix };
inline constexpr uint32_t kPipes = 7;
const char* name_of(Pipe pipe);

enum class Path : uint8_t { kGmToL1, kGmToUb, kUbToGm, kL0cToGm, kL0cToL1, kL1ToL0a, kL1ToL0b };
inline constexpr uint32_t kPaths = 7;
const char* name_of(Path path);

// A prediction by published rates. Times in microseconds.
struct Cost {
  double critical_path = 0;  // of the busiest core, by the recorded dependencies
  double memory_bound = 0;   // bytes that must come from or go to HBM over its bandwidth
  double cube_bound = 0;     // cube cycles of all cores, evenly shared, over the clock
  double microseconds() const { return critical_path > memory_bound ? critical_path : memory_bound; }
  std::array<double, kPipes> busiest{};  // most that this pipe works on any core
  std::array<uint64_t, kPaths> bytes{};
  double memory_bytes = 0;  // from and to the HBM
  uint64_t cube_cycles = 0;
  uint64_t vector_cycles = 0;
  uint64_t instructions = 0;  // with flags and barriers
};

struct Report {
  std::vector<Violation> violations;  // each kind at each pair of lines once
  Cost cost;

  bool clean() const { return violations.empty(); }
  bool has(Detector detector) const;
  std::string text() const;  // one line per violation
};

}  // namespace emulation
