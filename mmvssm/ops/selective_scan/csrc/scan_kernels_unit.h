// What scan_avx512.cpp and its like have in common.

#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "../../csrc/dtypes.h"
#include "scan_kernels.h"

namespace {

using namespace scan_kernels;

#define KERNEL "../selective_scan/csrc/scan_kernel.h"  // seen from instruction_sets.h
#include "../../csrc/instruction_sets.h"

}  // namespace
