// Compiles KERNEL, a header, once per instruction set: as avx512::, avx2:: and baseline::, or for one of them alone if
// ONLY_VECTOR_BYTES is defined. Include it outside any function, in an anonymous namespace, after dtypes.h and the
// standard headers that the kernel needs.

// Vectors wider than the registers that the rest of a file may use never cross a function's border that remains.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__clang__)
#define TARGET(isa) _Pragma(TARGET_TEXT(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET(isa) _Pragma("GCC push_options") _Pragma(TARGET_TEXT(GCC target(isa)))
#define TARGET_END _Pragma("GCC pop_options")
#endif
#define TARGET_TEXT(x) #x

#ifndef ONLY_VECTOR_BYTES
#define ONLY_VECTOR_BYTES 0
#endif

#if defined(__x86_64__) && (ONLY_VECTOR_BYTES == 64 || !ONLY_VECTOR_BYTES)
TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define VECTOR_BYTES 64
#include "simd.h"
#include KERNEL
#undef VECTOR_BYTES
}  // namespace avx512
TARGET_END
#endif

#if defined(__x86_64__) && (ONLY_VECTOR_BYTES == 32 || !ONLY_VECTOR_BYTES)
TARGET("avx2,fma")
namespace avx2 {
#define VECTOR_BYTES 32
#include "simd.h"
#include KERNEL
#undef VECTOR_BYTES
}  // namespace avx2
TARGET_END
#endif

#if ONLY_VECTOR_BYTES == 16 || !ONLY_VECTOR_BYTES
namespace baseline {
#define VECTOR_BYTES 16
#include "simd.h"
#include KERNEL
#undef VECTOR_BYTES
}  // namespace baseline
#endif
