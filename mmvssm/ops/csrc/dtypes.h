// The types of elements in memory, and the intrinsics that kernels use.

#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum DType : int64_t { kFloat32, kBFloat16, kFloat16, kFloat64 };
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace
