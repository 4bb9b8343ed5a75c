// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace w4a4 {
namespace {

// MPOL_LOCAL of linux/mempolicy.h, which old headers lack: a page is placed where the thread runs that touches it.
constexpr int kLocalPolicy = 4;

}  // namespace

void place_by_touch(void* begin, int64_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  syscall(SYS_mbind, first, last - first, kLocalPolicy, nullptr, 0UL, 0U);
}

void zero_tiles(void* packed, int64_t tiles, int64_t tile_bytes, const Pool& pool) {
  for_tiles(tiles, pool, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(packed) + begin * tile_bytes, 0, (end - begin) * tile_bytes);
  });
}

}  // namespace w4a4
