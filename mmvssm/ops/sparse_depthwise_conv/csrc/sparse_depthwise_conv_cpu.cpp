// Depthwise convolution over the kept tokens of a pruned grid, on CPUs.
//
// For each image, token i, channel c and tap t, with j = neighbors[i, t] the token under the tap, -1 for none:
//
//     y[i, c]           = bias[c] + sum over t with j >= 0 of weight[c, t] x[j, c]
//     dL/dweight[c, t]  = sum over i with j >= 0 of dL/dy[i, c] x[j, c]
//
// dL/dx is the first of these again, with dL/dy for x and the taps in reverse (see __init__.py).
//
// The work is divided into tasks: an image, a stretch of its tokens and a block of channels, so narrow that the taps'
// weights stay in the first-level cache. A task copies its channels of the tokens that it reads to a buffer of its
// own: rows of the tensor lie far apart, each in a memory page of its own and all in few sets of the caches. Weight
// gradients are partial sums added in a fixed order, and the division does not depend on the number of threads, so
// that two runs give the same bits.
//
// This file holds the interface, a plain C one for ctypes, and the division into tasks; sparse_depthwise_conv_kernel.h
// is what a task does. Nothing but the standard library and, if the compiler has it, OpenMP is needed.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "../../csrc/dispatch.h"

namespace {

enum Status : int { kOk, kOutOfRange, kOutOfMemory };

// (B, K, C), the last dimension contiguous. Strides count elements.
struct Tensor {
  void* data;
  int64_t batch_stride, token_stride;
};

}  // namespace

// Mirrored by cpu.py, field by field. Anything changed here needs another kInterfaceVersion.
struct SparseConv {
  int64_t batch, kept, channels, taps;
  int64_t dtype, reversed, threads;  // reversed: tap t is weight[c, taps - 1 - t]
  Tensor x, grad_y;
  const int32_t* neighbors;  // (B, K, T), contiguous
  // In the accumulation dtype, contiguous: (C, T) and, perhaps null, (C).
  const void *weight, *bias;
  void* y;            // (B, K, C) in dtype, contiguous
  void* grad_weight;  // (C, T) in the accumulation dtype, contiguous
};

namespace {

constexpr int kInterfaceVersion = 1;

// Which taps of each token have a token under them, and the first and last of those tokens.
struct Presence {
  int64_t words;              // per token
  uint64_t* masks;            // (B, K, words), one bit per tap
  int32_t *lowest, *highest;  // (B, K), both -1 where nothing is present
};

struct Task {
  int64_t batch, first_token, last_token;  // the last one is excluded
  int64_t block;
};

struct KernelFunctions {
  int block;  // channels
  // Notes what is present at tokens first to last of all images. Returns whether all indices are tokens'.
  bool (*note_presence)(const SparseConv&, int64_t first, int64_t last, const Presence&);
  int64_t (*packed_bytes)(const SparseConv&);
  // The weights of one block of channels as the other functions want them: its channels adjacent, the bias at the end.
  void (*pack_weight)(const SparseConv&, int64_t block, void* packed);
  void (*convolve)(const SparseConv&, const Presence&, const Task&, const void* packed_weight);
  // What the tasks, of the same block, sum up to, (T, C): to that block's channels of `partial`.
  void (*weight_gradient)(const SparseConv&, const Presence&, const Task*, int64_t count, void* partial);
};

#define KERNEL "../sparse_depthwise_conv/csrc/sparse_depthwise_conv_kernel.h"  // seen from instruction_sets.h
#include "../../csrc/instruction_sets.h"

KernelFunctions kernel_for(const SparseConv& conv) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return avx512::choose(conv.dtype);
  if (instruction_set == kAvx2) return avx2::choose(conv.dtype);
#endif
  return baseline::choose(conv.dtype);
}

// Images x stretches of tokens x blocks of channels.
struct Division {
  static constexpr int64_t kShortest = 256, kLongest = 2048;  // tokens: the longest still fit a second-level cache
  static constexpr int64_t kEnough = 16;                      // tasks for any number of threads worth the while
  const SparseConv& conv;
  int64_t blocks, stretches, stretch;

  Division(const SparseConv& conv, int block_size) : conv(conv), blocks(ceil_div(conv.channels, block_size)) {
    const int64_t wanted = std::min(ceil_div(kEnough, conv.batch * blocks), ceil_div(conv.kept, kShortest));
    stretches = std::max(wanted, ceil_div(conv.kept, kLongest));
    stretch = ceil_div(ceil_div(conv.kept, stretches), 2) * 2;  // tokens are handled in pairs
    stretches = ceil_div(conv.kept, stretch);
  }

  int64_t pieces() const { return conv.batch * stretches; }

