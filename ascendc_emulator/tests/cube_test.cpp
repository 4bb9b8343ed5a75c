// SPDX-License-Identifier: Apache-2.0
// What the instructions around the cube compute: loads, products, Fixpipe, by the examples of the public documents
// where they have any.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "machine/machine.h"
#include "small_kernels.h"

namespace {

using ascendc_emulator::Memory;

// Of the running core, without an instruction that would be checked.
std::vector<uint8_t>& contents(Memory memory) {
  return ascendc_emulator::Machine::current().core().data[static_cast<uint32_t>(memory)];
}

// Stands in for products: all of L0C counts as written.
template <typename T>
void fill_l0c(const std::vector<T>& sums) {
  std::memcpy(contents(Memory::kL0c).data(), sums.data(), sums.size() * sizeof(T));
  std::vector<uint8_t>& valid = ascendc_emulator::Machine::current().core().valid[static_cast<uint32_t>(Memory::kL0c)];
  std::fill(valid.begin(), valid.end(), 1);
}

void test_nd2nz() {
  // The page's example: two matrices of 2 rows and 24 columns of half.
  std::vector<uint16_t> values(4 * 144);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i + 1);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), values.size() * 2);
  std::vector<uint16_t> found(1024, 0xffff);
  const Report report = run_on_cube([&](const CubeMemories& c) {
    Nd2NzParams p;
    p.ndNum = 2, p.nValue = 2, p.dValue = 24, p.srcNdMatrixStride = 144, p.srcDValue = 48;
    p.dstNzC0Stride = 11, p.dstNzNStride = 2, p.dstNzMatrixStride = 96;
    DataCopy(at<half>(c.l1, 0), global<half>(in), p);
    std::memcpy(found.data(), contents(Memory::kL1).data(), 2048);
  });
  expect_clean(report, "ND2NZ");
  const auto expect = [&](int matrix, int row, int column, uint16_t value) {
    const int block = matrix * 6 + (column / 16) * 11 + row * 2;
    check(found[block * 16 + column % 16] == value, "ND2NZ matrix " + std::to_string(matrix) + " row " +
                                                        std::to_string(row) + " column " + std::to_string(column));
  };
  for (int matrix = 0; matrix < 2; ++matrix) {
    for (int row = 0; row < 2; ++row) {
      for (int column = 0; column < 32; ++column) {
        expect(matrix, row, column, column < 24 ? values[matrix * 144 + row * 48 + column] : 0);
      }
    }
  }
}

// A product as a kernel makes it, against sums in integers.
template <typename T>
void test_product(uint32_t m, uint32_t n, uint32_t k) {
  constexpr bool kInt4 = ascendc_emulator::kIsInt4<T>;
  constexpr uint32_t kDepth = kInt4 ? 64 : 16;
  const uint32_t mf = (m + 15) / 16, nf = (n + 15) / 16, kf = (k + kDepth - 1) / kDepth;
  std::mt19937 random(m * 1000 + n * 10 + k);
  std::vector<int> a(m * k), b(n * k);
  for (int& value : a) value = static_cast<int>(random() % 16) - 8;
  for (int& value : b) value = static_cast<int>(random() % 16) - 8;
  const auto pack = [&](const std::vector<int>& values, uint32_t rows, uint32_t row_fractals, bool depth_outer) {
    std::vector<uint8_t> packed(size_t{row_fractals} * kf * 512, 0xEE);  // values beyond the matrix must not matter
    for (uint32_t r = 0; r < rows; ++r) {
      for (uint32_t i = 0; i < k; ++i) {
        const uint32_t fractal = depth_outer ? i / kDepth * row_fractals + r / 16 : r / 16 * kf + i / kDepth;
        uint8_t* row = &packed[fractal * 512 + r % 16 * 32];
        const int value = values[r * k + i];
        if constexpr (kInt4) {
          uint8_t& byte = row[i % 64 / 2];
          byte = i % 2 ? (byte & 15) | (value & 15) << 4 : (byte & 0xf0) | (value & 15);
        } else {
          const T number(static_cast<float>(value));
          std::memcpy(row + i % 16 * 2, &number, 2);
        }
      }
    }
    return packed;
  };
  const std::vector<uint8_t> pa = pack(a, m, mf, false), pb = pack(b, n, nf, true);
  DeviceMemory memory;
  uint8_t* ga = memory.copy(pa.data(), pa.size());
  uint8_t* gb = memory.copy(pb.data(), pb.size());
  uint8_t* gc = memory.allocate(size_t{m} * nf * 16 * 4);
  using C = std::conditional_t<kInt4, int32_t, float>;
  const Report report = run_on_cube([&](const CubeMemories& c) {
    DataCopyParams copy;
    copy.blockLen = mf * kf * 16;
    DataCopy(at<int8_t>(c.l1, 0), global<int8_t>(ga), copy);
    copy.blockLen = nf * kf * 16;
    DataCopy(at<int8_t>(c.l1, 65536), global<int8_t>(gb), copy);
    set_and_wait<HardEvent::MTE2_MTE1>();
    LoadData2DParams load;
    load.srcStride = 1;
    load.repeatTimes = mf * kf;
    LoadData(at<T>(c.l0a, 0), at<T>(c.l1, 0), load);
    load.repeatTimes = nf * kf;
    LoadData(at<T>(c.l0b, 0), at<T>(c.l1, 65536), load);
    set_and_wait<HardEvent::MTE1_M>();
    MmadParams p;
    p.m = m, p.n = n, p.k = k;
    Mmad(at<C>(c.l0c, 0), at<T>(c.l0a, 0), at<T>(c.l0b, 0), p);
    PipeBarrier<PIPE_M>();
    p.cmatrixInitVal = false;
    Mmad(at<C>(c.l0c, 0), at<T>(c.l0a, 0), at<T>(c.l0b, 0), p);
    set_and_wait<HardEvent::M_FIX>();
    FixpipeParamsV220 out;
    out.nSize = n, out.mSize = m, out.srcStride = mf * 16, out.dstStride = nf * 16;
    Fixpipe<C, C, CFG_ROW_MAJOR>(global<C>(gc), at<C>(c.l0c, 0), out);
  });
  const std::string what = "product " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  expect_clean(report, what);
  for (uint32_t i = 0; i < m; ++i) {
    for (uint32_t j = 0; j < n; ++j) {
      int sum = 0;
      for (uint32_t x = 0; x < k; ++x) sum += a[i * k + x] * b[j * k + x];
      C found;
      std::memcpy(&found, gc + (size_t{i} * nf * 16 + j) * 4, 4);
      if (found != static_cast<C>(2 * sum)) {
        check(false, what + ": row " + std::to_string(i) + " column " + std::to_string(j));
        return;
      }
    }
  }
  check(true, what);
}

