// SPDX-License-Identifier: Apache-2.0
// A core: its on-chip memories, its pipes with their clocks, its flags.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "ascendc_emulator/machine/location.h"
#include "ascendc_emulator/machine/memory.h"
#include "ascendc_emulator/report.h"
#include "hazards.h"

namespace ascendc_emulator {

inline constexpr uint32_t kEventIds = 8;
inline constexpr uint32_t kCrossCoreIds = 16;
inline constexpr uint32_t kCrossCoreModes = 3;
inline constexpr uint32_t kCoresPerBlock = 3;    // an AIC and two AIVs
inline constexpr uint32_t kMaxOutstanding = 15;  // of a cross-core flag

enum class CoreKind : uint8_t { kCube, kVector };

// What had finished when a flag was set. clock[core * kPipes + pipe] is the number of that pipe's instructions that are
// known to have finished; it is empty in Mode::kCostOnly.
struct Completion {
  std::vector<uint32_t> clock;
  double time = 0;
};

struct Issued {
  Location at;
  const char* name;
};

struct PipeState {
  std::vector<uint32_t> clock;  // what has finished before the next instruction starts, as Completion::clock
  uint32_t issued = 0;
  uint64_t scalar_version = 0;  // of the core's, when this pipe last took over what the scalar unit knows
  std::vector<Issued> log;      // log[i - 1] is instruction i

  double free_at = 0;  // when the next instruction can start
  double done_at = 0;  // when the results of the last one can be used
  double busy = 0;
  double hbm_at = 0;  // until when its share of the HBM's bandwidth is used up
};

struct EventFlag {
  bool is_set = false;
  Completion completion;
  Location set_at;
};

// A CrossCoreSetFlag that has been issued; the scheduling module of the device has not acted on it yet.
struct FlagInFlight {
  uint32_t mode;
  uint32_t id;
  Pipe pipe;
  Completion completion;
  Location at;
  bool is_slow = false;  // takes effect when nothing else can happen
  // Flags in flight may overtake each other, unless they are the same one.
  bool IsSame(const FlagInFlight& other) const { return mode == other.mode && id == other.id && pipe == other.pipe; }
};

// One count of a flag that the core can wait for.
struct FlagCount {
  uint32_t mode;
  Completion completion;
};

struct Core {
  uint32_t index;   // among all cores
  uint32_t launch;  // of those that are under way at the same time
  uint32_t block;   // of its launch
  CoreKind kind;
  uint32_t sub_block;     // of an AIV in its block
  std::string of_launch;  // for reports, if there are several

  std::vector<uint8_t> data[kMemories], valid[kMemories];
  LocalShadow shadow[kMemories];
  uint32_t allocated[kMemories] = {};

  PipeState pipes[kPipes];
  uint64_t scalar_version = 1;  // changes whenever the scalar unit learns that something has finished

  std::map<uint32_t, EventFlag> flags;  // by event * kEventIds + id
  std::deque<FlagInFlight> in_flight;
  std::deque<FlagCount> counters[kCrossCoreIds];
  std::deque<Completion> pending[kCrossCoreModes][kCrossCoreIds];  // set here, but not yet by the rest of the group

  bool is_started = false;
  bool is_finished = false;
  int waits_for = -1;  // cross-core flag
  Location waits_at;

  PipeState& pipe(Pipe which) { return pipes[static_cast<uint32_t>(which)]; }
  bool has_pipe(Pipe which) const;
  std::string text() const;
};

}  // namespace ascendc_emulator
