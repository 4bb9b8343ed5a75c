// SPDX-License-Identifier: Apache-2.0
#include "ascendc_emulator/api/data_copy.h"

#include <algorithm>
#include <cstring>

namespace ascendc_emulator {
namespace {

constexpr uint32_t kMaxBlocks = 4095;
constexpr uint32_t kMaxBlockBytes = 2097151;

}  // namespace

void copy_in(const char* name, const Region& target, const uint8_t* source, const Blocks& blocks,
             const Padding& padding, const Location& at) {
  Instruction in(Pipe::kMte2, name, at);
  in.Check(target.memory == Memory::kUb || target.memory == Memory::kL1, Detector::kParameter,
           "the target must be in UB or L1");
  if (!in.Check(
          blocks.count >= 1 && blocks.count <= kMaxBlocks && blocks.length >= 1 && blocks.length <= kMaxBlockBytes,
          Detector::kParameter, "blockCount must be in [1, 4095], blockLen in [1, 2097151] bytes")) {
    return;
  }
  in.Check(target.begin % 32 == 0, Detector::kAlignment, "the target must be 32-byte aligned");
  in.Check(padding.left * padding.element <= 32 && padding.right * padding.element <= 32, Detector::kParameter,
           "padding is at most 32 bytes on each side");
  const uint64_t left = padding.is_on ? padding.left * padding.element : 0;
  const uint64_t right = padding.is_on ? padding.right * padding.element : 0;
  const uint64_t used = left + blocks.length + right;
  const uint64_t rounded = (used + 31) / 32 * 32;
  uint64_t to = target.begin;
  const uint8_t* from = source;
  for (uint32_t i = 0; i < blocks.count; ++i) {
    const uint8_t* values = in.ReadGlobal(from, blocks.length);
    uint8_t* written = in.Write(target.memory, to, rounded, target.end);
    if (in.is_full()) {
      for (uint64_t byte = 0; byte < left; ++byte) {
        written[byte] = static_cast<uint8_t>(padding.value >> byte % padding.element * 8);
      }
      std::memcpy(written + left, values, blocks.length);
      for (uint64_t byte = 0; byte < right; ++byte) {
        written[left + blocks.length + byte] = static_cast<uint8_t>(padding.value >> byte % padding.element * 8);
      }
      if (used < rounded) {
        if (uint8_t* valid = in.Validity(target.memory, to + used, rounded - used)) {
          std::memset(valid, 0, rounded - used);
        }
      }
    }
    to += rounded + blocks.target_gap;
    from += blocks.length + blocks.source_gap;
  }
  in.Transfer(target.memory == Memory::kL1 ? Path::kGmToL1 : Path::kGmToUb, uint64_t{blocks.count} * blocks.length);
}

void copy_out(const char* name, uint8_t* target, const Region& source, const Blocks& blocks, const Location& at) {
  Instruction out(Pipe::kMte3, name, at);
  out.Check(source.memory == Memory::kUb, Detector::kParameter, "the source must be in UB");
  if (!out.Check(
          blocks.count >= 1 && blocks.count <= kMaxBlocks && blocks.length >= 1 && blocks.length <= kMaxBlockBytes,
          Detector::kParameter, "blockCount must be in [1, 4095], blockLen in [1, 2097151] bytes")) {
    return;
  }
  out.Check(source.begin % 32 == 0, Detector::kAlignment, "the source must be 32-byte aligned");
  const uint64_t rounded = (uint64_t{blocks.length} + 31) / 32 * 32;
  uint64_t from = source.begin;
  uint8_t* to = target;
  for (uint32_t i = 0; i < blocks.count; ++i) {
    const uint8_t* values = out.Read(source.memory, from, blocks.length, source.end);
    uint8_t* written = out.WriteGlobal(to, blocks.length);
    if (out.is_full()) std::memcpy(written, values, blocks.length);
    from += rounded + blocks.source_gap;
    to += blocks.length + blocks.target_gap;
  }
  out.Transfer(Path::kUbToGm, uint64_t{blocks.count} * blocks.length);
}

void copy_nd_to_nz(const Region& target, const uint8_t* source, const AscendC::Nd2NzParams& p, uint32_t element,
                   const Location& at) {
  Instruction in(Pipe::kMte2, "DataCopy ND2NZ", at);
  const uint32_t matrices = p.ndNum, rows = p.nValue, columns = p.dValue;
  in.Check(target.memory == Memory::kL1 || target.memory == Memory::kUb, Detector::kParameter,
           "the target must be in L1 or UB");
  in.Check(matrices <= 4095 && rows <= 16384 && columns <= 65535, Detector::kParameter,
           "ndNum must be in [0, 4095], nValue in [0, 16384], dValue in [0, 65535]");
  if (matrices == 0 || rows == 0 || columns == 0) return;
  const uint32_t c0_stride = p.dstNzC0Stride, n_stride = p.dstNzNStride, source_row = p.srcDValue;
  in.Check(source_row >= 1 && c0_stride >= 1 && c0_stride <= 16384 && n_stride >= 1 && n_stride <= 16384,
           Detector::kParameter, "srcDValue must be at least 1, dstNzC0Stride and dstNzNStride in [1, 16384]");
  in.Check(target.begin % 32 == 0, Detector::kAlignment, "the target must be 32-byte aligned");
  const uint64_t row_bytes = uint64_t{columns} * element;
  for (uint32_t matrix = 0; matrix < matrices; ++matrix) {
    const uint8_t* from = source + uint64_t{matrix} * p.srcNdMatrixStride * element;
    const uint64_t to = target.begin + uint64_t{matrix} * p.dstNzMatrixStride * element;
    for (uint32_t row = 0; row < rows; ++row) {
      const uint8_t* values = in.ReadGlobal(from + uint64_t{row} * source_row * element, row_bytes);
      for (uint64_t column = 0; column * 32 < row_bytes; ++column) {
        const uint64_t at_byte = to + (column * c0_stride + uint64_t{row} * n_stride) * 32;
        uint8_t* written = in.Write(target.memory, at_byte, 32, target.end);
        if (!in.is_full()) continue;
        const uint64_t count = std::min<uint64_t>(32, row_bytes - column * 32);
        std::memcpy(written, values + column * 32, count);
        std::memset(written + count, 0, 32 - count);
      }
    }
  }
  in.Transfer(target.memory == Memory::kL1 ? Path::kGmToL1 : Path::kGmToUb, uint64_t{matrices} * rows * row_bytes);
}

void fill(const Region& target, uint32_t repeats, uint32_t blocks, uint32_t gap, const void* value, uint32_t element,
          const Location& at) {
  const bool is_l1 = target.memory == Memory::kL1;
  Instruction set(is_l1 ? Pipe::kMte2 : Pipe::kMte1, "InitConstValue", at);
  set.Check(target.memory == Memory::kL1 || target.memory == Memory::kL0a || target.memory == Memory::kL0b,
            Detector::kParameter, "the target must be in L1, L0A or L0B");
  set.Check(repeats <= 32767 && blocks <= 32767 && gap <= 32767, Detector::kParameter,
            "repeatTimes, blockNum and dstGap must be at most 32767");
  const uint64_t unit = is_l1 ? 32 : 512;
  set.Check(target.begin % unit == 0, Detector::kAlignment,
            is_l1 ? "the target must be 32-byte aligned" : "the target must be 512-byte aligned");
  uint64_t to = target.begin;
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    uint8_t* written = set.Write(target.memory, to, blocks * unit, target.end);
    if (set.is_full()) {
      for (uint64_t byte = 0; byte < blocks * unit; byte += element) std::memcpy(written + byte, value, element);
    }
    to += (uint64_t{blocks} + gap) * unit;
  }
  set.Transfer(is_l1 ? Path::kGmToL1 : Path::kL1ToL0a, uint64_t{repeats} * blocks * unit);
}

}  // namespace ascendc_emulator
