// The sparse depthwise convolution of a stretch of one image's tokens, for a block of the channels. See
// sparse_depthwise_conv_cpu.cpp for the mathematics.
//
// This file is compiled once per instruction set: see instruction_sets.h and, for what it must not use, simd.h.
//
// Vectors run over channels, which are adjacent in memory. What limits the speed is reading from the first-level cache:
// a weight and an input for each multiply-add. So tokens are handled in pairs, and a tap under which both have a
// neighbour reads its weight once (or, for the weights' gradient, its sum).

constexpr int kBlockVectors = 4;  // in a block of channels: more would fill the first-level cache with weights
constexpr int kAhead = 8;         // tokens between asking for a row and reading it

inline bool note_presence(const SparseConv& conv, int64_t first, int64_t last, const Presence& presence) {
  const int taps = (int)conv.taps;
  int32_t beyond = -1, below = 0;
  for (int64_t i = first; i < last; ++i) {
    const int32_t* neighbors = conv.neighbors + i * taps;
    uint32_t lowest = UINT32_MAX;  // absent is the largest
    int32_t highest = -1, smallest = 0;
    for (int t = 0; t < taps; ++t) {
      const int32_t j = neighbors[t];
      lowest = (uint32_t)j < lowest ? (uint32_t)j : lowest;
      highest = j > highest ? j : highest;
      smallest = j < smallest ? j : smallest;
    }
    presence.lowest[i] = (int32_t)lowest;
    presence.highest[i] = highest;
    beyond = highest > beyond ? highest : beyond;
    below = smallest < below ? smallest : below;
    for (int64_t word = 0; word < presence.words; ++word) {
      uint64_t mask = 0;
      const int count = taps - word * 64 < 64 ? (int)(taps - word * 64) : 64;
      for (int t = 0; t < count; ++t) mask |= (uint64_t)(neighbors[word * 64 + t] >= 0) << t;
      presence.masks[i * presence.words + word] = mask;
    }
  }
  return below >= -1 && beyond < conv.kept;
}

// Calls body(t) for each bit t of the mask.
template <class Body>
inline __attribute__((always_inline)) void each_bit(uint64_t mask, const Body& body) {
  for (; mask; mask &= mask - 1) body(__builtin_ctzll(mask));
}

template <class T, class Element>
struct Kernel {
  using V = VectorOf<T>;
  static constexpr int kWidth = kLanes<T>, kBlock = kBlockVectors * kWidth;

  // The channels of one block.
  struct Channels {
    int64_t first;
    int count, vectors;
    Channels(const SparseConv& conv, int64_t block) : first(block * kBlock) {
      count = conv.channels - first < kBlock ? (int)(conv.channels - first) : kBlock;
      vectors = (count + kWidth - 1) / kWidth;
    }
    int lanes(int v) const { return count - v * kWidth < kWidth ? count - v * kWidth : kWidth; }
  };

  static V load_lanes(const Element* from, int lanes) {
    return lanes == kWidth ? load<T>(from) : load_first<T>(from, lanes);
  }
  template <class To>
  static void store_lanes(To* to, V x, int lanes) {
    lanes == kWidth ? store<T>(to, x) : store_first<T>(to, x, lanes);
  }

  static int64_t packed_bytes(const SparseConv& conv) { return (conv.taps + 1) * kBlockVectors * sizeof(V); }

  static void pack_weight(const SparseConv& conv, int64_t block, void* packed) {
    const Channels channels(conv, block);
    const int64_t taps = conv.taps, width = channels.vectors * kWidth;
    T* const to = (T*)packed;
    __builtin_memset(to, 0, (taps + 1) * width * sizeof(T));
    for (int c = 0; c < channels.count; ++c) {
      const T* from = (const T*)conv.weight + (channels.first + c) * taps;
      for (int64_t t = 0; t < taps; ++t) to[t * width + c] = from[conv.reversed ? taps - 1 - t : t];
      if (conv.bias) to[taps * width + c] = ((const T*)conv.bias)[channels.first + c];
    }
  }

