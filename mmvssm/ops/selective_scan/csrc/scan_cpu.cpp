// The selective scan on CPUs, forward and backward.
//
// For each image, walk k and channel d, with i = order[t] and j = source[t] the tokens of step t and N states n:
//
//     step_t    = softplus(delta[j, d] + delta_bias[d])
//     elapsed_t = step_t + gap_t rest[d]
//     h_t[n]    = exp(elapsed_t A[d, n]) h_{t-1}[n] + step_t u[i, d] B[j, n]            h_{-1} = 0
//     y[i, d]   = sum_n C[j, n] h_t[n] + D[d] u[i, d]
//
// and backwards, with g_t = dL/dh_t and dy = dL/dy[i, d]:
//
//     g_t[n]       = C[j, n] dy + exp(elapsed_{t+1} A[d, n]) g_{t+1}[n]                 g_L = 0
//     x_t[n]       = g_t[n] h_{t-1}[n] exp(elapsed_t A[d, n])
//     dL/delapsed  = sum_n x_t[n] A[d, n]              dL/dA[d, n] = sum_t x_t[n] elapsed_t
//     dL/dstep     = dL/delapsed + u sum_n g_t[n] B[j, n]
//     dL/du        = D dy + step_t sum_n g_t[n] B[j, n]
//     dL/dB[j, n]  = sum_d g_t[n] step_t u             dL/dC[j, n] = sum_d dy h_t[n]
//
// The work is divided into tasks: an image, a walk, some of its channels and, where those are too few for the
// threads, a stretch of its steps. Where the walks share all but B, order and gap, a task of the forward pass takes all
// of them, so as to compute exp(step_t A) only once. Where an output is a sum over the walks, a task takes one walk
// after the other, and they add to it while it is in the cache. Sums over channels, walks and stretches are made of
// partial sums added in a fixed order, so that two runs give the same bits. The forward pass saves the state before
// every kTile-th step, from which the backward pass computes the others again.
//
// This file holds the interface, a plain C one for ctypes and for scan_onnxruntime.cpp, and the division into tasks;
// scan_kernel.h is what a task does, compiled for each instruction set by a file of its own. Nothing but the standard
// library and, if the compiler has it, OpenMP is needed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../../csrc/dispatch.h"
#include "scan_kernels.h"

namespace {

using scan_kernels::KernelFunctions;
using scan_kernels::kTile;
using scan_kernels::Partials;
using scan_kernels::Task;

constexpr int kInterfaceVersion = 4;
using Index = Scan::Index;

KernelFunctions kernel_for(const Scan& scan) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return scan_kernels::avx512(scan.dtype, scan.states);
  if (instruction_set == kAvx2) return scan_kernels::avx2(scan.dtype, scan.states);
#endif
  return scan_kernels::baseline(scan.dtype, scan.states);
}

