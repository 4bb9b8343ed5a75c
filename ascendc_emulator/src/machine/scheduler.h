// SPDX-License-Identifier: Apache-2.0
// What happens next where the hardware promises no order: which core continues, which flag between cores takes effect,
// which block starts on a free core.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "core.h"

namespace ascendc_emulator {

class Machine;

// A CrossCoreSetFlag takes effect.
void complete_flag(Core& core, const FlagInFlight& flag);

// Options::order 0: the cores run in the order of their numbers, each until it waits, and flags take effect when they
// are set. Otherwise all of this is random, from that number: flags stay in flight, half of them for as long as
// possible, and those of one core overtake each other unless they have the same id, mode and pipe.
class Scheduler {
 public:
  explicit Scheduler(Machine& machine);
  void Run();  // until nothing can happen any more

 private:
  struct State {  // of a launch
    uint32_t first_core = 0;
    uint32_t started = 0;  // blocks
  };
  bool CanRun(const Core& core) const;
  void RunInProgramOrder();
  void RunInRandomOrder();
  bool HasFinished(uint32_t launch) const;
  uint32_t FreeCores() const;
  // Whether a block was started. Launches of several streams start blocks in turn.
  bool StartOne();
  bool StartBlocks();
  void StartBlock(uint32_t launch);
  void CompleteRandomFlag(bool is_slow);
  uint32_t Random(size_t count) { return static_cast<uint32_t>(random_() % count); }

  Machine& machine_;
  std::mt19937_64 random_;
  std::vector<State> states_;  // of the launches
  uint32_t next_ = 0;          // the launch whose turn it is to start a block
};

}  // namespace ascendc_emulator