  // The block's channels of the tokens that a task reads, adjacent and widened.
  template <int kVectors>
  class Tokens {
   public:
    Tokens(const SparseConv& conv, const Presence& presence, const Task& task, const Channels& channels)
        : range_(conv, presence, task), rows_((range_.last + 1 - range_.first) * kVectors, false) {
      const Element* from = (const Element*)conv.x.data + task.batch * conv.x.batch_stride + channels.first;
      V* to = rows_;
      for (int64_t j = range_.first; j <= range_.last; ++j)
        for (int v = 0; v < kVectors; ++v) {
          const Element* row = from + j * conv.x.token_stride + v * kWidth;
          if (j + kAhead <= range_.last) __builtin_prefetch(row + kAhead * conv.x.token_stride);
          *to++ = load_lanes(row, channels.lanes(v));
        }
    }
    const V* row(int64_t token) const { return rows_ + (token - range_.first) * kVectors; }

   private:
    struct Range {
      int64_t first, last;
      Range(const SparseConv& conv, const Presence& presence, const Task& task) : first(conv.kept), last(-1) {
        for (int64_t i = task.first_token; i < task.last_token; ++i) {
          const int64_t token = task.batch * conv.kept + i;
          if (presence.highest[token] < 0) continue;
          first = presence.lowest[token] < first ? presence.lowest[token] : first;
          last = presence.highest[token] > last ? presence.highest[token] : last;
        }
        if (last < 0) first = 0;  // nothing is read
      }
    };
    Range range_;
    Buffer<V> rows_;
  };

  // A pair of tokens: its neighbours and which of them are present. The second token may be missing.
  struct Pair {
    const int32_t *neighbors[2];
    const uint64_t* masks[2];
    bool is_whole;

    Pair(const SparseConv& conv, const Presence& presence, const Task& task, int64_t token)
        : is_whole(token + 1 < task.last_token) {
      for (int s = 0; s < 2; ++s) {
        const int64_t i = task.batch * conv.kept + token + (is_whole ? s : 0);
        neighbors[s] = conv.neighbors + i * conv.taps;
        masks[s] = presence.masks + i * presence.words;
      }
    }

    // Calls both(t, j, k) for taps under which the tokens have neighbours j and k, and first(t, j) or second(t, k) for
    // those under which only one has.
    template <class Both, class First, class Second>
    inline __attribute__((always_inline)) void each_tap(int64_t words, const Both& both, const First& first,
                                                        const Second& second) const {
      for (int64_t word = 0; word < words; ++word) {
        const uint64_t a = masks[0][word], b = is_whole ? masks[1][word] : 0;
        const int32_t *of_a = neighbors[0] + word * 64, *of_b = neighbors[1] + word * 64;
        each_bit(a & b, [&](int t) __attribute__((always_inline)) { both(word * 64 + t, of_a[t], of_b[t]); });
        each_bit(a & ~b, [&](int t) __attribute__((always_inline)) { first(word * 64 + t, of_a[t]); });
        each_bit(b & ~a, [&](int t) __attribute__((always_inline)) { second(word * 64 + t, of_b[t]); });
      }
    }
  };

  template <int kVectors>
  static void convolve_block(const SparseConv& conv, const Presence& presence, const Task& task,
                             const Channels& channels, const V* weight) {
    const Tokens<kVectors> x(conv, presence, task, channels);
    for (int64_t i = task.first_token; i < task.last_token; i += 2) {
      const Pair pair(conv, presence, task, i);
      V first[kVectors], second[kVectors];
      for (int v = 0; v < kVectors; ++v) first[v] = second[v] = weight[conv.taps * kVectors + v];
      pair.each_tap(
          presence.words,
          [&](int64_t t, int64_t j, int64_t k) __attribute__((always_inline)) {
            const V *w = weight + t * kVectors, *x_j = x.row(j), *x_k = x.row(k);
            for (int v = 0; v < kVectors; ++v) first[v] += w[v] * x_j[v], second[v] += w[v] * x_k[v];
          },
          [&](int64_t t, int64_t j) __attribute__((always_inline)) {
            const V *w = weight + t * kVectors, *x_j = x.row(j);
            for (int v = 0; v < kVectors; ++v) first[v] += w[v] * x_j[v];
          },
          [&](int64_t t, int64_t k) __attribute__((always_inline)) {
            const V *w = weight + t * kVectors, *x_k = x.row(k);
            for (int v = 0; v < kVectors; ++v) second[v] += w[v] * x_k[v];
          });
      Element* to = (Element*)conv.y + (task.batch * conv.kept + i) * conv.channels + channels.first;
      for (int v = 0; v < kVectors; ++v) {
        store_lanes(to + v * kWidth, first[v], channels.lanes(v));
        if (pair.is_whole) store_lanes(to + conv.channels + v * kWidth, second[v], channels.lanes(v));
      }
    }
  }

