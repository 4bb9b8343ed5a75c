// SPDX-License-Identifier: Apache-2.0
// Flags between cores.
#include <algorithm>

#include "ascendc_emulator/machine/running_core.h"
#include "machine.h"
#include "scheduler.h"

namespace ascendc_emulator {
namespace {

std::string flag_text(uint32_t id) { return "flag " + std::to_string(id); }

bool is_cross_core_id(uint32_t id, const Location& at) {
  if (id < kCrossCoreIds) return true;
  Machine::current().ReportViolation(Detector::kCrossCore, flag_text(id) + " is not in [0, 15]", at);
  return false;
}

// Before a core uses a flag in another mode, everything that it set and waits for in the first one must be complete.
void check_mode(const Core& core, uint32_t mode, uint32_t id, const Location& at) {
  bool is_used = false;
  for (const FlagCount& count : core.counters[id]) is_used = is_used || count.mode != mode;
  for (uint32_t other = 0; other < kCrossCoreModes; ++other) {
    is_used = is_used || (other != mode && !core.pending[other][id].empty());
  }
  if (!is_used) return;
  Machine::current().ReportViolation(
      Detector::kCrossCore,
      flag_text(id) + " of " + core.text() + " is used in another mode than before, which is not complete yet", at);
}

// Once all of `from` have set the flag, it counts up on all of `to`.
void signal_group(const std::vector<Core*>& from, const std::vector<Core*>& to, const FlagInFlight& flag) {
  Machine& machine = Machine::current();
  for (const Core* core : from) {
    if (core->pending[flag.mode][flag.id].empty()) return;
  }
  Completion all;
  all.clock.assign(machine.is_full() ? machine.cores().size() * kPipes : 0, 0);
  for (Core* core : from) {
    const Completion& completion = core->pending[flag.mode][flag.id].front();
    machine.Join(all.clock, completion.clock);
    all.time = std::max(all.time, completion.time);
    core->pending[flag.mode][flag.id].pop_front();
  }
  for (Core* core : to) {
    check_mode(*core, flag.mode, flag.id, flag.at);
    core->counters[flag.id].push_back({flag.mode, all});
    if (core->counters[flag.id].size() <= kMaxOutstanding) continue;
    machine.ReportViolation(
        Detector::kCrossCore,
        flag_text(flag.id) + " of " + core->text() + " counts more than " + std::to_string(kMaxOutstanding), flag.at);
  }
}

}  // namespace

void complete_flag(Core& core, const FlagInFlight& flag) {
  Machine& machine = Machine::current();
  check_mode(core, flag.mode, flag.id, flag.at);
  std::deque<Completion>& pending = core.pending[flag.mode][flag.id];
  pending.push_back(flag.completion);
  if (pending.size() > kMaxOutstanding) {
    machine.ReportViolation(Detector::kCrossCore,
                            flag_text(flag.id) + " was set " + std::to_string(pending.size()) +
                                " times before the other cores of its group set it",
                            flag.at);
  }
  std::vector<Core*> same_kind, vectors, cube;
  for (const auto& other : machine.cores()) {
    if (other->launch != core.launch) continue;
    if (other->kind == core.kind) same_kind.push_back(other.get());
    if (other->block == core.block) (other->kind == CoreKind::kCube ? cube : vectors).push_back(other.get());
  }
  if (flag.mode == 0) {
    signal_group(same_kind, same_kind, flag);
  } else if (flag.mode == 1) {
    signal_group(vectors, vectors, flag);
  } else {
    core.kind == CoreKind::kCube ? signal_group(cube, vectors, flag) : signal_group(vectors, cube, flag);
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
  if (mode == 1 && core.kind != CoreKind::kVector) {
    machine.ReportViolation(Detector::kCore, "mode 1 is for AIVs", at);
    return;
  }
  FlagInFlight flag{mode, id, pipe, machine.CompletionOf(core, pipe), at};
  flag.completion.time += machine.options().rates.cross_core_us;
  if (machine.options().order == 0) {
    complete_flag(core, flag);
    return;
  }
  const auto is_same = [&](const FlagInFlight& other) { return other.mode == mode && other.id == id; };
  const auto same = std::count_if(core.in_flight.begin(), core.in_flight.end(), is_same);
  if (same >= kMaxOutstanding) {
    machine.ReportViolation(Detector::kCrossCore,
                            flag_text(id) + " was set " + std::to_string(same + 1) + " times without a wait", at);
  }
  core.in_flight.push_back(std::move(flag));
}

void cross_core_wait_flag(uint32_t id, const Location& at) {
  Machine& machine = Machine::current();
  Core& core = machine.core();
  if (!is_cross_core_id(id, at)) return;
  core.waits_for = static_cast<int>(id);
  core.waits_at = at;
  while (core.counters[id].empty()) machine.Yield();
  core.waits_for = -1;
  const Completion completion = std::move(core.counters[id].front().completion);
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
