// SPDX-License-Identifier: Apache-2.0
// Each rule of the hardware, broken once: the detector that must tell, and no other.
#include "machine/machine.h"
#include "small_kernels.h"

namespace {

using Ub = LocalTensor<uint8_t>;

// Defines `bytes` of UB from `from` on.
void define(const Ub& ub, uint32_t from, uint32_t bytes) {
  Duplicate(at<float>(ub, from), 1.0f, static_cast<int32_t>(bytes / 4));
  PipeBarrier<PIPE_V>();
}

void test_memory() {
  DeviceMemory memory;
  const std::vector<float> values(64, 1.0f);
  uint8_t* in = memory.copy(values.data(), 256, "in");
  uint8_t* out = memory.allocate(256, "out");

  expect_violations(Launch(1,
                           [] {
                             TPipe pipe;
                             TBuf<TPosition::VECCALC> a, b;
                             if ASCEND_IS_AIV {
                               pipe.InitBuffer(a, 196608);
                               pipe.InitBuffer(b, 32);
                             }
                           }),
                    {Detector::kCapacity}, "32 bytes beyond UB");
  expect_violations(run_on_vector([](const Ub& ub) { Duplicate(at<float>(ub, 196608 - 32), 1.0f, 16); }),
                    {Detector::kBounds}, "a write beyond UB");
  expect_violations(Launch(1,
                           [] {
                             if ASCEND_IS_AIV {
                               TPipe pipe;
                               TBuf<TPosition::VECCALC> a, b;
                               pipe.InitBuffer(a, 64);
                               pipe.InitBuffer(b, 64);
                               Duplicate(a.Get<float>(), 1.0f, 24);
                             }
                           }),
                    {Detector::kBounds}, "a write into the next buffer");
  expect_violations(run_on_vector([&](const Ub& ub) { load(at<float>(ub, 0), in + 16, 64); }), {Detector::kBounds},
                    "a read beyond an allocation");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      define(ub, 0, 256);
                      set_and_wait<HardEvent::V_MTE3>();
                      store(out + 4, at<float>(ub, 0), 64);
                    }),
                    {Detector::kBounds}, "a write beyond an allocation");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      define(ub, 0, 256);
                      set_and_wait<HardEvent::V_MTE3>();
                      store(in, at<float>(ub, 0), 8);
                    }),
                    {Detector::kBounds}, "a write to an input");
  expect_violations(run_on_vector([&](const Ub& ub) { load(at<float>(ub, 0), static_cast<uint8_t*>(nullptr), 8); }),
                    {Detector::kBounds}, "a null address");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      define(ub, 0, 64);
                      set_and_wait<HardEvent::V_MTE3>();
                      store(out, at<float>(ub, 0), 17);
                    }),
                    {Detector::kUninitialised}, "a float that nothing wrote");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      load(at<float>(ub, 0), in, 5);
                      set_and_wait<HardEvent::MTE2_V>();
                      Abs(at<float>(ub, 512), at<float>(ub, 0), 8);
                    }),
                    {Detector::kUninitialised}, "the rest of a block that a copy did not fill");
  expect_violations(run_on_vector([&](const Ub& ub) { load(at<float>(ub, 0), out + 128, 8); }),
                    {Detector::kUninitialised}, "global memory that nothing wrote");
}

void test_alignment() {
  expect_violations(run_on_vector([](const Ub& ub) { Duplicate(at<float>(ub, 16), 1.0f, 8); }), {Detector::kAlignment},
                    "UB by 32");
  expect_violations(run_on_cube([](const CubeMemories& c) {
                      InitConstValue(at<half>(c.l1, 0), InitConstValueParams<half>{1, 64, 0, half(0.0f)});
                      set_and_wait<HardEvent::MTE2_MTE1>();
                      LoadData2DParams p;
                      p.repeatTimes = 1;
                      LoadData(at<half>(c.l0a, 256), at<half>(c.l1, 0), p);
                    }),
                    {Detector::kAlignment}, "L0A by 512");
}

// Zeros in L0A and L0B; then `multiply`.
template <typename T, typename Body>
Report with_operands(const Body& multiply) {
  return run_on_cube([&](const CubeMemories& c) {
    InitConstValue(at<half>(c.l1, 0), InitConstValueParams<half>{1, 1024, 0, half(0.0f)});
    set_and_wait<HardEvent::MTE2_MTE1>();
    LoadData2DParams p;
    p.repeatTimes = 16, p.srcStride = 1;
    LoadData(at<T>(c.l0a, 0), at<T>(c.l1, 0), p);
    LoadData(at<T>(c.l0b, 0), at<T>(c.l1, 0), p);
    set_and_wait<HardEvent::MTE1_M>();
    multiply(c);
  });
}

