// SPDX-License-Identifier: Apache-2.0
#include "hazards.h"

#include <algorithm>

namespace ascendc_emulator {
namespace {

constexpr uint32_t kPageGranules = 1024;

// Which of a granule's readers a pipe is: pipes that read the same memory have slots of their own.
uint32_t reader_slot(Pipe pipe) {
  switch (pipe) {
    case Pipe::kS:
      return 2;
    case Pipe::kMte3:
    case Pipe::kFix:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

void LocalShadow::CheckWriter(const Granule& granule, const Accessor& accessor, const char* what, uint64_t begin,
                              const OnConflict& on_conflict) const {
  if (granule.write <= accessor.clock[accessor.core * kPipes + granule.writer]) return;
  const bool is_same_pipe = granule.writer == static_cast<uint8_t>(accessor.pipe);
  if (is_same_pipe && (granule.write == accessor.index || accessor.allows_overlap)) return;
  on_conflict({what, accessor.core, static_cast<Pipe>(granule.writer), granule.write, begin, kGranuleBytes});
}

void LocalShadow::Read(const Accessor& accessor, uint64_t offset, uint64_t bytes, const OnConflict& on_conflict) {
  const uint32_t slot = reader_slot(accessor.pipe);
  for (uint64_t g = offset / kGranuleBytes; g <= (offset + bytes - 1) / kGranuleBytes; ++g) {
    Granule& granule = granules_[g];
    CheckWriter(granule, accessor, "reads", g * kGranuleBytes, on_conflict);
    granule.read[slot] = accessor.index;
    granule.reader[slot] = static_cast<uint8_t>(accessor.pipe);
  }
}

void LocalShadow::Write(const Accessor& accessor, uint64_t offset, uint64_t bytes, const OnConflict& on_conflict) {
  for (uint64_t g = offset / kGranuleBytes; g <= (offset + bytes - 1) / kGranuleBytes; ++g) {
    Granule& granule = granules_[g];
    const uint64_t begin = g * kGranuleBytes;
    CheckWriter(granule, accessor, "writes", begin, on_conflict);
    for (uint32_t slot = 0; slot < 3; ++slot) {
      const uint8_t reader = granule.reader[slot];
      if (granule.read[slot] <= accessor.clock[accessor.core * kPipes + reader]) continue;
      const bool is_same_pipe = reader == static_cast<uint8_t>(accessor.pipe);
      if (is_same_pipe && (granule.read[slot] == accessor.index || accessor.allows_overlap)) continue;
      on_conflict({"overwrites what is read", accessor.core, static_cast<Pipe>(reader), granule.read[slot], begin,
                   kGranuleBytes});
    }
    granule.write = accessor.index;
    granule.writer = static_cast<uint8_t>(accessor.pipe);
  }
}

GlobalShadow::Granule& GlobalShadow::GranuleAt(uint64_t number, uint64_t size) {
  if (pages_.empty()) pages_.resize(size / kGranuleBytes / kPageGranules + 1);
  auto& page = pages_[number / kPageGranules];
  if (!page) page = std::make_unique<std::vector<Granule>>(kPageGranules);
  return (*page)[number % kPageGranules];
}

void GlobalShadow::Access(const Accessor& accessor, uint64_t size, uint64_t offset, uint64_t bytes, bool is_write,
                          const OnConflict& on_conflict) {
  const uint32_t own = accessor.clock_slot();
  const auto is_ordered = [&](const PastAccess& past) {
    return past.index <= accessor.clock[past.slot] || (past.slot == own && past.index == accessor.index);
  };
  for (uint64_t g = offset / kGranuleBytes; g <= (offset + bytes - 1) / kGranuleBytes; ++g) {
    Granule& granule = GranuleAt(g, size);
    const uint64_t first = g * kGranuleBytes;
    const uint64_t begin = std::max(offset, first) - first;
    const uint64_t end = std::min(offset + bytes, first + kGranuleBytes) - first;
    const uint32_t touched = static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1));
    const auto check = [&](const std::vector<PastAccess>& accesses, const char* what) {
      for (const PastAccess& past : accesses) {
        if (!(past.bytes & touched) || is_ordered(past)) continue;
        on_conflict(
            {what, past.slot / kPipes, static_cast<Pipe>(past.slot % kPipes), past.index, first + begin, end - begin});
      }
    };
    check(granule.writers, is_write ? "writes" : "reads");
    if (is_write) check(granule.readers, "overwrites what is read");
    // An access that is ordered before this one cannot conflict, on this one's bytes, with any that comes after it.
    const auto forget = [&](std::vector<PastAccess>& accesses) {
      std::erase_if(accesses, [&](const PastAccess& past) { return (past.bytes & ~touched) == 0 && is_ordered(past); });
    };
    if (is_write) forget(granule.writers);
    forget(granule.readers);
    (is_write ? granule.writers : granule.readers).push_back({own, accessor.index, touched});
  }
}

}  // namespace ascendc_emulator
