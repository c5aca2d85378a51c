// Depthwise 3x3 convolution and activation of channels-last maps, with gradients, on CPUs.
//
// For each image, pixel and channel, with x zero outside the image:
//
//     z[j, p]            = bias + sum over r, c of weight[r, c] x[j - above + r, p - 1 + c]
//     y                  = activation(z)
//     g                  = dL/dy activation'(z)
//     dL/dx[i, p]        = sum over r, c of weight[r, c] g[i + above - r, p + 1 - c]
//     dL/dweight[r, c]   = sum over i, p of x[i, p] g[i + above - r, p + 1 - c]
//     dL/dbias           = sum of g
//
// Both sums over g read the same values. z is computed again in the backward pass, which so reads and writes each map
// once, and nothing but x has to be stored for it.
//
// The work is divided into tasks: an image, a stretch of its rows and a block of channels. Weight gradients are partial
// sums added in a fixed order, and the division does not depend on the number of threads, so that two runs give the
// same bits.
//
// This file holds the interface, a plain C one for ctypes, and the division into tasks; conv_act_kernel.h is what a
// task does. Nothing but the standard library and, if the compiler has it, OpenMP is needed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "../../csrc/dispatch.h"

namespace {

enum Status : int { kOk, kOutOfMemory };
enum Activation : int { kIdentity, kSilu, kGelu };

// (B, rows, W, C), the last dimension contiguous. Strides count elements.
struct Map {
  const void* data;
  int64_t batch_stride, row_stride, pixel_stride;
};

}  // namespace

// Mirrored by cpu.py, field by field. Anything changed here needs another kInterfaceVersion.
struct ConvAct {
  int64_t batch, height, width, channels;  // of the output; the input has height + 2 - above - below rows
  int64_t above, below;                    // rows of zeros above and below the input, 0 or 1; beside it, one column
  int64_t dtype, activation, threads;
  Map x, grad_y;
  const float *weight, *bias;  // (C, 9), and (C,) or null
  void* y;                     // (B, H, W, C), contiguous; null if a backward pass need not write it
  void* grad_x;                // as x, contiguous
  float* grad_parameters;      // (C, 10): of the weights, and of the bias
};

namespace {

constexpr int kInterfaceVersion = 1;

int64_t input_rows(const ConvAct& conv) { return conv.height + 2 - conv.above - conv.below; }

struct Task {
  int64_t batch, first_row, last_row;  // the last one is excluded
  int64_t block;
};

struct KernelFunctions {
  int block;  // channels
  void (*forward)(const ConvAct&, const Task&);
  void (*backward)(const ConvAct&, const Task&, float* partial);
};

#define KERNEL "../conv_act/csrc/conv_act_kernel.h"  // seen from instruction_sets.h
#include "../../csrc/instruction_sets.h"

KernelFunctions kernel_for(const ConvAct& conv) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return avx512::choose(conv.dtype, conv.activation);
  if (instruction_set == kAvx2) return avx2::choose(conv.dtype, conv.activation);
#endif
  return baseline::choose(conv.dtype, conv.activation);
}

// Images x stretches of rows x blocks of channels.
struct Division {
  static constexpr int64_t kShortest = 8;  // rows: a task computes two of its neighbours' once more
  static constexpr int64_t kEnough = 16;   // tasks for any number of threads worth the while
  int64_t rows, blocks, stretch, stretches, pieces;

  Division(const ConvAct& conv, int64_t rows, int block) : rows(rows), blocks(ceil_div(conv.channels, block)) {
    stretches = std::min(ceil_div(kEnough, conv.batch * blocks), ceil_div(rows, kShortest));
    stretch = ceil_div(rows, stretches);
    stretches = ceil_div(rows, stretch);
    pieces = conv.batch * stretches;
  }

  // Tasks of the same rows follow each other: their pixels share pages.
  Task task(int64_t i) const {
    const int64_t piece = i / blocks, first = piece % stretches * stretch;
    return {piece / stretches, first, std::min(rows, first + stretch), i % blocks};
  }
};

Status forward(const ConvAct& conv) {
  const KernelFunctions kernel = kernel_for(conv);
  const Division division(conv, conv.height, kernel.block);
  parallel_for(division.pieces * division.blocks, conv.threads,
               [&](int64_t i) { kernel.forward(conv, division.task(i)); });
  return kOk;
}

Status backward(const ConvAct& conv) {
  const KernelFunctions kernel = kernel_for(conv);
  const Division division(conv, input_rows(conv), kernel.block);
  const int64_t size = 10 * conv.channels;
  const std::unique_ptr<float[]> partials(new float[division.pieces * size]);  // all of it is written
  parallel_for(division.pieces * division.blocks, conv.threads, [&](int64_t i) {
    kernel.backward(conv, division.task(i), partials.get() + i / division.blocks * size);
  });
  for (int64_t c = 0; c < conv.channels; ++c)
    for (int64_t t = 0; t < 10; ++t) {
      double sum = 0;
      for (int64_t piece = 0; piece < division.pieces; ++piece) sum += partials[piece * size + t * conv.channels + c];
      conv.grad_parameters[c * 10 + t] = (float)sum;
    }
  return kOk;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Interface
// ---------------------------------------------------------------------------------------------------------------------

extern "C" {

int conv_act_interface_version() { return kInterfaceVersion; }

int64_t conv_act_interface_size() { return sizeof(ConvAct); }

// Restricts the instruction set (0 baseline, 1 AVX2, 2 AVX-512), for tests; returns the one now in use.
int conv_act_limit_instruction_set(int limit) { return limit_instruction_set(limit); }

int conv_act_forward(const ConvAct* conv) {
  return status_or(kOutOfMemory, [&] { return forward(*conv); });
}

int conv_act_backward(const ConvAct* conv) {
  return status_or(kOutOfMemory, [&] { return backward(*conv); });
}

}  // extern "C"
