// The scan's kernels for AVX-512.

#define ONLY_VECTOR_BYTES 64
#include "scan_kernels_unit.h"

#if defined(__x86_64__)
scan_kernels::KernelFunctions scan_kernels::avx512(int64_t dtype, int64_t states) {
  return ::avx512::choose(dtype, states);
}
#endif
