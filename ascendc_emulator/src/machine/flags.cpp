// SPDX-License-Identifier: Apache-2.0
// Flags and barriers within a core.
#include <algorithm>

#include "ascendc_emulator/machine/running_core.h"
#include "machine.h"

namespace ascendc_emulator {
namespace {

std::string event_text(int id) { return "event " + std::to_string(id); }

// The flag, or null and a violation if core or id are wrong.
EventFlag* find_flag(Core& core, uint32_t event, Pipe pipe, int id, const char* lacks_pipe, const Location& at) {
  Machine& machine = Machine::current();
  if (!core.has_pipe(pipe)) {
    machine.ReportViolation(Detector::kCore, lacks_pipe, at);
    return nullptr;
  }
  if (id < 0 || id >= static_cast<int>(kEventIds)) {
    machine.ReportViolation(Detector::kFlag, event_text(id) + " is not in [0, 7]", at);
    return nullptr;
  }
  return &core.flags[event * kEventIds + static_cast<uint32_t>(id)];
}

}  // namespace

void set_flag(uint32_t event, Pipe from, int id, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  machine.Issue(core, from);
  EventFlag* flag = find_flag(core, event, from, id, "SetFlag from a pipe that the core lacks", at);
  if (!flag) return;
  if (flag->is_set) {
    machine.ReportViolation(
        Detector::kFlag,
        "SetFlag of " + event_text(id) + ", which " + text_of(flag->set_at) + " set and nothing waited for", at);
  }
  flag->is_set = true;
  flag->completion = machine.CompletionOf(core, from);
  flag->set_at = at;
}

void wait_flag(uint32_t event, Pipe to, int id, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  machine.Issue(core, to);
  EventFlag* flag = find_flag(core, event, to, id, "WaitFlag on a pipe that the core lacks", at);
  if (!flag) return;
  if (!flag->is_set) {
    machine.ReportViolation(Detector::kFlag, "WaitFlag of " + event_text(id) + ", which nothing set", at);
    return;
  }
  flag->is_set = false;
  machine.WaitFor(core, to, flag->completion);
}

void pipe_barrier(Pipe pipe, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  if (!core.has_pipe(pipe)) {
    machine.ReportViolation(Detector::kCore, "PipeBarrier of a pipe that the core lacks", at);
    return;
  }
  machine.Issue(core, pipe);
  PipeState& state = core.pipe(pipe);
  if (machine.is_full()) state.clock[core.index * kPipes + static_cast<uint32_t>(pipe)] = state.issued;
  state.free_at = std::max(state.free_at, state.done_at);
}

void pipe_barrier_all() {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  for (uint32_t pipe = 1; pipe < kPipes; ++pipe) {
    machine.WaitFor(core, Pipe::kS, machine.CompletionOf(core, static_cast<Pipe>(pipe)));
  }
}

}  // namespace ascendc_emulator
