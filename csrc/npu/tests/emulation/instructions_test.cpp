// SPDX-License-Identifier: Apache-2.0
// What the instructions compute, by the examples of the public documents where they have them.
#include <cmath>
#include <cstring>
#include <random>

#include "toy.h"

namespace {

// Runs one Cast of a number, repeated to fill 32 bytes.
template <typename T, typename U>
T cast_one(U value, RoundMode mode) {
  DeviceMemory memory;
  const std::vector<U> values(64, value);
  uint8_t* in = memory.copy(values.data(), 64 * sizeof(U));
  uint8_t* out = memory.allocate(64 * sizeof(T));
  is_clean(on_vector([&](const LocalTensor<uint8_t>& ub) {
             load(at<U>(ub, 0), in, 64);
             order<HardEvent::MTE2_V>();
             Cast(at<T>(ub, 4096), at<U>(ub, 0), mode, 64);
             order<HardEvent::V_MTE3>();
             store(out, at<T>(ub, 4096), 64);
           }),
           "Cast");
  T result;
  std::memcpy(&result, out, sizeof(T));
  return result;
}

int cast_int4(float value, RoundMode mode) {
  const uint8_t byte = cast_one<int4b_t, half>(half(value), mode).storage;
  check((byte & 15) == byte >> 4, "both nibbles of equal values");
  return static_cast<int8_t>(byte << 4) >> 4;
}

void test_cast() {
  const RoundMode modes[] = {RoundMode::CAST_RINT, RoundMode::CAST_FLOOR, RoundMode::CAST_CEIL, RoundMode::CAST_ROUND,
                             RoundMode::CAST_TRUNC};
  // Rows of the table of the page "Cast", one value a mode.
  const auto expect = [&](auto result, std::initializer_list<double> expected, const char* what) {
    int i = 0;
    for (const double value : expected) {
      const double found = result(modes[i]);
      check(found == value, std::string(what) + ", mode " + std::to_string(static_cast<int>(modes[i])) + ": expected " +
                                std::to_string(value) + ", found " + std::to_string(found));
      ++i;
    }
  };
  const double p = std::ldexp(1, -11);
  expect([](RoundMode m) { return float(cast_one<half, float>(0.5f + std::ldexp(1.0f, -12), m)); },
         {0.5, 0.5, 0.5 + p, 0.5 + p, 0.5}, "float 0.5 + 2^-12 -> half");
  check(float(cast_one<half, float>(0.5f + std::ldexp(1.0f, -12), RoundMode::CAST_ODD)) == 0.5 + p, "CAST_ODD -> half");
  const float wide = 0.5f + std::ldexp(1.0f, -9) + std::ldexp(1.0f, -11);
  const double q = std::ldexp(1, -8);
  expect([&](RoundMode m) { return float(cast_one<bfloat16_t, float>(wide, m)); },
         {0.5 + q, 0.5, 0.5 + q, 0.5 + q, 0.5}, "float 0.5 + 2^-9 + 2^-11 -> bfloat16");
  const double m22 = std::ldexp(1, 22);
  expect([&](RoundMode m) { return cast_one<int32_t, float>(static_cast<float>(m22 + 0.5), m); },
         {m22, m22, m22 + 1, m22 + 1, m22}, "float 2^22 + 0.5 -> int32");
  expect([&](RoundMode m) { return cast_one<int16_t, float>(static_cast<float>(m22 + 0.5), m); },
         {32767, 32767, 32767, 32767, 32767}, "float 2^22 + 0.5 -> int16");
  expect([](RoundMode m) { return cast_one<float, float>(0.5f, m); }, {0, 0, 1, 1, 0}, "float 0.5 -> float");
  expect([](RoundMode m) { return cast_one<int32_t, half>(half(-1.5f), m); }, {-2, -2, -1, -2, -1},
         "half -1.5 -> int32");
  expect([](RoundMode m) { return cast_one<int8_t, half>(half(127.5f), m); }, {127, 127, 127, 127, 127},
         "half 2^7 - 0.5 -> int8");
  expect([](RoundMode m) { return cast_one<uint8_t, half>(half(1.75f), m); }, {2, 1, 2, 2, 1}, "half 1.75 -> uint8");
  expect([](RoundMode m) { return cast_int4(1.5f, m); }, {2, 1, 2, 2, 1}, "half 1.5 -> int4");
  const double m25 = std::ldexp(1, 25);
  expect([&](RoundMode m) { return cast_one<float, int32_t>(static_cast<int32_t>(m25) + 3, m); },
         {m25 + 4, m25, m25 + 4, m25 + 4, m25}, "int32 2^25 + 3 -> float");
  expect([](RoundMode m) { return float(cast_one<half, int16_t>(4096 + 2, m)); }, {4096, 4096, 4100, 4100, 4096},
         "int16 2^12 + 2 -> half");
  check(float(cast_one<float, half>(half(1.5f - std::ldexp(1.0f, -10)), RoundMode::CAST_NONE)) ==
            1.5f - std::ldexp(1.0f, -10),
        "half -> float is exact");
  // Saturation, ties to even, both ends of int4.
  for (const auto& [value, expected] : std::vector<std::pair<float, int>>{{0.5f, 0},
                                                                          {1.5f, 2},
                                                                          {2.5f, 2},
                                                                          {-0.5f, 0},
                                                                          {-1.5f, -2},
                                                                          {7.5f, 7},
                                                                          {100.0f, 7},
                                                                          {-8.5f, -8},
                                                                          {-100.0f, -8}}) {
    check(cast_int4(value, RoundMode::CAST_RINT) == expected, "half -> int4 of " + std::to_string(value));
  }
  check(cast_one<half, float>(1e6f, RoundMode::CAST_RINT).bits == 0x7bff, "float -> half saturates");
  // Subnormal halves.
  check(cast_one<half, float>(std::ldexp(3.0f, -25), RoundMode::CAST_RINT).bits == 2, "3 * 2^-25 is halfway: to even");
  check(cast_one<half, float>(std::ldexp(1.0f, -25), RoundMode::CAST_RINT).bits == 0, "2^-25 rounds to 0");
  check(cast_one<half, float>(std::ldexp(1.0f, -30), RoundMode::CAST_ODD).bits == 1,
        "CAST_ODD keeps that there is more");
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = emulation::half_value(static_cast<uint16_t>(bits));
    if (emulation::half_bits(value) != bits) check(false, "half " + std::to_string(bits) + " does not survive");
  }
}

