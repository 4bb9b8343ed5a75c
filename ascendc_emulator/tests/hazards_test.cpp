// SPDX-License-Identifier: Apache-2.0
// Accesses that nothing orders. Five faults are seeded into a small kernel to show which of them leave the values right
// and which detector finds them.
#include <cstring>

#include "small_kernels.h"

namespace {

using Ub = LocalTensor<uint8_t>;

// What a kernel leaves out.
enum class Fault { kNone, kMte2ToMte1, kVectorBarrier, kFixToMte1, kScale, kCrossCoreSet };

struct Outcome {
  Report report;
  bool is_exact;
};

// z = (a b) c with the product in half by way of L1, then 0.5 z + 1 on an AIV; all values small integers.
Outcome run_seeded(Fault fault) {
  std::vector<half> values(256);
  for (int i = 0; i < 256; ++i) values[i] = half(static_cast<float>((i * 7) % 5) - 2);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 512, "in");
  uint8_t* z = memory.allocate(1024, "z");
  uint8_t* y = memory.allocate(1024, "y");
  const Report report = Launch(1, [&] {
    if ASCEND_IS_AIC {
      TPipe pipe;
      TBuf<TPosition::A1> l1_buffer;
      TBuf<TPosition::A2> l0a_buffer;
      TBuf<TPosition::B2> l0b_buffer;
      TBuf<TPosition::CO1> l0c_buffer;
      pipe.InitBuffer(l1_buffer, 4096);
      pipe.InitBuffer(l0a_buffer, 1024);
      pipe.InitBuffer(l0b_buffer, 512);
      pipe.InitBuffer(l0c_buffer, 2048);
      const LocalTensor<half> l1 = l1_buffer.Get<half>();
      const LocalTensor<half> l0a = l0a_buffer.Get<half>(), l0b = l0b_buffer.Get<half>();
      const LocalTensor<float> l0c = l0c_buffer.Get<float>();
      DataCopyParams copy;
      copy.blockLen = 16;
      DataCopy(l1, global<half>(in), copy);
      SetFlag<HardEvent::MTE2_MTE1>(0);
      if (fault != Fault::kMte2ToMte1) WaitFlag<HardEvent::MTE2_MTE1>(0);
      LoadData2DParams load;
      load.repeatTimes = 1;
      LoadData(l0a, l1, load);
      LoadData(l0b, l1, load);
      set_and_wait<HardEvent::MTE1_M>(0);
      MmadParams product;
      product.m = 16, product.n = 16, product.k = 16;
      Mmad(l0c, l0a, l0b, product);
      set_and_wait<HardEvent::M_FIX>(0);
      FixpipeParamsV220 out;
      out.nSize = 16, out.mSize = 16, out.srcStride = 16, out.dstStride = 16, out.quantPre = F322F16;
      Fixpipe<half, float, CFG_NZ>(l1[512], l0c, out);
      SetFlag<HardEvent::FIX_MTE1>(0);
      if (fault != Fault::kFixToMte1) WaitFlag<HardEvent::FIX_MTE1>(0);
      LoadData(l0a[256], l1[512], load);
      set_and_wait<HardEvent::MTE1_M>(1);
      Mmad(l0c[256], l0a[256], l0b, product);
      set_and_wait<HardEvent::M_FIX>(1);
      out.quantPre = NoQuant;
      Fixpipe<float, float, CFG_ROW_MAJOR>(global<float>(z), l0c[256], out);
      if (fault != Fault::kCrossCoreSet) CrossCoreSetFlag<2, PIPE_FIX>(0);
    }
    if ASCEND_IS_AIV {
      TPipe pipe;
      TBuf<TPosition::VECCALC> buffer;
      pipe.InitBuffer(buffer, 1024);
      const LocalTensor<float> ub = buffer.Get<float>();
      CrossCoreWaitFlag(0);
      if (GetSubBlockIdx() != 0) return;
      load(ub, z, 256);
      set_and_wait<HardEvent::MTE2_V>(0);
      Muls(ub, ub, fault == Fault::kScale ? 0.25f : 0.5f, 256);
      if (fault != Fault::kVectorBarrier) PipeBarrier<PIPE_V>();
      Adds(ub, ub, 1.0f, 256);
      set_and_wait<HardEvent::V_MTE3>(0);
      store(y, ub, 256);
    }
  });
  // B is column-major in its fractal: [n][k].
  const auto multiply = [&](const std::vector<float>& a) {
    std::vector<float> c(256);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        for (int k = 0; k < 16; ++k) c[i * 16 + j] += a[i * 16 + k] * static_cast<float>(values[j * 16 + k]);
      }
    }
    return c;
  };
  const std::vector<float> expected = multiply(multiply(std::vector<float>(values.begin(), values.end())));
  bool is_exact = true;
  for (int i = 0; i < 256; ++i) {
    float found;
    std::memcpy(&found, y + i * 4, 4);
    is_exact = is_exact && found == 0.5f * expected[i] + 1.0f;
  }
  return {report, is_exact};
}

