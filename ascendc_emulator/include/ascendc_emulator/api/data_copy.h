// SPDX-License-Identifier: Apache-2.0
// Transfers between global memory and UB or L1 (MTE2, MTE3).
#pragma once

#include "tensor.h"

namespace ascendc_emulator {

// `count` blocks of `length` bytes; the gaps are from the end of a block to the next one. A block that ends inside of
// 32 bytes of UB leaves the rest of them undefined, after `right` padding elements that repeat `padding`.
struct Blocks {
  uint32_t count;
  uint32_t length;
  uint64_t source_gap;
  uint64_t target_gap;
};
struct Padding {
  bool is_on = false;
  uint32_t left = 0, right = 0;  // elements
  uint32_t element = 1;          // bytes
  uint64_t value = 0;
};

void copy_in(const char* name, const Region& target, const uint8_t* source, const Blocks& blocks,
             const Padding& padding, const Location& at);
void copy_out(const char* name, uint8_t* target, const Region& source, const Blocks& blocks, const Location& at);
void copy_nd_to_nz(const Region& target, const uint8_t* source, const AscendC::Nd2NzParams& p, uint32_t element,
                   const Location& at);
void fill(const Region& target, uint32_t repeats, uint32_t blocks, uint32_t gap, const void* value, uint32_t element,
          const Location& at);

}  // namespace ascendc_emulator

namespace AscendC {

// GM -> L1 or UB; lengths and gaps in 32 bytes.
template <typename T>
inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p,
                     Location at = Location::current()) {
  ascendc_emulator::copy_in("DataCopy", dst.region(), src.address(),
                            {p.blockCount, p.blockLen * 32u, p.srcStride * 32u, p.dstStride * 32u}, {}, at);
}

template <typename T>
inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
                     Location at = Location::current()) {
  ascendc_emulator::copy_out("DataCopy", dst.address(), src.region(),
                             {p.blockCount, p.blockLen * 32u, p.srcStride * 32u, p.dstStride * 32u}, at);
}

template <typename T>
inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count,
                     Location at = Location::current()) {
  ascendc_emulator::copy_in("DataCopy", dst.region(), src.address(),
                            {1, static_cast<uint32_t>(ascendc_emulator::bytes_of<T>(count) / 32 * 32), 0, 0}, {}, at);
}

template <typename T>
inline void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count,
                     Location at = Location::current()) {
  ascendc_emulator::copy_out("DataCopy", dst.address(), src.region(),
                             {1, static_cast<uint32_t>(ascendc_emulator::bytes_of<T>(count) / 32 * 32), 0, 0}, at);
}

// Rows of a matrix become columns of 32-byte wide fractals; the last column is filled up with zeros. int4 is given as
// int8, two values an element.
template <typename T>
inline void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p,
                     Location at = Location::current()) {
  static_assert(!ascendc_emulator::kIsInt4<T>, "sizes of int4 matrices are in bytes: use int8_t");
  ascendc_emulator::copy_nd_to_nz(dst.region(), src.address(), p, sizeof(T), at);
}

// Lengths in bytes; gaps in bytes in global memory, in 32 bytes in UB.
template <typename T>
inline void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                        const DataCopyPadExtParams<T>& pad, Location at = Location::current()) {
  uint64_t value = 0;
  std::memcpy(&value, &pad.paddingValue, sizeof(T));
  ascendc_emulator::copy_in("DataCopyPad", dst.region(), src.address(),
                            {p.blockCount, p.blockLen, p.srcStride, uint64_t{p.dstStride} * 32},
                            {pad.isPad, pad.leftPadding, pad.rightPadding, sizeof(T), value}, at);
}

template <typename T>
inline void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p,
                        Location at = Location::current()) {
  ascendc_emulator::copy_out("DataCopyPad", dst.address(), src.region(),
                             {p.blockCount, p.blockLen, uint64_t{p.srcStride} * 32, p.dstStride}, at);
}

template <typename T>
inline void InitConstValue(const LocalTensor<T>& dst, const InitConstValueParams<T>& p,
                           Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "16- and 32-bit types only");
  ascendc_emulator::fill(dst.region(), p.repeatTimes, p.blockNum, p.dstGap, &p.initValue, sizeof(T), at);
}

}  // namespace AscendC
