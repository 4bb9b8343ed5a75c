// SPDX-License-Identifier: Apache-2.0
// What the vector instructions and DataCopyPad compute, by the examples of the public documents where they have any.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "small_kernels.h"

namespace {

// Runs one Cast of a number, repeated to fill 32 bytes.
template <typename T, typename U>
T cast_one(U value, RoundMode mode) {
  DeviceMemory memory;
  const std::vector<U> values(64, value);
  uint8_t* in = memory.copy(values.data(), 64 * sizeof(U));
  uint8_t* out = memory.allocate(64 * sizeof(T));
  expect_clean(run_on_vector([&](const LocalTensor<uint8_t>& ub) {
                 load(at<U>(ub, 0), in, 64);
                 set_and_wait<HardEvent::MTE2_V>();
                 Cast(at<T>(ub, 4096), at<U>(ub, 0), mode, 64);
                 set_and_wait<HardEvent::V_MTE3>();
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
    const float value = ascendc_emulator::half_value(static_cast<uint16_t>(bits));
    if (ascendc_emulator::half_bits(value) != bits) check(false, "half " + std::to_string(bits) + " does not survive");
  }
}

void test_vector() {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) values[i] = static_cast<float>((i * 37) % 101) - 50.0f;
  DeviceMemory memory;
  uint8_t* in = memory.copy(values.data(), 1024);
  uint8_t* out = memory.allocate(8192);
  const Report report = run_on_vector([&](const LocalTensor<uint8_t>& ub) {
    const LocalTensor<float> x = at<float>(ub, 0), y = at<float>(ub, 8192);
    load(x, in, 256);
    set_and_wait<HardEvent::MTE2_V>();
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
    set_and_wait<HardEvent::V_MTE3>();
    store(out, y, 276);
    store(out + 2048, y[512], 128);
    store(out + 4096, y[1024], 8);
    store(out + 4128, y[1040], 8);
  });
  expect_clean(report, "vector instructions");
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
  const Report report = run_on_vector([&](const LocalTensor<uint8_t>& ub) {
    DataCopyExtParams copy{2, 26, 14, 0, 0};  // 13 elements, 7 skipped
    DataCopyPad(at<int16_t>(ub, 0), global<int16_t>(in), copy, DataCopyPadExtParams<int16_t>{true, 1, 2, -7});
    set_and_wait<HardEvent::MTE2_MTE3>();
    store(out, at<int16_t>(ub, 0), 32);
  });
  expect_clean(report, "DataCopyPad");
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
  test_vector();
  test_padding();
  return finish("vector_test");
}