template <class Function>
void parallel_for(int64_t count, const Scan& scan, const Function& function) {
  if (!scan.pool.run) return parallel_for(count, scan.threads, function);
  std::atomic<bool> failed{false};
  const auto task = [&](int64_t i) { note_failure(failed, function, i); };
  const auto call = [](void* argument, int64_t i) { (*(const decltype(task)*)argument)(i); };
  scan.pool.run(scan.pool.pool, count, call, (void*)&task);
  if (failed) throw std::bad_alloc();
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks
// ---------------------------------------------------------------------------------------------------------------------

// Every index must be a token's. Where something is written at those tokens, each must occur once per walk: a token
// that is left out would be left uninitialised, and one that occurs twice would be written by two threads.
Status check_walk(const int32_t* tokens, int64_t length, bool permutation) {
  bool in_range = true;
  for (int64_t t = 0; t < length; ++t) in_range &= tokens[t] >= 0 && tokens[t] < length;
  if (!in_range) return kOutOfRange;
  if (!permutation) return kOk;
  std::vector<char> seen(length, 0);
  for (int64_t t = 0; t < length; ++t) seen[tokens[t]] = 1;
  return std::memchr(seen.data(), 0, length) ? kNotAPermutation : kOk;
}

Status check(const Index& index, const Scan& scan, bool permutation) {
  if (!index.data) return kOk;
  const int64_t images = index.batch_stride ? scan.batch : 1, count = images * scan.walks;
  std::vector<Status> status(count);
  const auto check_one = [&](int64_t i) {
    status[i] = check_walk(index.walk(i / scan.walks, i % scan.walks), scan.length, permutation);
  };
  count * scan.length < 1 << 15 ? parallel_for(count, 1, check_one) : parallel_for(count, scan, check_one);
  return *std::max_element(status.begin(), status.end());
}

// ---------------------------------------------------------------------------------------------------------------------
// Division of the work
// ---------------------------------------------------------------------------------------------------------------------

// Images x walks x blocks of channels x stretches of steps; one walk stands for all if tasks take all of them, at once
// or in turn.
struct Division {
  const Scan& scan;
  int64_t walks;
  int64_t block;    // channels
  int64_t stretch;  // steps, a multiple of kTile
  int64_t blocks, stretches;

  Division(const Scan& scan, int64_t walks, int64_t block, int64_t stretch)
      : scan(scan),
        walks(walks),
        block(block),
        stretch(stretch),
        blocks(ceil_div(scan.channels, block)),
        stretches(ceil_div(scan.length, stretch)) {}

  int64_t tasks() const { return scan.batch * walks * blocks * stretches; }

  Task task(int64_t i) const {
    Task task;
    task.block = i % blocks, i /= blocks;
    task.walk = i % walks, i /= walks;
    task.stretch = i % stretches, i /= stretches;
    task.batch = i;
    task.first_channel = task.block * block;
    task.last_channel = std::min(scan.channels, task.first_channel + block);
    task.start = task.stretch * stretch;
    task.stop = std::min(scan.length, task.start + stretch);
    return task;
  }

  // Calls function(task) for each walk that task i takes in turn.
  template <class Function>
  void for_each_walk(int64_t i, const Function& function) const {
    Task task = this->task(i);
    for (int64_t k = walks; k <= scan.walks; k += walks, ++task.walk) function(task);
  }
};

// Steps per task. Stretches cost a pass of their own over the input, so they are used only where images, walks and
// vectors of channels leave most threads without work. How many a pool of the caller's has is not known; without
// stretches the result is the same to the bit whatever their number.
int64_t stretch_for(const Scan& scan, int64_t tasks, int64_t worth) {
  const int64_t tiles = ceil_div(scan.length, kTile);
  if (scan.pool.run || scan.threads < worth * tasks || tiles < 8) return tiles * kTile;
  const int64_t stretches = std::min(ceil_div(scan.threads, tasks), tiles / 4);
  return ceil_div(tiles, stretches) * kTile;
}

// Whether tasks of the forward pass take all walks of an image at once. With one state, time goes into memory accesses;
// with fewer vectors of channels than threads, some threads would have nothing to do. That is accepted where walks are
// added up, since the order in which they meet a token must not depend on the threads.
bool walks_run_together(const Scan& scan, int width) {
  return scan.shared && scan.walks > 1 && scan.states > 1 &&
         (scan.sum_y || scan.batch * ceil_div(scan.channels, width) >= scan.threads);
}

// As few blocks, of this many channels, as keep all threads equally busy: long rows are read faster than short ones.
int64_t block_for(const Scan& scan, int64_t walks, int width) {
  const int64_t vectors = ceil_div(scan.channels, width);
  int64_t best_blocks = 1, least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= vectors; ++blocks) {
    const int64_t time = ceil_div(walks * blocks, scan.threads) * ceil_div(vectors, blocks);
    if (time < least) least = time, best_blocks = blocks;
  }
  return ceil_div(vectors, best_blocks) * width;
}

Division divide_forward(const Scan& scan, int width) {
  const int64_t walks = scan.batch * scan.walks, block = block_for(scan, walks, width);
  return Division(scan, scan.walks, block, stretch_for(scan, walks * ceil_div(scan.channels, block), 3));
}

// Tasks that take all walks.
Division divide_images(const Scan& scan, int64_t block) {
  return Division(scan, 1, block, ceil_div(scan.length, kTile) * kTile);
}

// Blocks depend on the shapes alone, and so do the sums over channels, whatever the number of threads. There are
// enough of them for some threads; none is so large that its tape leaves the second-level cache, and the partial sums
// for B and C stay smaller than u.
Division divide_backward(const Scan& scan, int width) {
  const int64_t walks = scan.batch * scan.walks, vectors = ceil_div(scan.channels, width);
  const int64_t wanted = std::max(ceil_div(8, walks), ceil_div(vectors, 16));
  const int64_t most = std::max<int64_t>(1, std::min(vectors, scan.channels / (2 * scan.states)));
  const int64_t block = ceil_div(vectors, std::min(wanted, most)) * width;
  return Division(scan, scan.walks, block, stretch_for(scan, walks * ceil_div(scan.channels, block), 2));
}