void test_nd2nz() {
  // The page's example: two matrices of 2 rows and 24 columns of half.
  std::vector<uint16_t> values(4 * 144);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i + 1);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), values.size() * 2);
  std::vector<uint16_t> found(1024, 0xffff);
  const Report report = on_cube([&](const Cube& c) {
    Nd2NzParams p;
    p.ndNum = 2, p.nValue = 2, p.dValue = 24, p.srcNdMatrixStride = 144, p.srcDValue = 48;
    p.dstNzC0Stride = 11, p.dstNzNStride = 2, p.dstNzMatrixStride = 96;
    DataCopy(at<half>(c.l1, 0), global<half>(in), p);
    const auto& core = emulation::Machine::current().core();
    std::memcpy(found.data(), core.data[1].data(), 2048);
  });
  is_clean(report, "ND2NZ");
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
  constexpr bool kInt4 = emulation::kIsInt4<T>;
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
  const Report report = on_cube([&](const Cube& c) {
    DataCopyParams copy;
    copy.blockLen = mf * kf * 16;
    DataCopy(at<int8_t>(c.l1, 0), global<int8_t>(ga), copy);
    copy.blockLen = nf * kf * 16;
    DataCopy(at<int8_t>(c.l1, 65536), global<int8_t>(gb), copy);
    order<HardEvent::MTE2_MTE1>();
    LoadData2DParams load;
    load.srcStride = 1;
    load.repeatTimes = mf * kf;
    LoadData(at<T>(c.l0a, 0), at<T>(c.l1, 0), load);
    load.repeatTimes = nf * kf;
    LoadData(at<T>(c.l0b, 0), at<T>(c.l1, 65536), load);
    order<HardEvent::MTE1_M>();
    MmadParams p;
    p.m = m, p.n = n, p.k = k;
    Mmad(at<C>(c.l0c, 0), at<T>(c.l0a, 0), at<T>(c.l0b, 0), p);
    PipeBarrier<PIPE_M>();
    p.cmatrixInitVal = false;
    Mmad(at<C>(c.l0c, 0), at<T>(c.l0a, 0), at<T>(c.l0b, 0), p);
    order<HardEvent::M_FIX>();
    FixpipeParamsV220 out;
    out.nSize = n, out.mSize = m, out.srcStride = mf * 16, out.dstStride = nf * 16;
    Fixpipe<C, C, CFG_ROW_MAJOR>(global<C>(gc), at<C>(c.l0c, 0), out);
  });
  const std::string what = "product " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  is_clean(report, what);
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
  const Report report = on_cube([&](const Cube& c) {
    auto& core = emulation::Machine::current().core();
    for (uint32_t i = 0; i < 3 * 64 * 16; ++i) {
      const float value = static_cast<float>(i) + 0.25f;
      std::memcpy(&core.data[4][i * 4], &value, 4);
    }
    std::fill(core.valid[4].begin(), core.valid[4].end(), 1);
    FixpipeParamsV220 p;
    p.nSize = 48, p.mSize = 24, p.srcStride = 64, p.dstStride = 40, p.quantPre = F322F16;
    Fixpipe<half, float, CFG_NZ>(global<half>(out), at<float>(c.l0c, 0), p);
  });
  is_clean(report, "Fixpipe NZ");
  for (int block = 0; block < 3; ++block) {
    for (int row = 0; row < 24; ++row) {
      for (int j = 0; j < 16; ++j) {
        uint16_t bits;
        std::memcpy(&bits, out + block * 40 * 32 + row * 32 + j * 2, 2);
        const float expected = static_cast<float>(block * 64 * 16 + row * 16 + j) + 0.25f;
        if (bits != emulation::half_bits(expected)) check(false, "Fixpipe NZ value");
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
  const Report report = on_cube([&](const Cube& c) {
    auto& core = emulation::Machine::current().core();
    for (int32_t i = 0; i < 256; ++i) std::memcpy(&core.data[4][i * 4], &i, 4);
    std::fill(core.valid[4].begin(), core.valid[4].end(), 1);
    FixpipeParamsV220 p;
    p.nSize = 16, p.mSize = 16, p.srcStride = 16, p.dstStride = 16, p.quantPre = DEQF16;
    p.deqScalar = std::bit_cast<uint32_t>(scale);
    Fixpipe<half, int32_t, CFG_ROW_MAJOR>(global<half>(out), at<int32_t>(c.l0c, 0), p);
  });
  is_clean(report, "Fixpipe DEQF16");
  for (int i = 0; i < 256; ++i) {
    uint16_t bits;
    std::memcpy(&bits, out + i * 2, 2);
    const float truncated = 1.0f + std::ldexp(1.0f, -10);
    if (bits != emulation::half_bits(static_cast<float>(i) * truncated)) check(false, "Fixpipe DEQF16 value");
  }
}

void test_load_transposed() {
  std::vector<uint16_t> values(256);
  for (int i = 0; i < 256; ++i) values[i] = static_cast<uint16_t>(i);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 512);
  const Report report = on_cube([&](const Cube& c) {
    DataCopyParams copy;
    copy.blockLen = 16;
    DataCopy(at<half>(c.l1, 0), global<half>(in), copy);
    order<HardEvent::MTE2_MTE1>();
    LoadData2DParams load;
    load.repeatTimes = 1, load.ifTranspose = true;
    LoadData(at<half>(c.l0b, 512), at<half>(c.l1, 0), load);
    const auto& l0b = emulation::Machine::current().core().data[3];
    for (int i = 0; i < 256; ++i) {
      uint16_t found;
      std::memcpy(&found, &l0b[512 + i * 2], 2);
      if (found != values[i % 16 * 16 + i / 16]) check(false, "transposed fractal");
    }
  });
  is_clean(report, "LoadData with ifTranspose");
}

void test_vector() {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) values[i] = static_cast<float>((i * 37) % 101) - 50.0f;
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 1024);
  uint8_t* out = memory.allocate(8192);
  const Report report = on_vector([&](const LocalTensor<uint8_t>& ub) {
    const LocalTensor<float> x = at<float>(ub, 0), y = at<float>(ub, 8192);
    load(x, in, 256);
    order<HardEvent::MTE2_V>();
    // Two repeats; the second operand's block is taken again and again.
    Mul(y, x, x, uint64_t{64}, 2, BinaryRepeatParams{1, 1, 0, 8, 8, 0});
    Abs(y[128], x[128], 64);
    Muls(y[192], x[192], 0.5f, 64);
    Duplicate(y[256], 3.0f, 16);
    PipeBarrier<PIPE_V>();
    WholeReduceMax(y[272], x, 64, 4, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    Brcb(y[512], x, 2, BrcbRepeatParams{1, 8});
    // Every other block of the target.
    Adds(y[1024], x, 1.0f, uint64_t{64}, 1, UnaryRepeatParams{2, 1, 16, 8});
    order<HardEvent::V_MTE3>();
    store(out, y, 276);
    store(out + 2048, y[512], 128);
    store(out + 4096, y[1024], 8);
    store(out + 4128, y[1040], 8);
  });
  is_clean(report, "vector instructions");
  std::vector<float> y(2048);
  std::memcpy(y.data(), out, 8192);
  for (int i = 0; i < 128; ++i) {
    if (y[i] != values[i] * values[i % 8]) check(false, "Mul with a repeated block");
  }
  for (int i = 128; i < 192; ++i) {
    if (y[i] != std::fabs(values[i])) check(false, "Abs");
    if (y[i + 64] != values[i + 64] * 0.5f) check(false, "Muls");
  }
  for (int i = 0; i < 4; ++i) {
    check(y[272 + i] == *std::max_element(&values[i * 64], &values[i * 64] + 64), "WholeReduceMax");
  }
  for (int i = 0; i < 128; ++i) {
    if (y[512 + i] != values[i / 8]) check(false, "Brcb");
  }
  for (int i = 0; i < 16; ++i) check(y[1024 + i] == values[i] + 1, "blocks with a stride");
}

