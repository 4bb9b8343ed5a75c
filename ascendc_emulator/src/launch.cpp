// SPDX-License-Identifier: Apache-2.0
#include "ascendc_emulator/launch.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>

#include "machine/machine.h"

// The linker's bounds of the section that __schedmode__(1) puts kernels into; null if there are none.
extern "C" {
__attribute__((weak)) extern const char __start_ascendc_schedmode_1[];
__attribute__((weak)) extern const char __stop_ascendc_schedmode_1[];
}

namespace ascendc_emulator {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint8_t kPoison = 0xA5;
uint64_t issued = 0;

// Of all DeviceMemory objects: a kernel may be given addresses of several.
Allocations& allocations() {
  static Allocations all;
  return all;
}

}  // namespace

DeviceMemory::~DeviceMemory() {
  for (const auto& [begin, bytes] : mapped_) {
    allocations().erase(begin);
    munmap(const_cast<uint8_t*>(begin), bytes);
  }
}

uint8_t* DeviceMemory::add(uint64_t bytes, bool is_input, bool has_values, const std::string& name) {
  const uint64_t mapped = (bytes + kPage - 1) / kPage * kPage + kPage;
  void* address = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  uint8_t* begin = static_cast<uint8_t*>(address);
  mapped_[begin] = mapped;
  Allocation allocation{begin, bytes, is_input, name, {}, {}, {}};
  if (!is_input && has_values) allocation.valid.assign(bytes, 0);
  allocations()[begin] = std::move(allocation);
  return begin;
}

uint8_t* DeviceMemory::allocate(uint64_t bytes, const std::string& name) {
  uint8_t* begin = add(bytes, false, true, name);
  std::memset(begin, kPoison, bytes);
  return begin;
}

uint8_t* DeviceMemory::copy(const void* values, uint64_t bytes, const std::string& name) {
  uint8_t* begin = add(bytes, true, true, name);
  std::memcpy(begin, values, bytes);
  return begin;
}

uint8_t* DeviceMemory::reserve(uint64_t bytes, const std::string& name) { return add(bytes, false, false, name); }

Report Launch(uint32_t block_dim, const std::function<void()>& kernel, const Options& options) {
  return LaunchOnStreams({{0, block_dim, kernel, true}}, options);
}

Report LaunchOnStreams(const std::vector<StreamLaunch>& launches, const Options& options) {
  const bool is_prediction = options.mode == Mode::kCostOnly;
  if (is_prediction) Machine(launches, options, L2Lines::Pass::kCount, allocations()).Run();
  Machine machine(launches, options, is_prediction ? L2Lines::Pass::kCharge : L2Lines::Pass::kOnly, allocations());
  Report report = machine.Run();
  issued += report.cost.instructions;
  return report;
}

bool is_batch_kernel(const void* kernel) {
  const char* address = static_cast<const char*>(kernel);
  return address >= __start_ascendc_schedmode_1 && address < __stop_ascendc_schedmode_1;
}

Report LaunchQueue::Synchronize(const Options& options) {
  const std::vector<StreamLaunch> launches = std::move(launches_);
  launches_.clear();
  return LaunchOnStreams(launches, options);
}

uint64_t instructions_issued() { return issued; }

}  // namespace ascendc_emulator
