// What scan_cpu.cpp asks of the kernels. scan_avx512.cpp, scan_avx2.cpp and scan_baseline.cpp compile scan_kernel.h for
// one instruction set each: apart, so that they are compiled side by side.

#pragma once

#include "scan.h"

namespace scan_kernels {

constexpr int kTile = 64;  // CHUNK_LENGTH of inputs.py

using Tensor = Scan::Tensor;

struct Task {
  int64_t batch, walk;
  int64_t first_channel, last_channel;  // the last one is excluded
  int64_t start, stop;                  // steps
  int64_t block, stretch;               // which of the channel blocks and of the stretches of steps this is
};

// What the tasks of a backward pass sum up, each in a place of its own, in the accumulation dtype.
struct Partials {
  void *B, *C;                     // (blocks, B, L, K, N)
  void *A, *D, *delta_bias, *rest;  // (stretches, B, K, D, N) and (stretches, B, K, D)
  int64_t row(const Scan& scan, const Task& task, int64_t token) const {
    return ((task.block * scan.batch + task.batch) * scan.length + token) * scan.walks + task.walk;
  }
  int64_t stretch(const Scan& scan, const Task& task) const {
    return (task.stretch * scan.batch + task.batch) * scan.walks * scan.channels;
  }
};

struct KernelFunctions {
  int width;  // channels in a vector
  void (*forward)(const Scan&, const Task&, const void* entry);
  void (*forward_carry)(const Scan&, const Task&, void* end, void* elapsed);
  void (*forward_shared)(const Scan&, const Task&);  // of all walks, which share all but B, order and gap
  void (*backward)(const Scan&, const Task&, const void* adjoint, const Partials&);
  void (*backward_carry)(const Scan&, const Task&, void* adjoint, void* elapsed);
  void (*sum_blocks)(const void* partials, int64_t blocks, int64_t size, int64_t first, int64_t last, void* sums);
};

KernelFunctions avx512(int64_t dtype, int64_t states);  // this and the next on x86-64 only
KernelFunctions avx2(int64_t dtype, int64_t states);
KernelFunctions baseline(int64_t dtype, int64_t states);

}  // namespace scan_kernels
