// The scan's kernels for what every processor of its kind has.

#define ONLY_VECTOR_BYTES 16
#include "scan_kernels_unit.h"

scan_kernels::KernelFunctions scan_kernels::baseline(int64_t dtype, int64_t states) {
  return ::baseline::choose(dtype, states);
}