void test_cube_parameters() {
  const auto product = [](uint32_t m, uint32_t n, uint32_t k, uint32_t c_at = 0) {
    return with_operands<int4b_t>([=](const CubeMemories& c) {
      MmadParams p;
      p.m = m, p.n = n, p.k = k;
      Mmad(at<int32_t>(c.l0c, c_at), at<int4b_t>(c.l0a, 0), at<int4b_t>(c.l0b, 0), p);
    });
  };
  expect_clean(product(16, 16, 64), "a product");
  expect_violations(product(1, 16, 64), {Detector::kParameter}, "m == 1");
  expect_violations(product(16, 16, 63), {Detector::kParameter}, "odd k");
  expect_violations(product(16, 16, 64, 64), {Detector::kAlignment}, "L0C by 1024");
  expect_violations(with_operands<half>([](const CubeMemories& c) {
                      MmadParams p;
                      p.m = 16, p.n = 16, p.k = 4096;
                      Mmad(at<float>(c.l0c, 0), at<half>(c.l0a, 0), at<half>(c.l0b, 0), p);
                    }),
                    {Detector::kParameter, Detector::kBounds}, "k beyond 4095");
  expect_violations(with_operands<half>([](const CubeMemories& c) {
                      MmadParams p;
                      p.m = 16, p.n = 16, p.k = 16, p.cmatrixInitVal = false;
                      Mmad(at<float>(c.l0c, 0), at<half>(c.l0a, 0), at<half>(c.l0b, 0), p);
                    }),
                    {Detector::kUninitialised}, "sums onto nothing");
  DeviceMemory memory;
  uint8_t* out = memory.allocate(4096);
  expect_violations(with_operands<int4b_t>([&](const CubeMemories& c) {
                      MmadParams p;
                      p.m = 16, p.n = 16, p.k = 64;
                      Mmad(at<int32_t>(c.l0c, 0), at<int4b_t>(c.l0a, 0), at<int4b_t>(c.l0b, 0), p);
                      set_and_wait<HardEvent::M_FIX>();
                      FixpipeParamsV220 f;
                      f.nSize = 16, f.mSize = 16, f.srcStride = 16, f.dstStride = 16;
                      f.quantPre = F322F16;
                      Fixpipe<half, int32_t, CFG_ROW_MAJOR>(global<half>(out), at<int32_t>(c.l0c, 0), f);
                    }),
                    {Detector::kParameter}, "a conversion from float of int32");
  expect_violations(run_on_cube([](const CubeMemories& c) {
                      LoadData2DParams p;
                      p.repeatTimes = 1, p.ifTranspose = true;
                      LoadData(at<int4b_t>(c.l0a, 0), at<int4b_t>(c.l1, 0), p);
                    }),
                    {Detector::kParameter}, "ifTranspose of int4");
}

