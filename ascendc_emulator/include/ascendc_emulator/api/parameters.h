// SPDX-License-Identifier: Apache-2.0
// Enumerations and parameter structs of the Ascend C subset, with the documented defaults, widths and argument orders.
#pragma once

#include <cstdint>

#include "field.h"
#include "numbers.h"

enum pipe_t : uint8_t { PIPE_S = 0, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_FIX = 10 };

enum QuantMode_t : uint8_t { NoQuant, F322F16, F322BF16, DEQF16, VDEQF16, QF322B8_PRE, VQF322B8_PRE, REQ8, VREQ8 };

using GM_ADDR = uint8_t*;
#define __aicore__
#define __global__
// Keeps the mode with the kernel, for is_batch_kernel().
#define __schedmode__(mode) __attribute__((section("ascendc_schedmode_" #mode)))
#define __gm__

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC };
enum class CacheMode : uint8_t { CACHE_MODE_DISABLE, CACHE_MODE_NORMAL, CACHE_MODE_LAST, CACHE_MODE_PERSISTENT };
enum class CacheRwMode : uint8_t { READ = 1, WRITE = 2, RW = 3 };
enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };

// <pipe that sets>_<pipe that waits>.
enum class HardEvent : uint8_t {
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  M_FIX,
  FIX_M,
  FIX_MTE1,
  FIX_MTE2,
  MTE2_FIX,
  MTE3_MTE2,
  MTE2_MTE3,
  FIX_MTE3,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  M_S,
  FIX_S,
  COUNT
};

struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(uint16_t block_count, uint16_t block_len, uint16_t src_stride, uint16_t dst_stride)
      : blockCount(block_count), blockLen(block_len), srcStride(src_stride), dstStride(dst_stride) {}
  ascendc_emulator::Field<uint16_t> blockCount = 1;
  ascendc_emulator::Field<uint16_t> blockLen = 0;   // 32 bytes
  ascendc_emulator::Field<uint16_t> srcStride = 0;  // 32 bytes, from the end of a block to the next one
  ascendc_emulator::Field<uint16_t> dstStride = 0;
};

struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t block_count, uint32_t block_len, uint32_t src_stride, uint32_t dst_stride, uint32_t)
      : blockCount(block_count), blockLen(block_len), srcStride(src_stride), dstStride(dst_stride) {}
  ascendc_emulator::Field<uint16_t> blockCount = 1;
  ascendc_emulator::Field<uint32_t> blockLen = 0;   // bytes
  ascendc_emulator::Field<uint32_t> srcStride = 0;  // gaps: bytes in global memory, 32 bytes in UB
  ascendc_emulator::Field<uint32_t> dstStride = 0;
  ascendc_emulator::Field<uint32_t> rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool is_pad, uint8_t left, uint8_t right, T value)
      : isPad(is_pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  ascendc_emulator::Field<uint8_t> leftPadding = 0;  // elements
  ascendc_emulator::Field<uint8_t> rightPadding = 0;
  T paddingValue = T();
};

struct Nd2NzParams {
  Nd2NzParams() = default;
  Nd2NzParams(uint16_t nd_num, uint16_t n_value, uint16_t d_value, uint16_t src_matrix_stride, uint16_t src_d_value,
              uint16_t dst_c0_stride, uint16_t dst_n_stride, uint16_t dst_matrix_stride)
      : ndNum(nd_num),
        nValue(n_value),
        dValue(d_value),
        srcNdMatrixStride(src_matrix_stride),
        srcDValue(src_d_value),
        dstNzC0Stride(dst_c0_stride),
        dstNzNStride(dst_n_stride),
        dstNzMatrixStride(dst_matrix_stride) {}
  ascendc_emulator::Field<uint16_t> ndNum = 0;
  ascendc_emulator::Field<uint16_t> nValue = 0;             // rows
  ascendc_emulator::Field<uint16_t> dValue = 0;             // columns, elements
  ascendc_emulator::Field<uint16_t> srcNdMatrixStride = 0;  // elements
  ascendc_emulator::Field<uint16_t> srcDValue = 0;          // elements
  ascendc_emulator::Field<uint16_t> dstNzC0Stride = 0;      // 32 bytes
  ascendc_emulator::Field<uint16_t> dstNzNStride = 0;       // 32 bytes
  ascendc_emulator::Field<uint16_t> dstNzMatrixStride = 0;  // elements
};

