// SPDX-License-Identifier: Apache-2.0
// Flags and barriers within a core and between cores.
#include <algorithm>

#include "ascendc_emulator/machine/running_core.h"
#include "machine.h"

namespace ascendc_emulator {
namespace {

std::string event_text(int id) { return "event " + std::to_string(id); }
std::string flag_text(uint32_t id) { return "flag " + std::to_string(id); }

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

bool is_cross_core_id(uint32_t id, const Location& at) {
  if (id < kCrossCoreIds) return true;
  Machine::current().ReportViolation(Detector::kCrossCore, flag_text(id) + " is not in [0, 15]", at);
  return false;
}

// Once all of `from` have set the flag, it counts up on all of `to`.
void signal_group(const std::vector<Core*>& from, const std::vector<Core*>& to, uint32_t mode, uint32_t id,
                  const Location& at) {
  Machine& machine = Machine::current();
  for (const Core* core : from) {
    if (core->pending[mode][id].empty()) return;
  }
  Completion all;
  all.clock.assign(machine.is_full() ? machine.cores().size() * kPipes : 0, 0);
  for (Core* core : from) {
    const Completion& completion = core->pending[mode][id].front();
    machine.Join(all.clock, completion.clock);
    all.time = std::max(all.time, completion.time);
    core->pending[mode][id].pop_front();
  }
  for (Core* core : to) {
    core->counters[id].push_back(all);
    if (core->counters[id].size() <= kMaxOutstanding) continue;
    machine.ReportViolation(
        Detector::kCrossCore,
        flag_text(id) + " of " + core->text() + " counts more than " + std::to_string(kMaxOutstanding), at);
  }
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

void cross_core_set_flag(uint32_t mode, Pipe pipe, uint32_t id, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  machine.Issue(core, pipe);
  if (!core.has_pipe(pipe)) {
    machine.ReportViolation(Detector::kCore, "CrossCoreSetFlag on a pipe that the core lacks", at);
    return;
  }
  if (!is_cross_core_id(id, at)) return;
  std::deque<Completion>& pending = core.pending[mode][id];
  pending.push_back(machine.CompletionOf(core, pipe));
  pending.back().time += machine.options().rates.cross_core_us;
  if (pending.size() > kMaxOutstanding) {
    machine.ReportViolation(Detector::kCrossCore,
                            flag_text(id) + " was set " + std::to_string(pending.size()) +
                                " times before the other cores of its group set it",
                            at);
  }
  std::vector<Core*> same_kind, vectors, cube;
  for (const auto& other : machine.cores()) {
    if (other->kind == core.kind) same_kind.push_back(other.get());
    if (other->block == core.block) (other->kind == CoreKind::kCube ? cube : vectors).push_back(other.get());
  }
  if (mode == 0) {
    signal_group(same_kind, same_kind, mode, id, at);
  } else if (mode == 1) {
    if (core.kind != CoreKind::kVector) {
      machine.ReportViolation(Detector::kCore, "mode 1 is for AIVs", at);
      return;
    }
    signal_group(vectors, vectors, mode, id, at);
  } else {
    core.kind == CoreKind::kCube ? signal_group(cube, vectors, mode, id, at)
                                 : signal_group(vectors, cube, mode, id, at);
  }
}

void cross_core_wait_flag(uint32_t id, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  if (!is_cross_core_id(id, at)) return;
  core.waits_for = static_cast<int>(id);
  core.waits_at = at;
  while (core.counters[id].empty()) machine.Yield();
  core.waits_for = -1;
  const Completion completion = std::move(core.counters[id].front());
  core.counters[id].pop_front();
  machine.WaitFor(core, Pipe::kS, completion);
}

// Uses flags of its own, as the hardware's does.
void sync_all(bool vectors_only, const Location& at) {
  constexpr uint32_t kSameKindId = 11, kBlockId = 12;
  Machine& machine = Machine::current();
  const CoreKind kind = machine.core().kind;
  if (vectors_only && kind != CoreKind::kVector) {
    machine.ReportViolation(Detector::kCore, "SyncAll<true> is for kernels of AIVs alone", at);
    return;
  }
  pipe_barrier_all();
  const Pipe pipe = kind == CoreKind::kCube ? Pipe::kFix : Pipe::kMte3;
  cross_core_set_flag(0, pipe, kSameKindId, at);
  cross_core_wait_flag(kSameKindId, at);
  if (vectors_only) return;
  cross_core_set_flag(2, pipe, kBlockId, at);
  cross_core_wait_flag(kBlockId, at);
}

}  // namespace ascendc_emulator