// L0C -> GM in the NZ layout with the numbers of the page "Fixpipe", half from float32.
void test_fixpipe_nz() {
  DeviceMemory memory;
  uint8_t* out = memory.allocate(3 * 40 * 32);
  const Report report = run_on_cube([&](const CubeMemories& c) {
    std::vector<float> sums(3 * 64 * 16);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<float>(i) + 0.25f;
    fill_l0c(sums);
    FixpipeParamsV220 p;
    p.nSize = 48, p.mSize = 24, p.srcStride = 64, p.dstStride = 40, p.quantPre = F322F16;
    Fixpipe<half, float, CFG_NZ>(global<half>(out), at<float>(c.l0c, 0), p);
  });
  expect_clean(report, "Fixpipe NZ");
  for (int block = 0; block < 3; ++block) {
    for (int row = 0; row < 24; ++row) {
      for (int j = 0; j < 16; ++j) {
        uint16_t bits;
        std::memcpy(&bits, out + block * 40 * 32 + row * 32 + j * 2, 2);
        const float expected = static_cast<float>(block * 64 * 16 + row * 16 + j) + 0.25f;
        if (bits != ascendc_emulator::half_bits(expected)) check(false, "Fixpipe NZ value");
      }
    }
  }
  const uint8_t* behind = out + 24 * 32;
  check(behind[0] == 0xA5, "Fixpipe leaves what lies between the columns");
}

// int32 -> half by a scale that keeps 10 fraction bits.
void test_fixpipe_scale() {
  DeviceMemory memory;
  uint8_t* out = memory.allocate(16 * 16 * 2);
  const float scale = 1.0f + std::ldexp(1.0f, -10) + std::ldexp(1.0f, -20);
  const Report report = run_on_cube([&](const CubeMemories& c) {
    std::vector<int32_t> sums(256);
    std::iota(sums.begin(), sums.end(), 0);
    fill_l0c(sums);
    FixpipeParamsV220 p;
    p.nSize = 16, p.mSize = 16, p.srcStride = 16, p.dstStride = 16, p.quantPre = DEQF16;
    p.deqScalar = std::bit_cast<uint32_t>(scale);
    Fixpipe<half, int32_t, CFG_ROW_MAJOR>(global<half>(out), at<int32_t>(c.l0c, 0), p);
  });
  expect_clean(report, "Fixpipe DEQF16");
  for (int i = 0; i < 256; ++i) {
    uint16_t bits;
    std::memcpy(&bits, out + i * 2, 2);
    const float truncated = 1.0f + std::ldexp(1.0f, -10);
    if (bits != ascendc_emulator::half_bits(static_cast<float>(i) * truncated)) check(false, "Fixpipe DEQF16 value");
  }
}

void test_load_transposed() {
  std::vector<uint16_t> values(256);
  for (int i = 0; i < 256; ++i) values[i] = static_cast<uint16_t>(i);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 512);
  const Report report = run_on_cube([&](const CubeMemories& c) {
    DataCopyParams copy;
    copy.blockLen = 16;
    DataCopy(at<half>(c.l1, 0), global<half>(in), copy);
    set_and_wait<HardEvent::MTE2_MTE1>();
    LoadData2DParams load;
    load.repeatTimes = 1, load.ifTranspose = true;
    LoadData(at<half>(c.l0b, 512), at<half>(c.l1, 0), load);
    const std::vector<uint8_t>& l0b = contents(Memory::kL0b);
    for (int i = 0; i < 256; ++i) {
      uint16_t found;
      std::memcpy(&found, &l0b[512 + i * 2], 2);
      if (found != values[i % 16 * 16 + i / 16]) check(false, "transposed fractal");
    }
  });
  expect_clean(report, "LoadData with ifTranspose");
}

}  // namespace

int main() {
  test_nd2nz();
  test_product<half>(30, 40, 70);  // the page's example of invalid data in fractals
  test_product<bfloat16_t>(17, 16, 33);
  test_product<int4b_t>(16, 16, 64);
  test_product<int4b_t>(30, 40, 130);
  test_product<int4b_t>(128, 128, 256);
  test_fixpipe_nz();
  test_fixpipe_scale();
  test_load_transposed();
  return finish("cube_test");
}