void test_vector_parameters() {
  const auto multiply = [](uint64_t mask, uint8_t repeats, const BinaryRepeatParams& p, uint32_t to) {
    return run_on_vector([=](const Ub& ub) {
      define(ub, 0, 65536);
      Mul(at<float>(ub, to), at<float>(ub, 0), at<float>(ub, 32768), mask, repeats, p);
    });
  };
  expect_clean(multiply(64, 4, {1, 1, 1, 8, 8, 8}, 131072), "Mul");
  expect_clean(multiply(64, 4, {1, 1, 1, 8, 8, 8}, 0), "Mul in place");
  expect_clean(multiply(64, 0, {1, 1, 1, 8, 8, 8}, 0), "no repeats");
  expect_violations(multiply(65, 4, {1, 1, 1, 8, 8, 8}, 131072), {Detector::kParameter}, "a mask beyond 64 floats");
  expect_violations(multiply(0, 4, {1, 1, 1, 8, 8, 8}, 131072), {Detector::kParameter}, "an empty mask");
  expect_violations(multiply(64, 4, {1, 1, 1, 8, 8, 8}, 32), {Detector::kParameter}, "overlap in part");
  expect_violations(multiply(64, 4, {1, 1, 1, 8, 8, 8}, 256), {Detector::kParameter}, "a repeat that feeds the next");
  expect_violations(run_on_vector([](const Ub& ub) {
                      define(ub, 0, 65536);
                      WholeReduceMax(at<float>(ub, 131072), at<float>(ub, 0), 64, 256, 1, 1, 8,
                                     ReduceOrder::ORDER_ONLY_VALUE);
                    }),
                    {Detector::kParameter}, "256 repeats");
  expect_violations(run_on_vector([](const Ub& ub) {
                      define(ub, 0, 256);
                      Cast(at<bfloat16_t>(ub, 1024), at<float>(ub, 0), RoundMode::CAST_ODD, 64);
                    }),
                    {Detector::kParameter}, "CAST_ODD to bfloat16");
  expect_violations(run_on_vector([](const Ub& ub) {
                      define(ub, 0, 256);
                      Cast(at<int4b_t>(ub, 1024), at<half>(ub, 0), RoundMode::CAST_RINT, 63);
                    }),
                    {Detector::kParameter}, "an odd count of int4");
  DeviceMemory memory;
  const std::vector<uint8_t> zeros(4096);
  uint8_t* in = memory.copy(zeros.data(), zeros.size());
  expect_violations(run_on_vector([&](const Ub& ub) {
                      DataCopyExtParams copy;
                      copy.blockCount = 4096, copy.blockLen = 1;
                      DataCopyPad(ub, global<uint8_t>(in), copy, DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
                    }),
                    {Detector::kParameter}, "4096 blocks");
  expect_violations(run_on_vector([&](const Ub&) {
                      DataCopyParams copy;
                      const uint32_t gap = 70000;
                      copy.srcStride = gap;
                    }),
                    {Detector::kParameter}, "a gap that its field truncates");
}

void test_flags() {
  expect_violations(run_on_vector([](const Ub&) { SetFlag<HardEvent::MTE2_V>(0); }), {Detector::kFlag},
                    "a set without a wait");
  expect_violations(run_on_vector([](const Ub&) { WaitFlag<HardEvent::MTE2_V>(0); }), {Detector::kFlag},
                    "a wait without a set");
  expect_violations(run_on_vector([](const Ub&) {
                      SetFlag<HardEvent::MTE2_V>(0);
                      SetFlag<HardEvent::MTE2_V>(0);
                      WaitFlag<HardEvent::MTE2_V>(0);
                    }),
                    {Detector::kFlag}, "two sets, one wait");
  expect_violations(run_on_vector([](const Ub&) { set_and_wait<HardEvent::MTE2_V>(8); }), {Detector::kFlag}, "event 8");
  expect_clean(run_on_vector([](const Ub&) {
                 SetFlag<HardEvent::MTE2_V>(7);
                 SetFlag<HardEvent::V_MTE2>(7);
                 WaitFlag<HardEvent::MTE2_V>(7);
                 WaitFlag<HardEvent::V_MTE2>(7);
               }),
               "the same number for two pairs of pipes");
  expect_violations(run_on_cube([](const CubeMemories&) { SetFlag<HardEvent::M_MTE1>(1); }), {Detector::kFlag},
                    "a flag that TPipe owns");
  expect_violations(run_on_cube([](const CubeMemories&) { set_and_wait<HardEvent::MTE2_V>(); }),
                    {Detector::kCore, Detector::kFlag}, "the vector pipe on an AIC");
  expect_violations(Launch(1,
                           [] {
                             if ASCEND_IS_AIC {
                               TPipe pipe;
                               TBuf<TPosition::VECCALC> ub;
                               pipe.InitBuffer(ub, 32);
                             }
                           }),
                    {Detector::kCore}, "UB on an AIC");
}

void test_cross_core() {
  expect_clean(pingpong(40, 14), "15 flags outstanding");
  expect_violations(pingpong(40, 15), {Detector::kCrossCore}, "16 flags outstanding");
  expect_violations(Launch(1,
                           [] {
                             if ASCEND_IS_AIC
                               CrossCoreSetFlag<2, PIPE_FIX>(3);
                           }),
                    {Detector::kCrossCore}, "a flag that no AIV waits for");
  expect_violations(Launch(1,
                           [] {
                             if ASCEND_IS_AIC
                               CrossCoreWaitFlag(3);
                             if ASCEND_IS_AIV {
                               if (GetSubBlockIdx() == 0) CrossCoreSetFlag<2, PIPE_MTE3>(3);
                             }
                           }),
                    {Detector::kDeadlock}, "a flag that one of two AIVs sets");
  expect_violations(Launch(1, [] { CrossCoreSetFlag<0, PIPE_MTE2>(16); }), {Detector::kCrossCore}, "flag 16");
  expect_clean(Launch(3,
                      [] {
                        SyncAll<false>();
                        SyncAll<false>();
                      }),
               "SyncAll of all cores");
  expect_violations(Launch(3,
                           [] {
                             if ASCEND_IS_AIV {
                               if (GetBlockIdx() != 4) SyncAll();
                             }
                           }),
                    {Detector::kDeadlock}, "SyncAll without one core");
  bool is_numbered = true;
  expect_clean(
      Launch(3,
             [&] {
               const auto& core = ascendc_emulator::Machine::current().core();
               const int64_t expected =
                   core.kind == ascendc_emulator::CoreKind::kCube ? core.block : core.block * 2 + core.sub_block;
               is_numbered = is_numbered && GetBlockIdx() == expected && GetBlockNum() == 3 && GetSubBlockNum() == 2;
             }),
      "numbers of cores");
  check(is_numbered, "GetBlockIdx, GetBlockNum, GetSubBlockNum");
}

// A report names the kernel's lines, the core, the pipe, the buffer and its bytes.
void test_report() {
  const Report report = run_on_vector([](const Ub& ub) { Abs(at<float>(ub, 64), at<float>(ub, 0), 8); });
  const std::string text = report.text();
  for (const char* part : {"uninitialised: ", "rules_test.cpp:", "AIV 0", "Abs (V)", "UB [0, 1)"}) {
    check(text.find(part) != std::string::npos, std::string("the report names ") + part + ": " + text);
  }
}

}  // namespace

int main() {
  test_memory();
  test_alignment();
  test_cube_parameters();
  test_vector_parameters();
  test_flags();
  test_cross_core();
  test_report();
  return finish("rules_test");
}
