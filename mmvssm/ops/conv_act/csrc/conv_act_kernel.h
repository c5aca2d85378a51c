// The convolution and its gradients on a stretch of one image's rows, for a block of the channels. See
// conv_act_cpu.cpp for the mathematics.
//
// This file is compiled once per instruction set: see instruction_sets.h and, for what it must not use, simd.h.
//
// Vectors run over channels, which are adjacent in memory. Three rows of the input, and three of the gradient before
// the activation, lie in buffers: one vector's channels of all pixels after the other, so that the loops over pixels
// keep weights, and sums of their gradients, in registers.

#include "../../csrc/vector_math.h"

constexpr int kBlockVectors = 4;
constexpr int kAhead = 4;  // pixels between asking for one and reading it

// ---------------------------------------------------------------------------------------------------------------------
// Activations and their derivatives
// ---------------------------------------------------------------------------------------------------------------------

struct Identity {
  static inline Floats value(Floats z) { return z; }
  static inline Floats slope(Floats, Floats& value) { return Floats{} + 1.0f; }
};

struct Silu {
  static inline Floats sigmoid(Floats z) {
    const Floats e = exp_minus_abs(z), above = 1.0f / (1.0f + e);
    return z < 0 ? e * above : above;
  }
  static inline Floats value(Floats z) { return z * sigmoid(z); }
  static inline Floats slope(Floats z, Floats& value) {
    const Floats s = sigmoid(z);
    value = z * s;
    return s + value * (1.0f - s);
  }
};