  template <int kVectors>
  static void gradient_block(const SparseConv& conv, const Presence& presence, const Task* tasks, int64_t count,
                             const Channels& channels, T* partial) {
    Buffer<V> sums(conv.taps * kVectors);
    for (const Task* task = tasks; task < tasks + count; ++task) {
      const Tokens<kVectors> x(conv, presence, *task, channels);
      const Element* grad_y = (const Element*)conv.grad_y.data + task->batch * conv.grad_y.batch_stride + channels.first;
      for (int64_t i = task->first_token; i < task->last_token; i += 2) {
        const Pair pair(conv, presence, *task, i);
        V first[kVectors], second[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          const Element* from = grad_y + i * conv.grad_y.token_stride + v * kWidth;
          first[v] = load_lanes(from, channels.lanes(v));
          second[v] = pair.is_whole ? load_lanes(from + conv.grad_y.token_stride, channels.lanes(v)) : V{};
        }
        pair.each_tap(
            presence.words,
            [&](int64_t t, int64_t j, int64_t k) __attribute__((always_inline)) {
              V* sum = sums + t * kVectors;
              const V *x_j = x.row(j), *x_k = x.row(k);
              for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + first[v] * x_j[v] + second[v] * x_k[v];
            },
            [&](int64_t t, int64_t j) __attribute__((always_inline)) {
              V* sum = sums + t * kVectors;
              const V* x_j = x.row(j);
              for (int v = 0; v < kVectors; ++v) sum[v] += first[v] * x_j[v];
            },
            [&](int64_t t, int64_t k) __attribute__((always_inline)) {
              V* sum = sums + t * kVectors;
              const V* x_k = x.row(k);
              for (int v = 0; v < kVectors; ++v) sum[v] += second[v] * x_k[v];
            });
      }
    }
    for (int64_t t = 0; t < conv.taps; ++t)
      for (int v = 0; v < kVectors; ++v) {
        T* to = partial + t * conv.channels + channels.first + v * kWidth;
        store_lanes(to, sums[t * kVectors + v], channels.lanes(v));
      }
  }

  static void convolve(const SparseConv& conv, const Presence& presence, const Task& task, const void* packed_weight) {
    const Channels channels(conv, task.block);
    const V* weight = (const V*)packed_weight;
    if (channels.vectors == 1) return convolve_block<1>(conv, presence, task, channels, weight);
    if (channels.vectors == 2) return convolve_block<2>(conv, presence, task, channels, weight);
    if (channels.vectors == 3) return convolve_block<3>(conv, presence, task, channels, weight);
    convolve_block<kBlockVectors>(conv, presence, task, channels, weight);
  }

  static void weight_gradient(const SparseConv& conv, const Presence& presence, const Task* tasks, int64_t count,
                              void* partial) {
    const Channels channels(conv, tasks->block);
    T* to = (T*)partial;
    if (channels.vectors == 1) return gradient_block<1>(conv, presence, tasks, count, channels, to);
    if (channels.vectors == 2) return gradient_block<2>(conv, presence, tasks, count, channels, to);
    if (channels.vectors == 3) return gradient_block<3>(conv, presence, tasks, count, channels, to);
    gradient_block<kBlockVectors>(conv, presence, tasks, count, channels, to);
  }
};

template <class T, class Element>
KernelFunctions functions() {
  using K = Kernel<T, Element>;
  return {K::kBlock, note_presence, K::packed_bytes, K::pack_weight, K::convolve, K::weight_gradient};
}

inline KernelFunctions choose(int64_t dtype) {
  if (dtype == kFloat32) return functions<float, float>();
  if (dtype == kBFloat16) return functions<float, BFloat16>();
  if (dtype == kFloat16) return functions<float, Float16>();
  return functions<double, double>();
}