void test_padding() {
  std::vector<int16_t> values(40);
  for (int i = 0; i < 40; ++i) values[i] = static_cast<int16_t>(i + 1);
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 80);
  uint8_t* out = memory.allocate(128);
  const Report report = on_vector([&](const LocalTensor<uint8_t>& ub) {
    DataCopyExtParams copy{2, 26, 14, 0, 0};  // 13 elements, 7 skipped
    DataCopyPad(at<int16_t>(ub, 0), global<int16_t>(in), copy, DataCopyPadExtParams<int16_t>{true, 1, 2, -7});
    order<HardEvent::MTE2_MTE3>();
    store(out, at<int16_t>(ub, 0), 32);
  });
  is_clean(report, "DataCopyPad");
  for (int block = 0; block < 2; ++block) {
    for (int i = 0; i < 16; ++i) {
      int16_t found;
      std::memcpy(&found, out + block * 32 + i * 2, 2);
      const int16_t expected = i < 1 || i > 13 ? -7 : values[block * 20 + i - 1];
      check(found == expected, "padded block " + std::to_string(block) + " element " + std::to_string(i));
    }
  }
}

}  // namespace

int main() {
  test_cast();
  test_nd2nz();
  test_product<half>(30, 40, 70);  // the page's example of invalid data in fractals
  test_product<bfloat16_t>(17, 16, 33);
  test_product<int4b_t>(16, 16, 64);
  test_product<int4b_t>(30, 40, 130);
  test_product<int4b_t>(128, 128, 256);
  test_fixpipe_nz();
  test_fixpipe_scale();
  test_load_transposed();
  test_vector();
  test_padding();
  return finish("instructions_test");
}