void test_seeded_faults() {
  const Outcome right = run_seeded(Fault::kNone);
  expect_clean(right.report, "the kernel without a fault");
  check(right.is_exact, "the kernel without a fault's values");
  const auto hidden = [](Fault fault, const char* what, const char* lines) {
    const Outcome outcome = run_seeded(fault);
    check(outcome.is_exact, std::string(what) + ": values are still exact");
    check(outcome.report.has(Detector::kHazard), std::string(what) + ": a hazard is found");
    check(outcome.report.text().find(lines) != std::string::npos, std::string(what) + ": " + outcome.report.text());
  };
  hidden(Fault::kMte2ToMte1, "MTE2->MTE1 wait removed", "LoadData (MTE1): reads after DataCopy (MTE2)");
  hidden(Fault::kVectorBarrier, "PipeBarrier<PIPE_V> removed", "Adds (V): reads after Muls (V)");
  hidden(Fault::kFixToMte1, "FIX->MTE1 wait removed", "LoadData (MTE1): reads after Fixpipe (FIX)");
  const Outcome scale = run_seeded(Fault::kScale);
  check(scale.report.clean() && !scale.is_exact, "a wrong scale is found by values alone");
  const Outcome stuck = run_seeded(Fault::kCrossCoreSet);
  check(stuck.report.has(Detector::kDeadlock) && !stuck.is_exact, "a dropped CrossCoreSetFlag is a deadlock");
}

void test_kinds() {
  DeviceMemory memory;
  const std::vector<float> zeros(1024);
  uint8_t* in = memory.copy(zeros.data(), 4096);
  uint8_t* out = memory.allocate(4096);
  expect_violations(run_on_vector([&](const Ub& ub) {
                      load(at<float>(ub, 0), in, 64);
                      set_and_wait<HardEvent::MTE2_V>();
                      Abs(at<float>(ub, 512), at<float>(ub, 0), 64);
                      load(at<float>(ub, 0), in, 64);
                    }),
                    {Detector::kHazard}, "write after read: a load over what V reads");
  expect_clean(run_on_vector([&](const Ub& ub) {
                 load(at<float>(ub, 0), in, 64);
                 set_and_wait<HardEvent::MTE2_V>();
                 Abs(at<float>(ub, 512), at<float>(ub, 0), 64);
                 set_and_wait<HardEvent::V_MTE2>();
                 load(at<float>(ub, 0), in, 64);
               }),
               "the same with a flag");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      load(at<float>(ub, 0), in, 64);
                      Duplicate(at<float>(ub, 224), 1.0f, 8);
                    }),
                    {Detector::kHazard}, "write after write: V over what MTE2 writes");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      Duplicate(at<float>(ub, 0), 1.0f, 8);
                      Duplicate(at<float>(ub, 0), 2.0f, 8);
                    }),
                    {Detector::kHazard}, "write after write of one pipe");
  // Order reaches over pipes: MTE2 -> V -> MTE3 tells MTE3 of MTE2.
  expect_clean(run_on_vector([&](const Ub& ub) {
                 load(at<float>(ub, 0), in, 64);
                 set_and_wait<HardEvent::MTE2_V>();
                 Duplicate(at<float>(ub, 512), 1.0f, 8);
                 set_and_wait<HardEvent::V_MTE3>();
                 store(out, at<float>(ub, 0), 64);
               }),
               "order by way of another pipe");
  // A flag tells of what came before it only.
  expect_violations(run_on_vector([&](const Ub& ub) {
                      SetFlag<HardEvent::MTE2_V>(0);
                      load(at<float>(ub, 0), in, 64);
                      WaitFlag<HardEvent::MTE2_V>(0);
                      Abs(at<float>(ub, 512), at<float>(ub, 0), 64);
                    }),
                    {Detector::kHazard}, "a flag set too early");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      Duplicate(at<float>(ub, 0), 1.0f, 8);
                      (void)at<float>(ub, 0).GetValue(0);
                    }),
                    {Detector::kHazard}, "the scalar unit reads what V writes");
  expect_clean(run_on_vector([&](const Ub& ub) {
                 Duplicate(at<float>(ub, 0), 1.0f, 8);
                 set_and_wait<HardEvent::V_S>();
                 (void)at<float>(ub, 0).GetValue(0);
               }),
               "the same with V_S");
  expect_violations(run_on_vector([&](const Ub& ub) {
                      Duplicate(at<float>(ub, 0), 1.0f, 64);
                      set_and_wait<HardEvent::V_MTE3>();
                      store(out, at<float>(ub, 0), 64);
                      load(at<float>(ub, 512), out, 64);
                    }),
                    {Detector::kHazard}, "a load of what MTE3 stores to global memory");
}

