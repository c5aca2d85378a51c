// What a caller of the selective scan fills in: see scan_cpu.cpp for its meaning.

#pragma once

#include <cstdint>

// Mirrored by cpu.py, field by field. Anything changed here needs another kInterfaceVersion.
struct Scan {
  // (B, L, K, D) or (B, L, K, N), the last dimension contiguous. Strides count elements.
  struct Tensor {
    void* data;
    int64_t batch_stride, token_stride, walk_stride;
  };

  // int32 (K, L), shared by the images if the batch stride is 0, or (B, K, L), or null.
  struct Index {
    const int32_t* data;
    int64_t batch_stride, walk_stride;
    const int32_t* walk(int64_t batch, int64_t k) const {
      return data ? data + batch * batch_stride + k * walk_stride : nullptr;
    }
  };

  // Threads of the caller's: run(pool, count, function, argument) calls function(argument, i) for i from 0 to count - 1
  // and returns when all calls have. Without one, run being null, OpenMP's are taken, as many as `threads` says.
  struct Pool {
    void (*run)(void* pool, int64_t count, void (*function)(void* argument, int64_t i), void* argument);
    void* pool;
  };

  // What an output holds: rows of each walk (B, L, K, D) in dtype; their sums (B, L, D) in the accumulation dtype, zero
  // at first, as walks add to them; or the terms of these (B, L, K, D), which the library alone uses.
  enum Sum : int64_t { kPerWalk, kSums, kTerms };

  int64_t batch, length, walks, channels, states;
  int64_t dtype, softplus, threads;
  int64_t shared;  // whether the walks differ in nothing but B, order and gap
  Sum sum_y, sum_grad_u, sum_grad_delta;
  Tensor u, delta, B, C, grad_y;
  Index order, source, gap;
  // The following are contiguous. In the accumulation dtype: (K, D, N) and (K, D); all but A may be null.
  const void *A, *D, *delta_bias, *rest;
  // (B, L, K, D) in dtype, (B, K, S, D, N) in the accumulation dtype; the latter may be null where no gradient is asked
  // for.
  void *y, *saved_states;
  // In dtype, the shapes of u, delta, B and C; in the accumulation dtype, those of A, D, delta_bias and rest. For y and
  // the gradients of u and delta see Sum.
  void *grad_u, *grad_delta, *grad_B, *grad_C, *grad_A, *grad_D, *grad_delta_bias, *grad_rest;
  Pool pool;
};

enum Status : int { kOk, kOutOfRange, kNotAPermutation, kOutOfMemory };
constexpr int kInSource = 16;  // added to the status if the index at fault is `source`

extern "C" {
int scan_forward(const Scan* scan);
int scan_backward(const Scan* scan);
}
