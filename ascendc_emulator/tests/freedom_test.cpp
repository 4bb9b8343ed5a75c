// SPDX-License-Identifier: Apache-2.0
// What the hardware leaves open: the order in which flags between cores take effect, when blocks start, how Div and
// Fixpipe round. Small kernels that rely on one of the possibilities, and the same ones without that fault.
#include <cmath>
#include <cstring>
#include <set>

#include "small_kernels.h"

namespace {

using ascendc_emulator::FixpipeRounding;
using ascendc_emulator::LaunchOnStreams;
using ascendc_emulator::LaunchQueue;
using ascendc_emulator::Options;
using ascendc_emulator::StreamLaunch;
using Ub = LocalTensor<uint8_t>;

constexpr uint64_t kOrders = 16;

Options in_order(uint64_t order) {
  Options options;
  options.order = order;
  return options;
}

// The product of the 16 x 16 matrices at bytes 0 and `right` of L1, in L0C.
void multiply_16(const CubeMemories& c, uint32_t right) {
  LoadData2DParams load;
  load.repeatTimes = 1;
  LoadData(at<half>(c.l0a, 0), at<half>(c.l1, 0), load);
  LoadData(at<half>(c.l0b, 0), at<half>(c.l1, right), load);
  set_and_wait<HardEvent::MTE1_M>();
  MmadParams product;
  product.m = 16, product.n = 16, product.k = 16;
  Mmad(at<float>(c.l0c, 0), at<half>(c.l0a, 0), at<half>(c.l0b, 0), product);
  set_and_wait<HardEvent::M_FIX>();
}

// Results of L0C in `z`, half by half.
void store_zeros(const CubeMemories& c, uint8_t* z) {
  InitConstValue(at<half>(c.l1, 0), InitConstValueParams<half>{1, 16, 0, half(0.0f)});
  set_and_wait<HardEvent::MTE2_MTE1>();
  multiply_16(c, 0);
  FixpipeParamsV220 out;
  out.nSize = 16, out.mSize = 16, out.srcStride = 16, out.dstStride = 16, out.quantPre = NoQuant;
  Fixpipe<float, float, CFG_ROW_MAJOR>(global<float>(z), at<float>(c.l0c, 0), out);
}

// An AIC tells its AIVs by flag 1 that z is stored, and by flag 2 that something else is; when they answer it sets flag
// 1 once more, from another pipe. AIVs that take flag 2 as a sign that flag 1 is there too get, in another order, the
// flag 1 that says nothing of z. With `own_flag` the second use has a flag of its own.
Report run_two_flags(uint64_t order, bool own_flag) {
  DeviceMemory memory;
  uint8_t* z = memory.allocate(1024, "z");
  return Launch(
      1,
      [&] {
        const uint16_t again = own_flag ? 4 : 1;
        if ASCEND_IS_AIC {
          // Inside, because the end of a TPipe waits for all pipes.
          with_cube_memories([&](const CubeMemories& c) {
            store_zeros(c, z);
            CrossCoreSetFlag<2, PIPE_FIX>(1);
            CrossCoreSetFlag<2, PIPE_MTE1>(2);
            CrossCoreWaitFlag(3);
            CrossCoreSetFlag<2, PIPE_MTE1>(again);
          });
        }
        if ASCEND_IS_AIV {
          TPipe pipe;
          TBuf<TPosition::VECCALC> buffer;
          pipe.InitBuffer(buffer, 1024);
          CrossCoreWaitFlag(2);
          CrossCoreSetFlag<2, PIPE_MTE3>(3);
          CrossCoreWaitFlag(1);
          load(buffer.Get<float>(), z, 256);
          CrossCoreWaitFlag(again);
        }
      },
      in_order(order));
}

void test_order_of_flags() {
  expect_clean(run_two_flags(0, false), "two flags in the order of the program");
  int found = 0;
  for (uint64_t order = 1; order <= kOrders; ++order) {
    found += run_two_flags(order, false).has(Detector::kHazard);
    expect_clean(run_two_flags(order, true), "a flag for each purpose, order " + std::to_string(order));
  }
  check(found > 0, "some order of two flags shows that the kernel relies on another");
  check(found < static_cast<int>(kOrders), "some order of two flags is the program's");
  for (uint64_t order = 1; order <= kOrders; ++order) {
    check(run_two_flags(order, false).text() == run_two_flags(order, false).text(), "an order can be repeated");
  }
}

// What must hold in every order: flags that are the same stay in order, and all checks work as in program order.
void test_every_order() {
  for (uint64_t order = 0; order <= kOrders; ++order) {
    const std::string what = ", order " + std::to_string(order);
    expect_clean(pingpong(40, 14, in_order(order)), "15 flags outstanding" + what);
    check(pingpong(40, 20, in_order(order)).has(Detector::kCrossCore), "21 flags outstanding" + what);
    expect_clean(Launch(
                     3,
                     [] {
                       SyncAll<false>();
                       SyncAll<false>();
                     },
                     in_order(order)),
                 "SyncAll of all cores" + what);
    expect_violations(Launch(
                          3,
                          [] {
                            if ASCEND_IS_AIV {
                              if (GetBlockIdx() != 4) SyncAll();
                            }
                          },
                          in_order(order)),
                      {Detector::kDeadlock}, "SyncAll without one core" + what);
    expect_violations(Launch(
                          1,
                          [] {
                            if ASCEND_IS_AIC
                              CrossCoreSetFlag<2, PIPE_FIX>(3);
                          },
                          in_order(order)),
                      {Detector::kCrossCore}, "a flag that no AIV waits for" + what);
  }
}

// A flag must not change its mode before everything in the first one is complete.
void test_modes() {
  const auto run = [](bool waits_first) {
    return Launch(1, [=] {
      if ASCEND_IS_AIC
        CrossCoreSetFlag<2, PIPE_FIX>(1);
      if ASCEND_IS_AIV {
        if (waits_first) CrossCoreWaitFlag(1);
        CrossCoreSetFlag<1, PIPE_MTE3>(1);
        CrossCoreWaitFlag(1);
        if (!waits_first) CrossCoreWaitFlag(1);
      }
    });
  };
  expect_clean(run(true), "a flag in one mode after the other");
  expect_violations(run(false), {Detector::kCrossCore}, "a flag in two modes at a time");
}

// --- scheduling ---

// Writes its number after all cores have come this far.
#define SYNCHRONIZING_KERNEL                               \
  (GM_ADDR out) {                                          \
    if ASCEND_IS_AIV {                                     \
      TPipe pipe;                                          \
      TBuf<TPosition::VECCALC> buffer;                     \
      pipe.InitBuffer(buffer, 32);                         \
      const LocalTensor<float> ub = buffer.Get<float>();   \
      CrossCoreSetFlag<0, PIPE_MTE3>(0);                   \
      CrossCoreWaitFlag(0);                                \
      Duplicate(ub, static_cast<float>(GetBlockIdx()), 8); \
      set_and_wait<HardEvent::V_MTE3>();                   \
      store(out + GetBlockIdx() * sizeof(float), ub, 1);   \
    }                                                      \
  }
extern "C" __global__ __aicore__ void normal_kernel SYNCHRONIZING_KERNEL;
extern "C" __schedmode__(0) __global__ __aicore__ void explicit_normal_kernel SYNCHRONIZING_KERNEL;
extern "C" __schedmode__(1) __global__ __aicore__ void batch_kernel SYNCHRONIZING_KERNEL;

using Kernel = void(GM_ADDR);

// The kernel with `blocks` blocks on each of `streams` streams of a device with `cores` cores.
Report run_streams(Kernel* kernel, uint32_t streams, uint32_t blocks, uint32_t cores, uint64_t order) {
  DeviceMemory memory;
  LaunchQueue queue;
  std::vector<LaunchQueue::Stream> all;
  std::vector<uint8_t*> outputs;
  for (uint32_t i = 0; i < streams; ++i) all.push_back({&queue, i});
  for (LaunchQueue::Stream& stream : all) {
    outputs.push_back(memory.allocate(blocks * 2 * sizeof(float)));
    LaunchQueue::At(&stream)->Launch(kernel, blocks)(outputs.back());
  }
  Options options = in_order(order);
  options.device_cores = cores;
  const Report report = queue.Synchronize(options);
  if (!report.clean()) return report;
  for (const uint8_t* output : outputs) {
    for (uint32_t i = 0; i < blocks * 2; ++i) {
      float found;
      std::memcpy(&found, output + i * sizeof(float), sizeof(float));
      if (found != static_cast<float>(i)) check(false, "results of several streams");
    }
  }
  return report;
}

void test_streams() {
  for (uint64_t order = 0; order <= kOrders; ++order) {
    const std::string what = ", order " + std::to_string(order);
    expect_clean(run_streams(normal_kernel, 1, 4, 4, order), "mode 0 alone on the device" + what);
    expect_clean(run_streams(normal_kernel, 2, 2, 4, order), "mode 0 with cores for all blocks" + what);
    expect_clean(run_streams(batch_kernel, 2, 4, 4, order), "mode 1 on two streams" + what);
    expect_clean(run_streams(batch_kernel, 3, 3, 4, order), "mode 1 on three streams" + what);
  }
  for (Kernel* kernel : {normal_kernel, explicit_normal_kernel}) {
    const Report stuck = run_streams(kernel, 2, 4, 4, 0);
    expect_violations(stuck, {Detector::kDeadlock}, "mode 0 on two streams");
    for (const char* part : {"launch 0: 2 of its 4 blocks never start", "too few (2 times)",
                             "AIV 0 of launch 0: waits for ever for flag 0"}) {
      check(stuck.text().find(part) != std::string::npos, std::string("the report says ") + part + ": " + stuck.text());
    }
  }
  expect_violations(run_streams(batch_kernel, 1, 5, 4, 0), {Detector::kDeadlock}, "more blocks than cores");
  expect_clean(run_streams(batch_kernel, 2, 4, 0, 0), "a device with cores for all blocks");
}

// Launches of one stream follow each other, and the second may read what the first wrote; on two streams it may not.
void test_order_of_launches() {
  const auto run = [](bool one_stream, uint64_t order) {
    DeviceMemory memory;
    uint8_t* out = memory.allocate(4 * sizeof(float));
    const auto copy = [out] {
      if ASCEND_IS_AIV {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 32);
        load(buffer.Get<float>(), out + GetBlockIdx() * sizeof(float), 1);
      }
    };
    const std::vector<StreamLaunch> launches = {{0, 2, [out] { normal_kernel(out); }}, {one_stream ? 0u : 1u, 2, copy}};
    return LaunchOnStreams(launches, in_order(order));
  };
  for (uint64_t order = 0; order <= kOrders; ++order) {
    expect_clean(run(true, order), "one stream, order " + std::to_string(order));
    const Report race = run(false, order);
    check(race.has(Detector::kHazard) || race.has(Detector::kUninitialised),
          "two streams, order " + std::to_string(order) + ": " + race.text());
  }
}

