// SPDX-License-Identifier: Apache-2.0
// Tensors, buffers and the pipe object that hands buffers out.
#pragma once

#include <cstring>
#include <type_traits>

#include "../machine/instruction.h"
#include "../machine/running_core.h"
#include "parameters.h"

namespace ascendc_emulator {

template <typename T>
inline constexpr bool kIsInt4 = std::is_same_v<T, AscendC::int4b_t>;
// Elements in 32 bytes, and bytes that elements take.
template <typename T>
inline constexpr uint32_t kBlockElements = kIsInt4<T> ? 64 : 32 / sizeof(T);
template <typename T>
constexpr uint64_t bytes_of(uint64_t elements) {
  return kIsInt4<T> ? elements / 2 : elements * sizeof(T);
}

constexpr Memory memory_of(AscendC::TPosition position) {
  switch (position) {
    case AscendC::TPosition::A1:
    case AscendC::TPosition::B1:
    case AscendC::TPosition::C1:
      return Memory::kL1;
    case AscendC::TPosition::A2:
      return Memory::kL0a;
    case AscendC::TPosition::B2:
      return Memory::kL0b;
    case AscendC::TPosition::CO1:
      return Memory::kL0c;
    default:
      return Memory::kUb;
  }
}

}  // namespace ascendc_emulator

namespace AscendC {

using ascendc_emulator::Location;

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  explicit LocalTensor(const ascendc_emulator::Region& region) : region_(region) {}

  LocalTensor operator[](uint32_t offset) const {
    return LocalTensor({region_.memory, region_.begin + ascendc_emulator::bytes_of<T>(offset), region_.end});
  }
  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(region_);
  }
  uint32_t GetSize() const {
    return static_cast<uint32_t>((region_.end - region_.begin) / ascendc_emulator::bytes_of<T>(2) * 2);
  }

  T GetValue(uint32_t index, Location at = Location::current()) const {
    ascendc_emulator::Instruction read(ascendc_emulator::Pipe::kS, "GetValue", at);
    T value;
    const uint64_t from = region_.begin + ascendc_emulator::bytes_of<T>(index);
    std::memcpy(&value, read.Read(region_.memory, from, sizeof(T), region_.end), sizeof(T));
    return value;
  }
  void SetValue(uint32_t index, T value, Location at = Location::current()) const {
    ascendc_emulator::Instruction write(ascendc_emulator::Pipe::kS, "SetValue", at);
    const uint64_t to = region_.begin + ascendc_emulator::bytes_of<T>(index);
    std::memcpy(write.Write(region_.memory, to, sizeof(T), region_.end), &value, sizeof(T));
  }

  const ascendc_emulator::Region& region() const { return region_; }

 private:
  ascendc_emulator::Region region_;
};

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;
  void SetGlobalBuffer(__gm__ T* buffer) { data_ = buffer; }
  void SetGlobalBuffer(__gm__ T* buffer, uint64_t) { data_ = buffer; }
  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor tensor;
    tensor.data_ = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(data_) + ascendc_emulator::bytes_of<T>(offset));
    return tensor;
  }
  // Scalar accesses go through the scalar unit's data cache, which nothing keeps coherent: read inputs only.
  T GetValue(uint64_t index, Location at = Location::current()) const {
    ascendc_emulator::Instruction read(ascendc_emulator::Pipe::kS, "GetValue", at);
    T value;
    std::memcpy(&value, read.ReadGlobal((*this)[index].data_, sizeof(T)), sizeof(T));
    return value;
  }
  void SetL2CacheHint(CacheMode) {}
  const T* GetPhyAddr() const { return data_; }
  uint8_t* address() const { return reinterpret_cast<uint8_t*>(data_); }

 private:
  T* data_ = nullptr;
};

template <TPosition kPosition = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() const {
    return LocalTensor<T>(region_);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t elements) const {
    return LocalTensor<T>({region_.memory, region_.begin, region_.begin + ascendc_emulator::bytes_of<T>(elements)});
  }

 private:
  friend class TPipe;
  ascendc_emulator::Region region_;
};

// On an AIC the public header's TPipe sets the flags M_MTE1 0, 1 and 2 when it is constructed and waits for them when
// it is destroyed: a kernel must use others.
class TPipe {
 public:
  explicit TPipe(Location at = Location::current());
  ~TPipe();
  TPipe(const TPipe&) = delete;

  template <TPosition kPosition>
  bool InitBuffer(TBuf<kPosition>& buffer, uint32_t bytes, Location at = Location::current()) {
    constexpr ascendc_emulator::Memory kMemory = ascendc_emulator::memory_of(kPosition);
    const uint32_t begin = ascendc_emulator::allocate(kMemory, bytes, at);
    buffer.region_ = {kMemory, begin, uint64_t{begin} + bytes};
    return true;
  }

 private:
  Location at_;
};

}  // namespace AscendC
