// SPDX-License-Identifier: Apache-2.0
#include "scheduler.h"

#include <algorithm>
#include <utility>

#include "machine.h"

namespace ascendc_emulator {

Scheduler::Scheduler(Machine& machine) : machine_(machine), random_(machine.options().order) {
  uint32_t core = 0;
  for (const StreamLaunch& launch : machine.launches()) {
    states_.push_back({core, 0});
    core += launch.block_dim * kCoresPerBlock;
  }
}

void Scheduler::Run() { machine_.options().order == 0 ? RunInProgramOrder() : RunInRandomOrder(); }

bool Scheduler::CanRun(const Core& core) const {
  return core.is_started && !core.is_finished && (core.waits_for < 0 || !core.counters[core.waits_for].empty());
}

void Scheduler::RunInProgramOrder() {
  for (bool is_progressing = true; is_progressing;) {
    is_progressing = StartBlocks();
    for (const auto& core : machine_.cores()) {
      if (!CanRun(*core)) continue;
      is_progressing = true;
      machine_.Resume(*core);
    }
  }
}

void Scheduler::RunInRandomOrder() {
  for (;;) {
    StartBlocks();
    std::vector<Core*> runnable;
    size_t fast = 0, slow = 0;
    for (const auto& core : machine_.cores()) {
      if (CanRun(*core)) runnable.push_back(core.get());
      for (const FlagInFlight& flag : core->in_flight) ++(flag.is_slow ? slow : fast);
    }
    if (runnable.empty() && fast + slow == 0) return;
    if (runnable.empty() || (fast > 0 && Random(2) == 0)) {
      CompleteRandomFlag(fast == 0);
    } else {
      Core& core = *runnable[Random(runnable.size())];
      const size_t before = core.in_flight.size();
      machine_.Resume(core);
      for (size_t i = before; i < core.in_flight.size(); ++i) core.in_flight[i].is_slow = Random(2) == 0;
    }
  }
}

void Scheduler::CompleteRandomFlag(bool is_slow) {
  std::vector<std::pair<Core*, size_t>> flags;
  for (const auto& core : machine_.cores()) {
    for (size_t i = 0; i < core->in_flight.size(); ++i) {
      if (core->in_flight[i].is_slow == is_slow) flags.emplace_back(core.get(), i);
    }
  }
  const auto [core, index] = flags[Random(flags.size())];
  const auto chosen = core->in_flight.begin() + static_cast<std::ptrdiff_t>(index);
  const auto first = std::find_if(core->in_flight.begin(), chosen,
                                  [&](const FlagInFlight& earlier) { return earlier.IsSame(*chosen); });
  const FlagInFlight flag = std::move(*first);
  core->in_flight.erase(first);
  machine_.Select(*core);
  complete_flag(*core, flag);
}

bool Scheduler::HasFinished(uint32_t launch) const {
  const uint32_t first = states_[launch].first_core;
  const uint32_t cores = machine_.launches()[launch].block_dim * kCoresPerBlock;
  for (uint32_t core = first; core < first + cores; ++core) {
    if (!machine_.core(core).is_finished) return false;
  }
  return true;
}

// A core of the device runs a block until the block's AIC and AIVs have ended.
uint32_t Scheduler::FreeCores() const {
  uint32_t used = 0;
  for (uint32_t first = 0; first < machine_.cores().size(); first += kCoresPerBlock) {
    bool is_running = false;
    for (uint32_t core = first; core < first + kCoresPerBlock; ++core) {
      is_running = is_running || (machine_.core(core).is_started && !machine_.core(core).is_finished);
    }
    used += is_running;
  }
  return machine_.device_cores() > used ? machine_.device_cores() - used : 0;
}

bool Scheduler::StartBlocks() {
  bool has_started = false;
  while (StartOne()) has_started = true;
  return has_started;
}

bool Scheduler::StartOne() {
  const std::vector<StreamLaunch>& launches = machine_.launches();
  const uint32_t count = static_cast<uint32_t>(launches.size());
  if (machine_.options().order != 0) next_ += Random(count);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t index = (next_ + i) % count;
    const StreamLaunch& launch = launches[index];
    State& state = states_[index];
    if (state.started == launch.block_dim) continue;
    bool is_first = true;  // of those of its stream that have not ended
    for (uint32_t earlier = 0; earlier < index; ++earlier) {
      is_first = is_first && (launches[earlier].stream != launch.stream || HasFinished(earlier));
    }
    if (!is_first || FreeCores() < (launch.is_batch ? launch.block_dim : 1)) continue;
    for (uint32_t block = 0; block < (launch.is_batch ? launch.block_dim : 1); ++block) StartBlock(index);
    next_ = index + 1;
    return true;
  }
  return false;
}

void Scheduler::StartBlock(uint32_t launch) {
  State& state = states_[launch];
  for (uint32_t i = 0; i < kCoresPerBlock; ++i) {
    Core& core = machine_.core(state.first_core + state.started * kCoresPerBlock + i);
    core.is_started = true;
    // Earlier launches of its stream have finished.
    for (const auto& earlier : machine_.cores()) {
      if (earlier->launch >= launch) break;
      if (machine_.launches()[earlier->launch].stream != machine_.launches()[launch].stream) continue;
      for (uint32_t pipe = 0; pipe < kPipes; ++pipe) {
        machine_.WaitFor(core, Pipe::kS, machine_.CompletionOf(*earlier, static_cast<Pipe>(pipe)));
      }
    }
  }
  ++state.started;
}

}  // namespace ascendc_emulator
