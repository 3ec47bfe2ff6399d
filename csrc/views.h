// Feature maps as kernels see them: an address, sizes and strides. Shared by all kernels and by their bindings.
// Nothing here knows PyTorch.
#pragma once

#include <cstdint>

namespace ela {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

// Of kernels that read or write the values of a history: layers and values of one dtype, by its code, or layers in
// float32 whose values are held in half the bytes.
enum class ValueType : int { kBFloat16 = kDTypes, kFloat16 = kDTypes + 1 };
constexpr int kValueTypes = kDTypes + 2;
inline int layer_dtype(int value_type) { return value_type < kDTypes ? value_type : static_cast<int>(DType::kFloat32); }

// The part of a batch that a kernel works on: `count` samples from `first`, or as many of the heads or channels of
// planar maps, `each` to a sample and numbered through the batch. All of it unless a count is given. Whole layers are
// computed part by part, so that what one kernel writes is still in cache when the next reads it.
struct Part {
  int64_t first = 0, count = -1, each = 1;
};

// B x C x N elements. Planar: the N positions of a channel are contiguous. Interleaved: the C channels of a
// position are. All strides are in elements.
struct Shape {
  int64_t batch, channels, heads, positions;
  bool interleaved;
  Part part = {};
  int64_t head_dim() const { return channels / heads; }
};

// A feature map; `inner` is the channel stride (planar) or the position stride (interleaved).
struct MapView {
  void* data;
  int64_t batch, inner;
};

// Feature maps as images: B x C x H x W.
struct ImageShape {
  int64_t batch, channels, height, width;
  bool interleaved;
  Part part = {};
  int64_t positions() const { return height * width; }
};

}  // namespace ela