// What the stretches hand to each other: the state at their ends, or the gradient at their beginnings.
template <class T>
struct Carry {
  const Division& division;
  int64_t channels, states;
  std::vector<T> state, elapsed;  // (B, K, stretches, D, N) and (B, K, stretches, D)

  explicit Carry(const Division& division)
      : division(division), channels(division.scan.channels), states(division.scan.states) {
    const int64_t walks = division.scan.batch * division.scan.walks;
    state.resize(walks * division.stretches * channels * states);
    elapsed.resize(walks * division.stretches * channels);
  }

  int64_t place(const Task& task) const {
    return (task.batch * division.scan.walks + task.walk) * division.stretches + task.stretch;
  }
  T* state_of(const Task& task) { return state.data() + place(task) * channels * states; }
  T* elapsed_of(const Task& task) { return elapsed.data() + place(task) * channels; }

  // Replaces each stretch's own contribution by what enters it. `direction` is 1 if stretches follow each other, -1
  // if they are passed backwards.
  void propagate(int direction) {
    const Scan& scan = division.scan;
    parallel_for(scan.batch * scan.walks, scan, [&](int64_t i) {
      const T* A = (const T*)scan.A + i % scan.walks * channels * states;
      std::vector<T> entering(channels * states, 0);
      for (int64_t count = 0; count < division.stretches; ++count) {
        const int64_t stretch = i * division.stretches + (direction > 0 ? count : division.stretches - 1 - count);
        for (int64_t cn = 0; cn < channels * states; ++cn) {
          T& own = state[stretch * channels * states + cn];
          const T leaving = own + std::exp(elapsed[stretch * channels + cn / states] * A[cn]) * entering[cn];
          own = entering[cn];
          entering[cn] = leaving;
        }
      }
    });
  }
};

// Where there are too few tasks for the threads unless walks run side by side, what they would add to an output goes
// to rows of their own. These are added up afterwards, in the same order: the bits are the same.
template <class T>
struct Terms {
  const Scan& scan;
  void* sums = nullptr;
  std::unique_ptr<T[]> terms;

  Terms(const Scan& scan, void*& output, Scan::Sum& sum) : scan(scan) {
    if (sum != Scan::kSums) return;
    terms.reset(new T[scan.batch * scan.length * scan.walks * scan.channels]());
    sums = output, output = terms.get(), sum = Scan::kTerms;
  }

  void add_up() const {
    if (!sums) return;
    const int64_t channels = scan.channels, rows = scan.batch * scan.length, grain = ceil_div(rows, scan.threads);
    parallel_for(scan.threads, scan, [&](int64_t i) {
      const T* from = terms.get() + std::min(rows, i * grain) * scan.walks * channels;
      for (int64_t row = i * grain; row < std::min(rows, (i + 1) * grain); ++row) {
        T* to = (T*)sums + row * channels;
        for (int64_t k = 0; k < scan.walks; ++k, from += channels)
          for (int64_t d = 0; d < channels; ++d) to[d] += from[d];
      }
    });
  }
};

template <class T>
void run_forward(Scan scan) {
  const KernelFunctions kernel = kernel_for(scan);
  const Division images = divide_images(scan, block_for(scan, scan.batch, kernel.width));
  if (walks_run_together(scan, kernel.width)) {
    parallel_for(images.tasks(), scan, [&](int64_t i) { kernel.forward_shared(scan, images.task(i)); });
    return;
  }
  const auto run_walk = [&](const Task& task) { kernel.forward(scan, task, nullptr); };
  if (scan.sum_y && images.tasks() >= scan.threads) {
    parallel_for(images.tasks(), scan, [&](int64_t i) { images.for_each_walk(i, run_walk); });
    return;
  }
  const Terms<T> terms(scan, scan.y, scan.sum_y);
  const Division division = divide_forward(scan, kernel.width);
  if (division.stretches == 1) {
    parallel_for(division.tasks(), scan, [&](int64_t i) { run_walk(division.task(i)); });
    terms.add_up();
    return;
  }
  Carry<T> carry(division);
  parallel_for(division.tasks(), scan, [&](int64_t i) {
    const Task task = division.task(i);
    if (task.stretch < division.stretches - 1)
      kernel.forward_carry(scan, task, carry.state_of(task), carry.elapsed_of(task));
  });
  carry.propagate(1);
  parallel_for(division.tasks(), scan, [&](int64_t i) {
    const Task task = division.task(i);
    kernel.forward(scan, task, carry.state_of(task));
  });
  terms.add_up();
}

