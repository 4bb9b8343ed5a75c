// SPDX-License-Identifier: Apache-2.0
// Operators that pack weights and unpack them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/layout.h"
#include "cpu/pack.h"
#include "cpu/placement.h"
#include "tensors.h"

namespace {

using namespace tensors;

void check_int8_matrix(const Tensor& weight) {
  check_contiguous(weight, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2,
                  "weight: expected int8 [out, in], found ", shape_text(weight));
}

// Whether the rows of `weight` fit into `packed`, a packed form with `block_bytes` per block, from `first_row` on.
void check_rows_fit(const Tensor& packed, int64_t block_bytes, const Tensor& weight, int64_t first_row) {
  check_contiguous(packed, "packed");
  const int64_t blocks = w4a4::block_count(weight.size(1));
  STD_TORCH_CHECK(
      packed.dim() == 3 && packed.element_size() == 1 && packed.size(1) == blocks && packed.size(2) == block_bytes,
      "packed: expected [tiles, ", blocks, ", ", block_bytes, "], found ", shape_text(packed));
  STD_TORCH_CHECK(first_row >= 0 && first_row + weight.size(0) <= packed.size(0) * w4a4::kTileRows, "first_row: rows ",
                  first_row, " to ", first_row + weight.size(0), " do not fit into ", packed.size(0), " tiles");
}

void place_by_touch(Tensor memory) {
  check_contiguous(memory, "memory");
  w4a4::place_by_touch(memory.mutable_data_ptr(), memory.numel() * memory.element_size());
}

void zero_tiles(Tensor packed) {
  check_contiguous(packed, "packed");
  STD_TORCH_CHECK(packed.dim() == 3 && packed.element_size() == 1,
                  "packed: expected bytes [tiles, blocks, bytes of a block], found ", shape_text(packed));
  w4a4::zero_tiles(packed.mutable_data_ptr(), packed.size(0), packed.size(1) * packed.size(2), torch_pool());
}

void pack_int4_rows(Tensor packed, const Tensor& weight, int64_t first_row) {
  check_int8_matrix(weight);
  check_rows_fit(packed, w4a4::kBlockBytes, weight, first_row);
  const auto* values = static_cast<const int8_t*>(weight.const_data_ptr());
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (w4a4::pack_rows(values, rows, columns, first_row, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                      torch_pool())) {
    return;
  }
  const int64_t place = w4a4::find_outside_int4(values, weight.numel());
  STD_TORCH_CHECK(place < 0, "weight: expected int4 values in [-8, 7], found ", static_cast<int>(values[place]),
                  " in row ", place / columns, ", column ", place % columns);
}

void pack_int8_rows(Tensor packed, const Tensor& weight, int64_t first_row) {
  check_int8_matrix(weight);
  check_rows_fit(packed, w4a4::kInt8BlockBytes, weight, first_row);
  w4a4::pack_int8_rows(static_cast<const int8_t*>(weight.const_data_ptr()), weight.size(0), weight.size(1), first_row,
                       static_cast<int8_t*>(packed.mutable_data_ptr()), torch_pool());
}

Tensor unpack_int4(const Tensor& packed, int64_t out_features, int64_t in_features) {
  check_contiguous(packed, "packed");
  const int64_t tiles = w4a4::tile_count(out_features), blocks = w4a4::block_count(in_features);
  STD_TORCH_CHECK(
      packed.dim() == 3 && packed.size(0) == tiles && packed.size(1) == blocks && packed.size(2) == w4a4::kBlockBytes,
      "packed: expected [", tiles, ", ", blocks, ", ", w4a4::kBlockBytes, "] for ", out_features, " x ", in_features,
      ", found ", shape_text(packed));
  Tensor weight = new_tensor(packed, {out_features, in_features}, ScalarType::Char);
  w4a4::unpack_rows(static_cast<const uint8_t*>(packed.const_data_ptr()), out_features, in_features,
                    static_cast<int8_t*>(weight.mutable_data_ptr()));
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_w4a4, m) {
  m.def("place_by_touch_(Tensor(a!) memory) -> ()");
  m.def("zero_tiles_(Tensor(a!) packed) -> ()");
  m.def("pack_int4_rows_(Tensor(a!) packed, Tensor weight, int first_row) -> ()");
  m.def("pack_int8_rows_(Tensor(a!) packed, Tensor weight, int first_row) -> ()");
  m.def("unpack_int4(Tensor packed, int out_features, int in_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4, CPU, m) {
  m.impl("place_by_touch_", TORCH_BOX(&place_by_touch));
  m.impl("zero_tiles_", TORCH_BOX(&zero_tiles));
  m.impl("pack_int4_rows_", TORCH_BOX(&pack_int4_rows));
  m.impl("pack_int8_rows_", TORCH_BOX(&pack_int8_rows));
  m.impl("unpack_int4", TORCH_BOX(&unpack_int4));
}