// --- rounding ---

template <typename T>
T divide(T a, T b, int ulps) {
  DeviceMemory memory;
  const std::vector<T> values(16, a), divisors(16, b);
  uint8_t* x = memory.copy(values.data(), 16 * sizeof(T));
  uint8_t* y = memory.copy(divisors.data(), 16 * sizeof(T));
  uint8_t* out = memory.allocate(16 * sizeof(T));
  Options options;
  options.division_ulps = ulps;
  expect_clean(run_on_vector(
                   [&](const Ub& ub) {
                     load(at<T>(ub, 0), x, 16);
                     load(at<T>(ub, 1024), y, 16);
                     set_and_wait<HardEvent::MTE2_V>();
                     Div(at<T>(ub, 2048), at<T>(ub, 0), at<T>(ub, 1024), 16);
                     set_and_wait<HardEvent::V_MTE3>();
                     store(out, at<T>(ub, 2048), 16);
                   },
                   options),
               "Div");
  T result;
  std::memcpy(&result, out, sizeof(T));
  return result;
}

void test_division() {
  const float third = 1.0f / 3.0f;
  check(divide(1.0f, 3.0f, 0) == third, "1 / 3");
  check(divide(1.0f, 3.0f, 1) == std::nextafter(third, 1.0f), "1 / 3, one step up");
  check(divide(1.0f, 3.0f, -1) == std::nextafter(third, 0.0f), "1 / 3, one step down");
  check(divide(-1.0f, 3.0f, 1) == std::nextafter(-third, -1.0f), "-1 / 3, one step away from zero");
  check(divide(4.0f, 2.0f, 1) == std::nextafter(2.0f, 3.0f), "4 / 2, one step up");
  check(divide(4.0f, 4.0f, -1) == std::nextafter(1.0f, 0.0f), "4 / 4, one step down");
  check(divide(0.0f, 3.0f, 1) == 0.0f, "0 / 3");
  check(std::isinf(divide(1.0f, 0.0f, -1)), "1 / 0");
  check(float(divide(half(1.0f), half(3.0f), 1)) == float(half(third)) + std::ldexp(1.0f, -12), "half 1 / 3, up");
}

