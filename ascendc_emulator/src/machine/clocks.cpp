// SPDX-License-Identifier: Apache-2.0
// How knowledge of what has finished, and when, passes between pipes.
#include <algorithm>

#include "machine.h"

namespace ascendc_emulator {

void Machine::Join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& other) const {
  if (!is_full() || other.empty()) return;
  uint32_t* to = clock.data();
  const uint32_t* from = other.data();
  for (size_t i = 0; i < clock.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// Instructions reach the pipes from the scalar unit, after everything that it has waited for.
void Machine::Issue(Core& core, Pipe pipe) {
  ++cost_.instructions;
  PipeState& scalar = core.pipe(Pipe::kS);
  PipeState& state = core.pipe(pipe);
  scalar.free_at += options_.rates.issue_cycles / options_.rates.clock_mhz;
  state.free_at = std::max(state.free_at, scalar.free_at);
  if (pipe == Pipe::kS || state.scalar_version == core.scalar_version) return;
  Join(state.clock, scalar.clock);
  state.scalar_version = core.scalar_version;
}

Completion Machine::CompletionOf(Core& core, Pipe pipe) const {
  const PipeState& state = core.pipe(pipe);
  Completion completion;
  completion.time = std::max(state.free_at, state.done_at);
  if (!is_full()) return completion;
  completion.clock = state.clock;
  completion.clock[core.index * kPipes + static_cast<uint32_t>(pipe)] = state.issued;
  return completion;
}

void Machine::WaitFor(Core& core, Pipe pipe, const Completion& completion) const {
  PipeState& state = core.pipe(pipe);
  Join(state.clock, completion.clock);
  state.free_at = std::max(state.free_at, completion.time);
  if (pipe == Pipe::kS) ++core.scalar_version;
}

}  // namespace ascendc_emulator