// The exact one, z times the normal distribution's integral up to z (Abramowitz and Stegun 7.1.26, to 1.5e-7).
struct Gelu {
  // exp(-z^2 / 2), and the integral.
  static inline Floats bell(Floats z) { return exp2(at_least(Floats{} - 1e18f, z * z * (float)(-kLog2E / 2))); }
  static inline Floats integral(Floats z, Floats bell) {
    const Floats size = z < 0 ? -z : z;
    const Floats t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
    const Floats p = 0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)));
    const Floats tail = 0.5f * t * p * bell;
    return z < 0 ? tail : 1.0f - tail;
  }
  static inline Floats value(Floats z) { return z * integral(z, bell(z)); }
  static inline Floats slope(Floats z, Floats& value) {
    const Floats b = bell(z), whole = integral(z, b);
    value = z * whole;
    return whole + 0.39894228f * z * b;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Convolution
// ---------------------------------------------------------------------------------------------------------------------

template <class Element, class Activation>
struct Kernel {
  using V = Floats;
  static constexpr int kWidth = kLanes<float>, kBlock = kBlockVectors * kWidth;

  static V load_lanes(const Element* from, int lanes) {
    return lanes == kWidth ? load<float>(from) : load_first<float>(from, lanes);
  }
  template <class To>
  static void store_lanes(To* to, V x, int lanes) {
    lanes == kWidth ? store<float>(to, x) : store_first<float>(to, x, lanes);
  }

  // What a task computes with: its block's channels, their weights, and rows of one image.
  struct Stretch {
    const ConvAct& conv;
    const Task& task;
    int64_t first, stride;  // channel; vectors of a buffered row of one vector's channels
    int count, vectors;
    V weight[kBlockVectors][9], bias[kBlockVectors];
    Buffer<V> rows, grads;  // three each

    Stretch(const ConvAct& conv, const Task& task, bool with_grads)
        : conv(conv),
          task(task),
          first(task.block * kBlock),
          stride(conv.width + 2),
          count(conv.channels - first < kBlock ? (int)(conv.channels - first) : kBlock),
          vectors((count + kWidth - 1) / kWidth),
          rows(3 * vectors * stride),
          grads(with_grads ? 3 * vectors * stride : 1) {
      for (int v = 0; v < vectors; ++v) {
        bias[v] = V{};
        for (int t = 0; t < 9; ++t) weight[v][t] = V{};
        for (int lane = 0; lane < lanes(v); ++lane) {
          const int64_t c = first + v * kWidth + lane;
          for (int t = 0; t < 9; ++t) weight[v][t][lane] = conv.weight[c * 9 + t];
          if (conv.bias) bias[v][lane] = conv.bias[c];
        }
      }
    }

    int lanes(int v) const { return count - v * kWidth < kWidth ? count - v * kWidth : kWidth; }

    // A vector's channels of row i, from the column left of the image on; i is at least -2.
    V* row(V* buffer, int64_t i, int v) const { return buffer + ((i + 3) % 3 * vectors + v) * stride; }

    const Element* pixels(const Map& map, int64_t i) const {
      return (const Element*)map.data + task.batch * map.batch_stride + i * map.row_stride + first;
    }

    // Copies row i of the input to its buffer: zeros, where it is above or below the image.
    void read(int64_t i) const {
      if (i < 0 || i >= input_rows(conv)) {
        for (int v = 0; v < vectors; ++v) __builtin_memset(row(rows, i, v), 0, stride * sizeof(V));
        return;
      }
      const Element* from = pixels(conv.x, i);
      for (int64_t p = 1; p <= conv.width; ++p, from += conv.x.pixel_stride)
        for (int v = 0; v < vectors; ++v) {
          if (p + kAhead <= conv.width) __builtin_prefetch(from + kAhead * conv.x.pixel_stride + v * kWidth);
          row(rows, i, v)[p] = load_lanes(from + v * kWidth, lanes(v));
        }
    }

    // Calls use(p, z) for the pixels of output row j, before the activation.
    template <class Use>
    inline __attribute__((always_inline)) void convolve(int64_t j, int v, const Use& use) const {
      const V* x[3];
      for (int r = 0; r < 3; ++r) x[r] = row(rows, j - conv.above + r, v);
      V w[9];
      for (int t = 0; t < 9; ++t) w[t] = weight[v][t];
      const V start = bias[v];
      const int64_t width = conv.width;
      int64_t p = 0;
      for (; p + 1 < width; p += 2) {  // in pairs, which share inputs
        V a = start, b = start;
        for (int r = 0; r < 3; ++r) {
          const V x0 = x[r][p], x1 = x[r][p + 1], x2 = x[r][p + 2], x3 = x[r][p + 3];
          a += w[3 * r] * x0, b += w[3 * r] * x1;
          a += w[3 * r + 1] * x1, b += w[3 * r + 1] * x2;
          a += w[3 * r + 2] * x2, b += w[3 * r + 2] * x3;
        }
        use(p, a);
        use(p + 1, b);
      }
      if (p < width) {
        V a = start;
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < 3; ++c) a += w[3 * r + c] * x[r][p + c];
        use(p, a);
      }
    }
  };

  static void forward(const ConvAct& conv, const Task& task) {
    const Stretch stretch(conv, task, false);
    for (int64_t i = task.first_row - conv.above; i < task.first_row - conv.above + 2; ++i) stretch.read(i);
    for (int64_t j = task.first_row; j < task.last_row; ++j) {
      stretch.read(j - conv.above + 2);
      Element* to = output(conv, task, j) + stretch.first;
      for (int v = 0; v < stretch.vectors; ++v) {
        const int lanes = stretch.lanes(v);
        stretch.convolve(j, v, [&](int64_t p, V z) __attribute__((always_inline)) {
          store_lanes(to + p * conv.channels + v * kWidth, Activation::value(z), lanes);
        });
      }
    }
  }

  // The rows of the task are the input's. `partial` is (10, C): the gradients of weights and, last, of the bias.
  static void backward(const ConvAct& conv, const Task& task, float* partial) {
    const Stretch stretch(conv, task, true);
    V sums[kBlockVectors][10] = {};
    const int64_t from = task.first_row + conv.above - 2;  // output row that the first input row reaches
    for (int64_t i = from - conv.above; i < from - conv.above + 2; ++i) stretch.read(i);
    for (int64_t j = from; j < task.last_row + conv.above; ++j) {
      stretch.read(j - conv.above + 2);
      // Of neighbouring tasks that both need this row, one counts it.
      const int64_t middle = j - conv.above + 1;
      const bool counts = task.first_row <= middle && middle < task.last_row;
      for (int v = 0; v < stretch.vectors; ++v) {
        undo_activation(conv, task, stretch, j, v, counts, sums[v][9]);
        if (j >= task.first_row + conv.above) input_gradient(conv, task, stretch, j - conv.above, v, sums[v]);
      }
    }
    for (int v = 0; v < stretch.vectors; ++v)
      for (int t = 0; t < 10; ++t)
        store_lanes(partial + t * conv.channels + stretch.first + v * kWidth, sums[v][t], stretch.lanes(v));
  }

  static Element* output(const ConvAct& conv, const Task& task, int64_t j) {
    return (Element*)conv.y + (task.batch * conv.height + j) * conv.width * conv.channels;
  }

  // Row j of the gradient before the activation, to its buffer; and, where this is the task that counts it, its sum, and
  // the row of the output.
  static void undo_activation(const ConvAct& conv, const Task& task, const Stretch& stretch, int64_t j, int v,
                              bool counts, V& sum) {
    V* const to = stretch.row(stretch.grads, j, v) + 1;
    if (j < 0 || j >= conv.height) {
      __builtin_memset(to, 0, conv.width * sizeof(V));
      return;
    }
    const int lanes = stretch.lanes(v);
    const Element* from = stretch.pixels(conv.grad_y, j) + v * kWidth;
    const int64_t pixel = conv.grad_y.pixel_stride;
    Element* y = conv.y && counts ? output(conv, task, j) + stretch.first + v * kWidth : nullptr;
    V total = {};
    stretch.convolve(j, v, [&](int64_t p, V z) __attribute__((always_inline)) {
      V value = z;
      const V slope = Activation::slope(z, value), grad = load_lanes(from + p * pixel, lanes) * slope;
      if (y) store_lanes(y + p * conv.channels, value, lanes);
      to[p] = grad;
      total += grad;
    });
    if (counts) sum += total;
  }

  // Row i of the input's gradient, and its share of the weights'.
  static void input_gradient(const ConvAct& conv, const Task& task, const Stretch& stretch, int64_t i, int v, V* sums) {
    const V* g[3];  // under the first to the last row of weights
    for (int r = 0; r < 3; ++r) g[r] = stretch.row(stretch.grads, i + conv.above - r, v) + 2;
    const V* x = stretch.row(stretch.rows, i, v) + 1;
    const int64_t rows = input_rows(conv);
    Element* to = (Element*)conv.grad_x + (task.batch * rows + i) * conv.width * conv.channels + stretch.first;
    const int lanes = stretch.lanes(v);
    V w[9], sum[9];
    for (int t = 0; t < 9; ++t) w[t] = stretch.weight[v][t], sum[t] = sums[t];
    for (int64_t p = 0; p < conv.width; ++p) {
      V grad = {};
      const V x_p = x[p];
      for (int r = 0; r < 3; ++r)
        for (int c = 0; c < 3; ++c) {
          const V g_t = g[r][p - c];
          grad += w[3 * r + c] * g_t;
          sum[3 * r + c] += x_p * g_t;
        }
      store_lanes(to + p * conv.channels + v * kWidth, grad, lanes);
    }
    for (int t = 0; t < 9; ++t) sums[t] = sum[t];
  }
};

template <class Element, class Activation>
KernelFunctions functions() {
  using K = Kernel<Element, Activation>;
  return {K::kBlock, K::forward, K::backward};
}

template <class Element>
KernelFunctions of_element(int64_t activation) {
  if (activation == kSilu) return functions<Element, Silu>();
  if (activation == kGelu) return functions<Element, Gelu>();
  return functions<Element, Identity>();
}

inline KernelFunctions choose(int64_t dtype, int64_t activation) {
  return dtype == kBFloat16 ? of_element<BFloat16>(activation) : of_element<float>(activation);
}
