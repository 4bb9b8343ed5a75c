// SPDX-License-Identifier: Apache-2.0
// What the tests share: counted checks, threads, packed weights, values in the operators' dtypes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "float16.h"
#include "kernels.h"
#include "layout.h"
#include "linear.h"
#include "pack.h"

inline int checks = 0, failures = 0;

inline void check(bool is_right, const std::string& what) {
  ++checks;
  if (is_right) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Threads of its own for every call, so that each part runs on a fresh one.
inline w4a4::Pool make_pool(int64_t threads) {
  return {[threads](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            const int64_t parts = std::min(threads, w4a4::ceil_div(count, std::max<int64_t>(grain, 1)));
            std::vector<std::thread> workers;
            for (int64_t p = 0; p < parts; ++p) {
              workers.emplace_back([&, p] { body(p * count / parts, (p + 1) * count / parts); });
            }
            for (auto& worker : workers) worker.join();
          },
          threads};
}

// The caller's thread alone.
inline w4a4::Pool no_threads() {
  return {[](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
            if (count > 0) body(0, count);
          },
          1};
}

inline std::vector<uint8_t> pack(const std::vector<int8_t>& weight, int64_t out, int64_t features) {
  const int64_t bytes = w4a4::tile_count(out) * w4a4::block_count(features) * w4a4::kBlockBytes;
  std::vector<uint8_t> packed(bytes, w4a4::kZeroPoint << 4 | w4a4::kZeroPoint);
  w4a4::pack_rows(weight.data(), out, features, 0, packed.data(), no_threads());
  return packed;
}

// Zero rows and features beyond the weight.
inline std::vector<int8_t> pack_int8(const std::vector<int8_t>& weight, int64_t out, int64_t features) {
  std::vector<int8_t> packed(w4a4::tile_count(out) * w4a4::block_count(features) * w4a4::kInt8BlockBytes);
  w4a4::pack_int8_rows(weight.data(), out, features, 0, packed.data(), no_threads());
  return packed;
}

inline const char* name_of(w4a4::Dtype dtype) {
  return dtype == w4a4::Dtype::kFloat32 ? "float32" : dtype == w4a4::Dtype::kBFloat16 ? "bfloat16" : "float16";
}

// Floats in the operators' dtype. To bfloat16 the lower half is cut off: exact for the values that the tests use. The
// conversions to and from float16 are the kernels' own, which float16_test.cpp checks.
inline std::vector<uint8_t> to_dtype(const std::vector<float>& values, w4a4::Dtype dtype) {
  std::vector<uint8_t> bytes(values.size() * w4a4::dtype_size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == w4a4::Dtype::kFloat32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else if (dtype == w4a4::Dtype::kBFloat16) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      const auto upper = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&bytes[2 * i], &upper, 2);
    } else {
      const auto half = static_cast<w4a4::Float16>(values[i]);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

inline std::vector<float> from_dtype(const std::vector<uint8_t>& bytes, w4a4::Dtype dtype) {
  std::vector<float> values(bytes.size() / w4a4::dtype_size(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == w4a4::Dtype::kFloat32) {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    } else if (dtype == w4a4::Dtype::kBFloat16) {
      uint16_t upper;
      std::memcpy(&upper, &bytes[2 * i], 2);
      const uint32_t bits = static_cast<uint32_t>(upper) << 16;
      std::memcpy(&values[i], &bits, 4);
    } else {
      w4a4::Float16 half;
      std::memcpy(&half, &bytes[2 * i], 2);
      values[i] = static_cast<float>(half);
    }
  }
  return values;
}