uint16_t round_in_fixpipe(float value, QuantMode_t mode, FixpipeRounding rounding) {
  std::vector<half> a(256, half(0.0f)), b(256, half(0.0f));
  // value = high + low, both representable in half, times 1.
  const float high = std::ldexp(std::nearbyint(std::ldexp(value, 8)), -8);
  a[0] = half(high), a[1] = half(value - high), b[0] = half(1.0f), b[1] = half(1.0f);
  DeviceMemory memory;
  uint8_t* left = memory.copy(a.data(), 512);
  uint8_t* right = memory.copy(b.data(), 512);
  uint8_t* out = memory.allocate(512);
  Options options;
  options.fixpipe_rounding = rounding;
  const auto body = [&](const CubeMemories& c) {
    DataCopyParams copy;
    copy.blockLen = 16;
    DataCopy(at<half>(c.l1, 0), global<half>(left), copy);
    DataCopy(at<half>(c.l1, 512), global<half>(right), copy);
    set_and_wait<HardEvent::MTE2_MTE1>();
    multiply_16(c, 512);
    FixpipeParamsV220 store;
    store.nSize = 16, store.mSize = 16, store.srcStride = 16, store.dstStride = 16, store.quantPre = mode;
    if (mode == F322F16) {
      Fixpipe<half, float, CFG_ROW_MAJOR>(global<half>(out), at<float>(c.l0c, 0), store);
    } else {
      Fixpipe<bfloat16_t, float, CFG_ROW_MAJOR>(global<bfloat16_t>(out), at<float>(c.l0c, 0), store);
    }
  };
  expect_clean(run_on_cube(body, options), "Fixpipe");
  uint16_t bits;
  std::memcpy(&bits, out, 2);
  return bits;
}

