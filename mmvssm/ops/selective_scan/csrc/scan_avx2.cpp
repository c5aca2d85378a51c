// The scan's kernels for AVX2.

#define ONLY_VECTOR_BYTES 32
#include "scan_kernels_unit.h"

#if defined(__x86_64__)
scan_kernels::KernelFunctions scan_kernels::avx2(int64_t dtype, int64_t states) {
  return ::avx2::choose(dtype, states);
}
#endif