  Task task(int64_t piece, int64_t block) const {
    const int64_t first = piece % stretches * stretch;
    return {piece / stretches, first, std::min(conv.kept, first + stretch), block};
  }
};

class NotedPresence : public Presence {
 public:
  // `count` calls of `beside` are made in the same go: every time that threads wait for each other costs.
  template <class Function>
  NotedPresence(const SparseConv& conv, const KernelFunctions& kernel, int64_t count, const Function& beside) {
    constexpr int64_t kGrain = 256;
    const int64_t tokens = conv.batch * conv.kept, grains = ceil_div(tokens, kGrain);
    words = ceil_div(conv.taps, 64);
    masks_.resize(tokens * words), lowest_.resize(tokens), highest_.resize(tokens), in_range_.resize(grains);
    masks = masks_.data(), lowest = lowest_.data(), highest = highest_.data();
    parallel_for(grains + count, conv.threads, [&](int64_t i) {
      if (i < grains)
        in_range_[i] = kernel.note_presence(conv, i * kGrain, std::min(tokens, (i + 1) * kGrain), *this);
      else
        beside(i - grains);
    });
  }
  bool all_in_range() const {
    return std::all_of(in_range_.begin(), in_range_.end(), [](char yes) { return yes; });
  }

 private:
  std::vector<uint64_t> masks_;
  std::vector<int32_t> lowest_, highest_;
  std::vector<char> in_range_;
};

Status convolve(const SparseConv& conv) {
  const KernelFunctions kernel = kernel_for(conv);
  const Division division(conv, kernel.block);
  constexpr int64_t kCacheLine = 64;
  const int64_t bytes = kernel.packed_bytes(conv);
  std::vector<char> storage(division.blocks * bytes + kCacheLine);
  char* const packed = (char*)(ceil_div((int64_t)storage.data(), kCacheLine) * kCacheLine);
  const NotedPresence presence(conv, kernel, division.blocks,
                               [&](int64_t block) { kernel.pack_weight(conv, block, packed + block * bytes); });
  if (!presence.all_in_range()) return kOutOfRange;

  parallel_for(division.pieces() * division.blocks, conv.threads, [&](int64_t i) {
    const Task task = division.task(i / division.blocks, i % division.blocks);
    kernel.convolve(conv, presence, task, packed + task.block * bytes);
  });
  return kOk;
}

template <class T>
Status weight_gradient(const SparseConv& conv) {
  const KernelFunctions kernel = kernel_for(conv);
  const NotedPresence presence(conv, kernel, 0, [](int64_t) {});
  if (!presence.all_in_range()) return kOutOfRange;

  // Pieces in groups, of which each leaves one partial sum: of many small images there would be too many.
  const Division division(conv, kernel.block);
  const int64_t groups = std::min(division.pieces(), std::max<int64_t>(4, ceil_div(64, division.blocks)));
  const int64_t size = conv.taps * conv.channels;
  const std::unique_ptr<T[]> partials(new T[groups * size]);  // all of it is written
  parallel_for(groups * division.blocks, conv.threads, [&](int64_t i) {
    const int64_t group = i / division.blocks, block = i % division.blocks;
    std::vector<Task> tasks;
    for (int64_t piece = group * division.pieces() / groups; piece < (group + 1) * division.pieces() / groups; ++piece)
      tasks.push_back(division.task(piece, block));
    kernel.weight_gradient(conv, presence, tasks.data(), (int64_t)tasks.size(), partials.get() + group * size);
  });
  parallel_for(division.blocks, conv.threads, [&](int64_t block) {
    const int64_t first = block * kernel.block, last = std::min(conv.channels, first + kernel.block);
    for (int64_t c = first; c < last; ++c)
      for (int64_t t = 0; t < conv.taps; ++t) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += partials[group * size + t * conv.channels + c];
        ((T*)conv.grad_weight)[c * conv.taps + t] = (T)sum;
      }
  });
  return kOk;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Interface
// ---------------------------------------------------------------------------------------------------------------------

extern "C" {

int sparse_depthwise_conv_interface_version() { return kInterfaceVersion; }

int64_t sparse_depthwise_conv_interface_size() { return sizeof(SparseConv); }

// Restricts the instruction set (0 baseline, 1 AVX2, 2 AVX-512), for tests; returns the one now in use.
int sparse_depthwise_conv_limit_instruction_set(int limit) { return limit_instruction_set(limit); }

int sparse_depthwise_conv_convolve(const SparseConv* conv) {
  return status_or(kOutOfMemory, [&] { return convolve(*conv); });
}

int sparse_depthwise_conv_weight_gradient(const SparseConv* conv) {
  return status_or(kOutOfMemory, [&] {
    return conv->dtype == kFloat64 ? weight_gradient<double>(*conv) : weight_gradient<float>(*conv);
  });
}

}  // extern "C"