void test_fixpipe() {
  using enum FixpipeRounding;
  const auto expect = [](float value, QuantMode_t mode, uint16_t even, uint16_t away, uint16_t zero, const char* what) {
    check(round_in_fixpipe(value, mode, kNearestEven) == even, std::string(what) + ", nearest even");
    check(round_in_fixpipe(value, mode, kNearestAway) == away, std::string(what) + ", nearest away");
    check(round_in_fixpipe(value, mode, kTowardsZero) == zero, std::string(what) + ", towards zero");
  };
  // 1 is 0x3c00 in half and 0x3f80 in bfloat16.
  expect(1 + std::ldexp(1.0f, -11), F322F16, 0x3c00, 0x3c01, 0x3c00, "half, a tie");
  expect(-1 - std::ldexp(1.0f, -11), F322F16, 0xbc00, 0xbc01, 0xbc00, "half, a negative tie");
  expect(1 + std::ldexp(3.0f, -12), F322F16, 0x3c01, 0x3c01, 0x3c00, "half, above a tie");
  expect(1 + std::ldexp(3.0f, -8), F322BF16, 0x3f82, 0x3f82, 0x3f81, "bfloat16, a tie to even above");
  expect(1 + std::ldexp(1.0f, -8), F322BF16, 0x3f80, 0x3f81, 0x3f80, "bfloat16, a tie");
}

}  // namespace

int main() {
  test_order_of_flags();
  test_every_order();
  test_modes();
  test_streams();
  test_order_of_launches();
  test_division();
  test_fixpipe();
  return finish("freedom_test");
}