// Adds `count` arrays of `size` elements, one after the other in memory.
template <class T>
void sum_partials(const std::vector<T>& partials, int64_t count, int64_t size, void* to) {
  for (int64_t i = 0; i < size && to; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += partials[j * size + i];
    ((T*)to)[i] = (T)sum;
  }
}

template <class T>
void run_backward(Scan scan) {
  const KernelFunctions kernel = kernel_for(scan);
  const Division by_walk = divide_backward(scan, kernel.width), images = divide_images(scan, by_walk.block);
  const bool in_turn = (scan.sum_grad_u || scan.sum_grad_delta) && images.tasks() >= scan.threads;
  const Division& division = in_turn ? images : by_walk;
  std::optional<Terms<T>> terms_of_u, terms_of_delta;
  if (!in_turn) {
    terms_of_u.emplace(scan, scan.grad_u, scan.sum_grad_u);
    terms_of_delta.emplace(scan, scan.grad_delta, scan.sum_grad_delta);
  }

  Carry<T> carry(division);
  if (division.stretches > 1) {
    parallel_for(division.tasks(), scan, [&](int64_t i) {
      const Task task = division.task(i);
      if (task.stretch > 0) kernel.backward_carry(scan, task, carry.state_of(task), carry.elapsed_of(task));
    });
    carry.propagate(-1);
  }

  const int64_t rows = scan.batch * scan.length * scan.walks;
  const int64_t sums = division.stretches * scan.batch, parameters = scan.walks * scan.channels;
  const std::unique_ptr<T[]> grad_B(new T[division.blocks * rows * scan.states]);
  const std::unique_ptr<T[]> grad_C(new T[division.blocks * rows * scan.states]);
  std::vector<T> grad_A(sums * parameters * scan.states), grad_D(sums * parameters), grad_delta_bias(sums * parameters),
      grad_rest(sums * parameters);
  const Partials partials{grad_B.get(), grad_C.get(),           grad_A.data(),
                          grad_D.data(), grad_delta_bias.data(), grad_rest.data()};
  parallel_for(division.tasks(), scan, [&](int64_t i) {
    division.for_each_walk(i, [&](const Task& task) {
      kernel.backward(scan, task, division.stretches > 1 ? carry.state_of(task) : nullptr, partials);
    });
  });
  if (!in_turn) terms_of_u->add_up(), terms_of_delta->add_up();

  const int64_t grain = ceil_div(rows * scan.states, scan.threads);
  parallel_for(scan.threads, scan, [&](int64_t i) {
    const int64_t first = std::min(rows * scan.states, i * grain), last = std::min(rows * scan.states, first + grain);
    kernel.sum_blocks(grad_B.get(), division.blocks, rows * scan.states, first, last, scan.grad_B);
    kernel.sum_blocks(grad_C.get(), division.blocks, rows * scan.states, first, last, scan.grad_C);
  });
  sum_partials(grad_A, sums, parameters * scan.states, scan.grad_A);
  sum_partials(grad_D, sums, parameters, scan.grad_D);
  sum_partials(grad_delta_bias, sums, parameters, scan.grad_delta_bias);
  sum_partials(grad_rest, sums, parameters, scan.grad_rest);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Interface
// ---------------------------------------------------------------------------------------------------------------------

extern "C" {

int scan_interface_version() { return kInterfaceVersion; }

int64_t scan_interface_size() { return sizeof(Scan); }

// Restricts the instruction set (0 baseline, 1 AVX2, 2 AVX-512), for tests; returns the one now in use.
int scan_limit_instruction_set(int limit) { return limit_instruction_set(limit); }

// Whether scan_forward computes what the walks share once for all of them, for tests.
int scan_runs_walks_together(const Scan* scan) { return walks_run_together(*scan, kernel_for(*scan).width); }

int scan_forward(const Scan* scan) {
  return status_or(kOutOfMemory, [&]() -> int {
    if (const Status status = check(scan->order, *scan, true)) return status;
    if (const Status status = check(scan->source, *scan, false)) return kInSource + status;
    scan->dtype == kFloat64 ? run_forward<double>(*scan) : run_forward<float>(*scan);
    return kOk;
  });
}

int scan_backward(const Scan* scan) {
  return status_or(kOutOfMemory, [&]() -> int {
    if (const Status status = check(scan->order, *scan, true)) return status;
    if (const Status status = check(scan->source, *scan, true)) return kInSource + status;
    scan->dtype == kFloat64 ? run_backward<double>(*scan) : run_backward<float>(*scan);
    return kOk;
  });
}

}  // extern "C"