// Sums of few fractals need a barrier, those of many are in order.
void test_sums() {
  const auto twice = [](uint32_t fractals, bool has_barrier) {
    return run_on_cube([=](const CubeMemories& c) {
      InitConstValue(at<half>(c.l1, 0), InitConstValueParams<half>{1, 1024, 0, half(0.0f)});
      set_and_wait<HardEvent::MTE2_MTE1>();
      LoadData2DParams load;
      load.repeatTimes = fractals, load.srcStride = 1;
      LoadData(at<half>(c.l0a, 0), at<half>(c.l1, 0), load);
      LoadData(at<half>(c.l0b, 0), at<half>(c.l1, 0), load);
      set_and_wait<HardEvent::MTE1_M>();
      MmadParams p;
      p.m = 16, p.n = fractals * 16, p.k = 16;
      Mmad(at<float>(c.l0c, 0), at<half>(c.l0a, 0), at<half>(c.l0b, 0), p);
      if (has_barrier) PipeBarrier<PIPE_M>();
      p.cmatrixInitVal = false;
      Mmad(at<float>(c.l0c, 0), at<half>(c.l0a, 0), at<half>(c.l0b, 0), p);
    });
  };
  expect_violations(twice(9, false), {Detector::kHazard}, "sums of 9 fractals without a barrier");
  expect_clean(twice(9, true), "sums of 9 fractals with a barrier");
  expect_clean(twice(10, false), "sums of 10 fractals");
}

// Two AIVs and global memory.
void test_between_cores() {
  enum class Order { kNone, kFlagTooEarly, kFlag };
  const auto pass = [](Order how, bool shares_bytes) {
    DeviceMemory memory;
    uint8_t* shared = memory.allocate(1024, "shared");
    return Launch(2, [&] {
      if ASCEND_IS_AIV {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 1024);
        const LocalTensor<float> ub = buffer.Get<float>();
        const uint32_t index = static_cast<uint32_t>(GetBlockIdx());
        Duplicate(ub, static_cast<float>(index), 8);
        set_and_wait<HardEvent::V_MTE3>();
        if (how == Order::kFlagTooEarly) CrossCoreSetFlag<0, PIPE_MTE3>(5);
        store(shared + index * 4, ub, 1);  // neighbours within 32 bytes
        if (how == Order::kFlag) CrossCoreSetFlag<0, PIPE_MTE3>(5);
        if (how != Order::kNone) CrossCoreWaitFlag(5);
        load(ub[64], shared + (shares_bytes ? (index ^ 3) : index) * 4, 1);
        if (!shares_bytes) set_and_wait<HardEvent::MTE2_V>();
      }
    });
  };
  expect_violations(pass(Order::kNone, true), {Detector::kHazard, Detector::kUninitialised},
                    "cores that read each other's words");
  expect_violations(pass(Order::kFlagTooEarly, true), {Detector::kHazard}, "with the flag set before the store");
  expect_clean(pass(Order::kFlag, true), "with the flag after the store");
  const Report own = pass(Order::kFlag, false);
  expect_clean(own, "cores that write neighbouring words");
}

// Mode 1 joins the AIVs of a block, and no others.
void test_mode_1() {
  const auto run = [](uint32_t partner) {
    DeviceMemory memory;
    uint8_t* shared = memory.allocate(4 * 32, "shared");
    return Launch(2, [&] {
      if ASCEND_IS_AIV {
        TPipe pipe;
        TBuf<TPosition::VECCALC> buffer;
        pipe.InitBuffer(buffer, 256);
        const LocalTensor<float> ub = buffer.Get<float>();
        const uint32_t index = static_cast<uint32_t>(GetBlockIdx());
        Duplicate(ub, 1.0f, 8);
        set_and_wait<HardEvent::V_MTE3>();
        store(shared + index * 32, ub, 8);
        CrossCoreSetFlag<1, PIPE_MTE3>(4);
        CrossCoreWaitFlag(4);
        load(ub[32], shared + (index ^ partner) * 32, 8);
      }
    });
  };
  expect_clean(run(1), "mode 1 within a block");
  const Report across = run(2);
  check(across.has(Detector::kHazard) || across.has(Detector::kUninitialised), "mode 1 does not reach another block");
}

}  // namespace

int main() {
  test_seeded_faults();
  test_kinds();
  test_sums();
  test_between_cores();
  test_mode_1();
  return finish("hazards_test");
}