template <typename T>
struct InitConstValueParams {
  InitConstValueParams() = default;
  InitConstValueParams(uint16_t repeats, uint16_t blocks, uint16_t gap, T value)
      : repeatTimes(repeats), blockNum(blocks), dstGap(gap), initValue(value) {}
  ascendc_emulator::Field<uint16_t> repeatTimes = 0;
  ascendc_emulator::Field<uint16_t> blockNum = 0;  // 32 bytes in L1, 512 in L0
  ascendc_emulator::Field<uint16_t> dstGap = 0;
  T initValue = T();
};

struct LoadData2DParams {
  LoadData2DParams() = default;
  LoadData2DParams(uint16_t start, uint8_t repeats, uint16_t src_stride, uint8_t sid_, uint16_t gap, bool transposes,
                   uint8_t address_mode)
      : startIndex(start),
        repeatTimes(repeats),
        srcStride(src_stride),
        sid(sid_),
        dstGap(gap),
        ifTranspose(transposes),
        addrMode(address_mode) {}
  ascendc_emulator::Field<uint16_t> startIndex = 0;  // fractals of 512 bytes, as are the strides
  ascendc_emulator::Field<uint8_t> repeatTimes = 0;
  ascendc_emulator::Field<uint16_t> srcStride = 0;  // from fractal to fractal
  ascendc_emulator::Field<uint8_t> sid = 0;
  ascendc_emulator::Field<uint16_t> dstGap = 0;  // from the end of a fractal to the next one
  bool ifTranspose = false;
  ascendc_emulator::Field<uint8_t> addrMode = 0;
};
using LoadData2dParams = LoadData2DParams;

struct MmadParams {
  MmadParams() = default;
  MmadParams(uint16_t m_, uint16_t n_, uint16_t k_, uint8_t unit_flag, bool source, bool init)
      : m(m_), n(n_), k(k_), cmatrixInitVal(init), cmatrixSource(source), unitFlag(unit_flag) {}
  ascendc_emulator::Field<uint16_t> m = 0;
  ascendc_emulator::Field<uint16_t> n = 0;
  ascendc_emulator::Field<uint16_t> k = 0;
  bool cmatrixInitVal = true;  // start from zero
  bool cmatrixSource = false;
  ascendc_emulator::Field<uint8_t> unitFlag = 0;
  bool kDirectionAlign = false;
};

enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
inline constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
inline constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  FixpipeParamsV220() = default;
  FixpipeParamsV220(uint16_t n, uint16_t m, uint16_t src_stride, uint32_t dst_stride, bool relu)
      : nSize(n), mSize(m), srcStride(src_stride), dstStride(dst_stride), reluEn(relu) {}
  ascendc_emulator::Field<uint16_t> nSize = 0;
  ascendc_emulator::Field<uint16_t> mSize = 0;
  ascendc_emulator::Field<uint16_t> srcStride = 0;  // rows from one column of fractals to the next
  ascendc_emulator::Field<uint32_t> dstStride =
      0;  // ROW_MAJOR: elements of a row; NZ: 32 bytes from one column of fractals to the next
  QuantMode_t quantPre = QuantMode_t::NoQuant;
  uint64_t deqScalar = 0;
  ascendc_emulator::Field<uint16_t> ndNum = 1;
  ascendc_emulator::Field<uint16_t> srcNdStride = 0;
  ascendc_emulator::Field<uint16_t> dstNdStride = 0;
  bool reluEn = false;
  ascendc_emulator::Field<uint8_t> unitFlag = 0;
  bool isChannelSplit = false;
};

struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat)
      : dstBlkStride(dst_block), srcBlkStride(src_block), dstRepStride(dst_repeat), srcRepStride(src_repeat) {}
  ascendc_emulator::Field<uint16_t> dstBlkStride = 1;  // 32 bytes, as are all
  ascendc_emulator::Field<uint16_t> srcBlkStride = 1;
  ascendc_emulator::Field<uint8_t> dstRepStride = 8;
  ascendc_emulator::Field<uint8_t> srcRepStride = 8;
};

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block, uint8_t dst_repeat, uint8_t src0_repeat,
                     uint8_t src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}
  ascendc_emulator::Field<uint8_t> dstBlkStride = 1;
  ascendc_emulator::Field<uint8_t> src0BlkStride = 1;
  ascendc_emulator::Field<uint8_t> src1BlkStride = 1;
  ascendc_emulator::Field<uint8_t> dstRepStride = 8;
  ascendc_emulator::Field<uint8_t> src0RepStride = 8;
  ascendc_emulator::Field<uint8_t> src1RepStride = 8;
};

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t dst_block, uint16_t dst_repeat) : dstBlkStride(dst_block), dstRepStride(dst_repeat) {}
  ascendc_emulator::Field<uint16_t> dstBlkStride = 1;
  ascendc_emulator::Field<uint16_t> dstRepStride = 8;
};

}  // namespace AscendC
