// The scan over one stretch of one walk, for a group of its channels. See scan_cpu.cpp for the mathematics.
//
// This file is compiled once per instruction set: see instruction_sets.h and, for what it must not use, simd.h.
//
// Vectors run over channels, which are adjacent in memory. Steps are handled in tiles of kTile, so that what a tile
// needs stays in the caches while each vector of channels passes over it with its state in registers.

// ---------------------------------------------------------------------------------------------------------------------
// Mathematics
// ---------------------------------------------------------------------------------------------------------------------

// The larger and the smaller of x and a limit. A NaN in x stays NaN.
template <class V>
inline V at_least(V low, V x) {
  return low > x ? low : x;
}
template <class V>
inline V at_most(V high, V x) {
  return high < x ? high : x;
}
#if VECTOR_BYTES == 64  // compilers do not see one instruction in the above
inline Floats at_least(Floats low, Floats x) { return (Floats)_mm512_max_ps((__m512)low, (__m512)x); }
inline Floats at_most(Floats high, Floats x) { return (Floats)_mm512_min_ps((__m512)high, (__m512)x); }
#elif VECTOR_BYTES == 32
inline Floats at_least(Floats low, Floats x) { return (Floats)_mm256_max_ps((__m256)low, (__m256)x); }
inline Floats at_most(Floats high, Floats x) { return (Floats)_mm256_min_ps((__m256)high, (__m256)x); }
#endif

// Limits x to numbers whose products with each other are finite.
template <class V>
inline V bounded(V x) {
  return at_most(V{} + 1e18f, at_least(V{} - 1e18f, x));
}

// 2^x for finite x; too large or too small, it becomes inf or 0; NaN stays NaN. The fraction's polynomial is 1 + f
// q(f), exact at 0: a step of size 0 leaves the state as it is, to the bit.
inline Floats exp2(Floats x) {
#if VECTOR_BYTES == 64
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = at_most(Floats{} + 129.0f, at_least(Floats{} - 151.0f, x));
  const Floats shifted = x + 0x1.8p23f;  // leaves the nearest integer in the low bits
  const Floats n = shifted - 0x1.8p23f;
#endif
  const Floats f = x - n;
  const Floats q =
      0x1.62e43p-1f + f * (0x1.ebf9f8p-3f + f * (0x1.c6aea6p-5f + f * (0x1.3cd8f8p-7f + f * 0x1.5f615ep-10f)));
  const Floats p = 1.0f + f * q;
#if VECTOR_BYTES == 64
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two factors, because one alone reaches neither subnormal numbers nor infinity.
  const Ints exponent = (Ints)shifted - 0x4b400000;
  const Ints half = exponent >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
#endif
}

inline Doubles exp2(Doubles x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp2(x[i]);
  return x;
}

// log(1 + z) for z in [0, 1], as z P(z), so that small z keep their relative precision. P's even and odd terms are
// evaluated apart: one long chain would leave the processor waiting.
inline Floats log1p(Floats z) {
  const Floats w = z * z;
  const Floats even =
      0x1.0p+0f + w * (0x1.554c8p-2f + w * (0x1.92f696p-3f + w * (0x1.b2535ep-4f + w * 0x1.453f0cp-6f)));
  const Floats odd =
      -0x1.ffffbep-2f + w * (-0x1.ff0f88p-3f + w * (-0x1.397562p-3f + w * (-0x1.d29cc8p-5f + w * -0x1.a93362p-9f)));
  return z * (even + z * odd);
}

inline Doubles log1p(Doubles z) {
  for (int i = 0; i < kLanes<double>; ++i) z[i] = ::log1p(z[i]);
  return z;
}

template <class V>
inline V positive_part(V x) {
  return at_least(V{}, x);
}

constexpr double kLog2E = 1.4426950408889634;

// exp(-|x|), from which softplus and its derivative both follow without overflow.
inline Floats exp_minus_abs(Floats x) {
  const Floats negative = (Floats)((Words)x | 0x80000000u);
  return exp2(at_least(Floats{} - 1e18f, negative) * (float)kLog2E);
}
inline Doubles exp_minus_abs(Doubles x) { return exp2((x < 0 ? x : -x) * kLog2E); }

// ---------------------------------------------------------------------------------------------------------------------
// Matrices of channels and states
// ---------------------------------------------------------------------------------------------------------------------

// A (D, N) matrix, states adjacent, to and from N vectors over channels.
template <class T>
inline void load_matrix(VectorOf<T>* to, const T* from, int states, int lanes) {
  if (states == 1) {
    *to = load_first<T>(from, lanes);
    return;
  }
  for (int n = 0; n < states; ++n) {
    VectorOf<T> x = {};
    for (int i = 0; i < lanes; ++i) x[i] = from[i * states + n];
    to[n] = x;
  }
}

template <class T>
inline void store_matrix(T* to, const VectorOf<T>* from, int states, int lanes) {
  if (states == 1) return store_first<T>(to, *from, lanes);
  const T* elements = (const T*)from;
  for (int i = 0; i < lanes; ++i)
    for (int n = 0; n < states; ++n) to[i * states + n] = elements[n * kLanes<T> + i];
}

// Folds two vectors into one: sums of the neighbours in a, then of those in b.
template <class T, int... I>
inline VectorOf<T> fold(VectorOf<T> a, VectorOf<T> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  using Mask = typename Simd<T>::Mask;
  return __builtin_shuffle(a, b, Mask{(2 * I)...}) + __builtin_shuffle(a, b, Mask{(2 * I + 1)...});
#endif
}

// Lane i of the result is the sum over the lanes of x[i], for kLanes vectors.
template <class T, int kCount = kLanes<T>>
inline VectorOf<T> sums_over_lanes(const VectorOf<T>* x) {
  if constexpr (kCount == 1)
    return *x;
  else
    return fold<T>(sums_over_lanes<T, kCount / 2>(x), sums_over_lanes<T, kCount / 2>(x + kCount / 2),
                   std::make_integer_sequence<int, kLanes<T>>{});
}

// ---------------------------------------------------------------------------------------------------------------------
// The scan
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kAhead = 16;  // steps between asking for a row and reading it: a walk need not follow the order in memory

// kStates is the number of states N where that is known when compiling, else 0.
template <class T, class Element, int kStates>
class Kernel {
 public:
  static constexpr int kWidth = kLanes<T>;

  // Runs the task's steps from the state `entry` (zero if null), writing y and the saved states.
  static void forward(const Scan& scan, const Task& task, const void* entry) {
    Kernel(scan, task).template walk_forward<true>((const T*)entry, nullptr, nullptr);
  }

  // Runs them from a zero state for nothing but the state in which they end and the time that passes, per channel.
  static void forward_carry(const Scan& scan, const Task& task, void* end, void* elapsed) {
    Kernel(scan, task).template walk_forward<false>(nullptr, (T*)end, (T*)elapsed);
  }

  // Differentiates the task's steps, `adjoint` being the gradient at the state in which they end (zero if null).
  static void backward(const Scan& scan, const Task& task, const void* adjoint, const Partials& partials) {
    Kernel(scan, task).walk_backward((const T*)adjoint, partials);
  }

  // The gradient that a zero gradient at the end turns into at the state before the task's first step, and the time.
  static void backward_carry(const Scan& scan, const Task& task, void* adjoint, void* elapsed) {
    Kernel(scan, task).walk_adjoint((T*)adjoint, (T*)elapsed);
  }

  // Elements first to last of the sum over blocks of `partials`, (blocks, size).
  static void sum_blocks(const void* partials, int64_t blocks, int64_t size, int64_t first, int64_t last, void* sums) {
    for (int64_t i = first; i < last; i += kWidth) {
      const int count = last - i < kWidth ? (int)(last - i) : kWidth;
      V sum = {};
      for (int64_t block = 0; block < blocks; ++block) {
        const T* from = (const T*)partials + block * size + i;
        sum += count == kWidth ? load<T>(from) : load_first<T>(from, count);
      }
      if (count == kWidth)
        store<T>((Element*)sums + i, sum);
      else
        store_first<T>((Element*)sums + i, sum, count);
    }
  }

 protected:
  using V = VectorOf<T>;

  // With one state there is little to do between two memory accesses: rows are passed whole, which the hardware's
  // prefetching likes. With more, one vector of channels after the other runs through the tile.
  int64_t group() const { return kStates == 1 ? vectors_ : 1; }

  // Sums over lanes are taken of kWidth vectors at a time: of the contributions to B and C of this many steps.
  static constexpr int kFolded = kStates == 0 ? kTile : kStates % kWidth == 0 ? 1 : kWidth / kStates;

  // What the backward pass notes of a group of vectors while it runs a tile forwards, to use it on the way back.
  struct Tape {
    Tape(int states, int64_t group)
        : before((kTile + 1) * group * states),
          decay(kTile * group * states),
          step(kTile * group),
          slope(kTile * group),
          u(kTile * group),
          grad_B((int64_t)kFolded * states),
          grad_C((int64_t)kFolded * states),
          sum_B((int64_t)kTile * states / kWidth),
          sum_C((int64_t)kTile * states / kWidth) {}
    Buffer<V> before;          // (kTile + 1, group, N): the state before each step, and after the last
    Buffer<V> decay;           // (kTile, group, N)
    Buffer<V> step, slope, u;  // (kTile, group); slope is the derivative of the step by delta
    Buffer<V> grad_B, grad_C;  // (kFolded, N): the channels' contributions
    Buffer<V> sum_B, sum_C;    // (kTile, N) elements: the sums over the task's channels so far
  };

  // Gradients per channel, summed over steps.
  struct Totals {
    Totals(int64_t vectors, int states) : A(vectors * states), D(vectors), delta_bias(vectors), rest(vectors) {}
    // Tile by tile: rounding errors would grow with the length if single steps were added to the total.
    void add(Totals& tile, int64_t vectors, int states) {
      move(A, tile.A, vectors * states);
      move(D, tile.D, vectors);
      move(delta_bias, tile.delta_bias, vectors);
      move(rest, tile.rest, vectors);
    }
    static void move(V* to, V* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to[i] += from[i], from[i] = V{};
    }
    Buffer<V> A, D, delta_bias, rest;
  };

  Kernel(const Scan& scan, const Task& task)
      : scan_(scan),
        task_(task),
        vectors_((task.last_channel - task.first_channel + kWidth - 1) / kWidth),
        A_(vectors_ * states()),
        bias_(vectors_),
        skip_(vectors_),
        rest_(vectors_),
        B_((kTile * states() + kWidth - 1) / kWidth),
        C_((kTile * states() + kWidth - 1) / kWidth) {
    for (int64_t v = 0; v < vectors_; ++v) {
      V* A = A_ + v * states();
      load_matrix<T>(A, (const T*)scan.A + channel_index(v) * states(), states(), lanes(v));
      for (int n = 0; n < states(); ++n) A[n] = bounded(A[n] * (T)kLog2E);
      if (scan.delta_bias) bias_[v] = load_first<T>((const T*)scan.delta_bias + channel_index(v), lanes(v));
      if (scan.D) skip_[v] = load_first<T>((const T*)scan.D + channel_index(v), lanes(v));
      if (scan.gap.data) rest_[v] = load_first<T>((const T*)scan.rest + channel_index(v), lanes(v));
    }
  }

  int states() const { return kStates ? kStates : (int)scan_.states; }
  int64_t channel(int64_t v) const { return task_.first_channel + v * kWidth; }
  int64_t channel_index(int64_t v) const { return task_.walk * scan_.channels + channel(v); }  // in a (K, D) matrix
  int lanes(int64_t v) const {
    const int64_t left = task_.last_channel - channel(v);
    return left < kWidth ? (int)left : kWidth;
  }
  const Element* input(const Tensor& x, int64_t token) const { return input(x, token, task_.walk); }
  const Element* input(const Tensor& x, int64_t token, int64_t walk) const {
    return (const Element*)x.data + task_.batch * x.batch_stride + token * x.token_stride + walk * x.walk_stride;
  }
  int64_t output_row(int64_t token) const {  // of a contiguous (B, L, K, D)
    return ((task_.batch * scan_.length + token) * scan_.walks + task_.walk) * scan_.channels;
  }
  T* saved_state(int64_t chunk) const { return saved_state(chunk, task_.walk); }
  T* saved_state(int64_t chunk, int64_t walk) const {  // (B, K, S, D, N)
    const int64_t chunks = (scan_.length + kTile - 1) / kTile;
    return (T*)scan_.saved_states + ((task_.batch * scan_.walks + walk) * chunks + chunk) * scan_.channels * states();
  }
  T* B(int s) const { return (T*)(V*)B_ + s * states(); }
  T* C(int s) const { return (T*)(V*)C_ + s * states(); }

  // Looks up what the tile's steps have in common for all channels. Its rows are followed by the first ones of the
  // tile to be visited next, which are only prefetched.
  void enter_tile(int64_t start, int64_t next) {
    const int64_t stop = start + kTile < task_.stop ? start + kTile : task_.stop;
    length_ = (int)(stop - start);
    const int32_t *order = scan_.order.walk(task_), *source = scan_.source.walk(task_), *gap = scan_.gap.walk(task_);
    for (int s = 0; s < length_ + kAhead; ++s) {
      int64_t t = s < length_ ? start + s : next + s - length_;
      if (t < 0 || t >= scan_.length) t = start;
      const int64_t i = order ? order[t] : t, j = source ? source[t] : i;
      u_[s] = input(scan_.u, i);
      delta_[s] = input(scan_.delta, j);
      if (s >= length_) continue;
      source_[s] = j;
      order_row_[s] = output_row(i);
      source_row_[s] = output_row(j);
      if (scan_.grad_y.data) grad_y_[s] = input(scan_.grad_y, i);
      gap_[s] = gap ? (T)gap[t] : (T)0;
      const Element *from_B = input(scan_.B, j), *from_C = input(scan_.C, j);
      for (int n = 0; n < states(); ++n) {
        B(s)[n] = load_one<T>(from_B + n);
        C(s)[n] = load_one<T>(from_C + n);
      }
    }
  }

  // Calls step(s, v, partial) for each step of the tile and vectors first to last; partial::value says whether the
  // vector is cut off by the end of the task's channels.
  template <bool kForwards, class Step>
  void sweep(int64_t first, int64_t last, const Step& step) const {
    const int64_t whole = lanes(last - 1) == kWidth ? last : last - 1;
    const int begin = kForwards ? 0 : length_ - 1, end = kForwards ? length_ : -1, by = kForwards ? 1 : -1;
    if constexpr (kStates == 1) {
      if (last - first > 1) {
        for (int s = begin; s != end; s += by) {
          for (int64_t v = first; v < whole; ++v) step(s, v, std::false_type{});
          if (whole < last) step(s, whole, std::true_type{});
        }
        return;
      }
    }
    for (int64_t v = first; v < whole; ++v)
      for (int s = begin; s != end; s += by) step(s, v, std::false_type{});
    if (whole < last)
      for (int s = begin; s != end; s += by) step(s, whole, std::true_type{});
  }

  // A loop over the states, unrolled where their number is known.
  template <class Body>
  void each_state(const Body& body) const {
    if constexpr (kStates == 1) {
      body(0);
    } else if constexpr (kStates > 1) {
#pragma GCC unroll 16
      for (int n = 0; n < kStates; ++n) body(n);
    } else {
      for (int n = 0; n < scan_.states; ++n) body(n);
    }
  }

  // Asks for a vector's worth of a row, which may lie in two cache lines.
  static void prefetch(const Element* from) {
    __builtin_prefetch(from);
    __builtin_prefetch(from + kWidth - 1);
  }

  V step_size(V raw) const { return scan_.softplus ? positive_part(raw) + log1p(exp_minus_abs(raw)) : raw; }

  V step_size(V raw, V* slope) const {  // slope is its derivative
    const V one = V{} + 1;
    *slope = one;
    if (!scan_.softplus) return raw;
    const V z = exp_minus_abs(raw);
    *slope = (raw < 0 ? z : one) / (one + z);
    return positive_part(raw) + log1p(z);
  }

  template <bool kEmit>
  void walk_forward(const T* entry, T* end, T* elapsed_sum) {
    Buffer<V> state(vectors_ * states()), time(vectors_);
    for (int64_t v = 0; v < vectors_ && entry; ++v)
      load_matrix<T>(state + v * states(), entry + channel(v) * states(), states(), lanes(v));
    for (int64_t start = task_.start; start < task_.stop; start += kTile) {
      enter_tile(start, start + kTile);
      for (int64_t v = 0; v < vectors_ && kEmit; ++v) {
        T* to = saved_state(start / kTile) + channel(v) * states();
        store_matrix<T>(to, state + v * states(), states(), lanes(v));
      }
      tile_forward<kEmit>(state, time);
    }
    for (int64_t v = 0; v < vectors_ && end; ++v) {
      store_matrix<T>(end + channel(v) * states(), state + v * states(), states(), lanes(v));
      store_first<T>(elapsed_sum + channel(v), time[v], lanes(v));
    }
  }

  template <bool kEmit>
  void tile_forward(V* state, V* time) {
    sweep<true>(0, vectors_, [&](int s, int64_t v, auto partial) __attribute__((always_inline)) {
      constexpr bool kPartial = decltype(partial)::value;
      const int64_t c = channel(v);
      const int width = kPartial ? lanes(v) : kWidth;
      prefetch(delta_[s + kAhead] + c);
      prefetch(u_[s + kAhead] + c);
      const V u = load_some<T, kPartial>(u_[s] + c, width);
      const V step = step_size(load_some<T, kPartial>(delta_[s] + c, width) + bias_[v]);
      const V elapsed = bounded(step + gap_[s] * rest_[v]), drive = step * u;
      const T *B_s = B(s), *C_s = C(s);
      const V* A = A_ + v * states();
      V* h = state + v * states();
      V y = skip_[v] * u;
      each_state([&](int n) __attribute__((always_inline)) {
        h[n] = exp2(elapsed * A[n]) * h[n] + drive * B_s[n];
        if (kEmit) y += h[n] * C_s[n];
      });
      if (kEmit)
        store_some<T, kPartial>((Element*)scan_.y + order_row_[s] + c, y, width);
      else
        time[v] += elapsed;
    });
  }

  void walk_backward(const T* adjoint, const Partials& partials) {
    Tape tape(states(), group());
    Totals totals(vectors_, states()), tile_totals(vectors_, states());
    Buffer<V> carry(vectors_ * states());
    for (int64_t v = 0; v < vectors_ && adjoint; ++v)
      load_matrix<T>(carry + v * states(), adjoint + channel(v) * states(), states(), lanes(v));
    for (int64_t start = last_tile(); start >= task_.start; start -= kTile) {
      enter_tile(start, start - kTile);
      __builtin_memset(tape.sum_B, 0, sizeof(T) * kTile * states());
      __builtin_memset(tape.sum_C, 0, sizeof(T) * kTile * states());
      for (int64_t first = 0; first < vectors_; first += group()) {
        replay_tile(start / kTile, first, first + group(), tape);
        tile_backward(first, first + group(), tape, tile_totals, carry);
      }
      totals.add(tile_totals, vectors_, states());
      for (int s = 0; s < length_; ++s) {
        const int64_t place = partials.row(scan_, task_, source_[s]) * states();
        __builtin_memcpy((T*)partials.B + place, (T*)(V*)tape.sum_B + s * states(), sizeof(T) * states());
        __builtin_memcpy((T*)partials.C + place, (T*)(V*)tape.sum_C + s * states(), sizeof(T) * states());
      }
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t place = partials.stretch(scan_, task_) + channel_index(v);
      store_matrix<T>((T*)partials.A + place * states(), totals.A + v * states(), states(), lanes(v));
      store_first<T>((T*)partials.D + place, totals.D[v], lanes(v));
      store_first<T>((T*)partials.delta_bias + place, totals.delta_bias[v], lanes(v));
      store_first<T>((T*)partials.rest + place, totals.rest[v], lanes(v));
    }
  }

  // Runs the tile's steps again from the saved state.
  void replay_tile(int64_t chunk, int64_t first, int64_t last, Tape& tape) {
    for (int64_t v = first; v < last; ++v)
      load_matrix<T>(tape.before + (v - first) * states(), saved_state(chunk) + channel(v) * states(), states(),
                     lanes(v));
    sweep<true>(first, last, [&](int s, int64_t v, auto partial) __attribute__((always_inline)) {
      constexpr bool kPartial = decltype(partial)::value;
      const int64_t c = channel(v), slot = s * (last - first) + v - first;
      const int width = kPartial ? lanes(v) : kWidth;
      prefetch(delta_[s + kAhead] + c);
      prefetch(u_[s + kAhead] + c);
      prefetch(grad_y_[s] + c);  // these are for tile_backward
      prefetch((Element*)scan_.grad_u + order_row_[s] + c);
      prefetch((Element*)scan_.grad_delta + source_row_[s] + c);
      const V u = load_some<T, kPartial>(u_[s] + c, width);
      V slope;
      const V step = step_size(load_some<T, kPartial>(delta_[s] + c, width) + bias_[v], &slope);
      tape.step[slot] = step, tape.slope[slot] = slope, tape.u[slot] = u;
      const V elapsed = bounded(step + gap_[s] * rest_[v]), drive = step * u;
      const T* B_s = B(s);
      const V *A = A_ + v * states(), *before = tape.before + slot * states();
      V *after = tape.before + (slot + last - first) * states(), *decay = tape.decay + slot * states();
      each_state([&](int n) __attribute__((always_inline)) {
        decay[n] = exp2(elapsed * A[n]);
        after[n] = decay[n] * before[n] + drive * B_s[n];
      });
    });
  }

  // Walks the tile backwards. On entry to step t, `carry` is decay_{t+1} g_{t+1}.
  void tile_backward(int64_t first, int64_t last, Tape& tape, Totals& totals, V* carry) {
    sweep<false>(first, last, [&](int s, int64_t v, auto partial) __attribute__((always_inline)) {
      constexpr bool kPartial = decltype(partial)::value;
      const int64_t c = channel(v), slot = s * (last - first) + v - first;
      const int width = kPartial ? lanes(v) : kWidth;
      const V dy = load_some<T, kPartial>(grad_y_[s] + c, width);
      const V step = tape.step[slot], u = tape.u[slot];
      const V elapsed = bounded(step + gap_[s] * rest_[v]), drive = step * u;
      const T *B_s = B(s), *C_s = C(s);
      const V *A = A_ + v * states(), *decay = tape.decay + slot * states();
      const V *before = tape.before + slot * states(), *after = tape.before + (slot + last - first) * states();
      V *g = carry + v * states(), *grad_A = totals.A + v * states();
      V *from_B = tape.grad_B + s % kFolded * states(), *from_C = tape.grad_C + s % kFolded * states();
      const bool more = kStates == 1 && v > first;  // channels than the row's first vector
      V grad_elapsed = {}, grad_drive = {};
      each_state([&](int n) __attribute__((always_inline)) {
        const V g_n = g[n] + dy * C_s[n];
        const V carried = g_n * decay[n], grad_exponent = carried * before[n];
        g[n] = carried;
        grad_A[n] += grad_exponent * elapsed;
        grad_elapsed += grad_exponent * A[n];
        grad_drive += g_n * B_s[n];
        from_B[n] = more ? from_B[n] + g_n * drive : g_n * drive;
        from_C[n] = more ? from_C[n] + dy * after[n] : dy * after[n];
      });
      grad_elapsed *= (T)(1 / kLog2E);  // A holds log2(e) A
      const V grad_raw = (grad_drive * u + grad_elapsed) * tape.slope[slot];
      store_some<T, kPartial>((Element*)scan_.grad_u + order_row_[s] + c, grad_drive * step + skip_[v] * dy, width);
      store_some<T, kPartial>((Element*)scan_.grad_delta + source_row_[s] + c, grad_raw, width);
      totals.D[v] += dy * u;
      totals.delta_bias[v] += grad_raw;
      totals.rest[v] += grad_elapsed * gap_[s];
      if (v + 1 == last && s % kFolded == 0) add_over_channels(s, tape);
    });
  }

  // Steps s to s + kFolded: their contributions to B and C are complete for one group of channels.
  void add_over_channels(int s, Tape& tape) const {
    for (int m = 0; m < kFolded * states(); m += kWidth) {
      tape.sum_B[(s * states() + m) / kWidth] += sums_over_lanes<T>(tape.grad_B + m);
      tape.sum_C[(s * states() + m) / kWidth] += sums_over_lanes<T>(tape.grad_C + m);
    }
  }

  void walk_adjoint(T* adjoint, T* elapsed_sum) {
    Buffer<V> carry(vectors_ * states()), time(vectors_);
    for (int64_t start = last_tile(); start >= task_.start; start -= kTile) {
      enter_tile(start, start - kTile);
      sweep<false>(0, vectors_, [&](int s, int64_t v, auto partial) __attribute__((always_inline)) {
        constexpr bool kPartial = decltype(partial)::value;
        const int64_t c = channel(v);
        const int width = kPartial ? lanes(v) : kWidth;
        const V dy = load_some<T, kPartial>(grad_y_[s] + c, width);
        const V step = step_size(load_some<T, kPartial>(delta_[s] + c, width) + bias_[v]);
        const V elapsed = bounded(step + gap_[s] * rest_[v]);
        const V* A = A_ + v * states();
        V* g = carry + v * states();
        each_state([&](int n) __attribute__((always_inline)) { g[n] = exp2(elapsed * A[n]) * (g[n] + dy * C(s)[n]); });
        time[v] += elapsed;
      });
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      store_matrix<T>(adjoint + channel(v) * states(), carry + v * states(), states(), lanes(v));
      store_first<T>(elapsed_sum + channel(v), time[v], lanes(v));
    }
  }

  int64_t last_tile() const { return task_.start + (task_.stop - 1 - task_.start) / kTile * kTile; }

  const Scan& scan_;
  const Task& task_;
  const int64_t vectors_;
  Buffer<V> A_;  // (vectors, N), times log2(e)
  Buffer<V> bias_, skip_, rest_;
  // Of the current tile:
  int length_;
  const Element *u_[kTile + kAhead], *delta_[kTile + kAhead], *grad_y_[kTile];  // rows
  int64_t source_[kTile], order_row_[kTile], source_row_[kTile];
  T gap_[kTile];
  Buffer<V> B_, C_;  // (kTile, N) elements
};

#include "scan_shared_kernel.h"

template <class T, class Element, int kStates>
KernelFunctions functions() {
  using K = Kernel<T, Element, kStates>;
  using Shared = SharedKernel<T, Element, kStates>;
  return {K::kWidth, K::forward, K::forward_carry, Shared::forward, K::backward, K::backward_carry, K::sum_blocks};
}

template <class T, class Element>
KernelFunctions functions_for(int64_t states) {
  if (states == 1) return functions<T, Element, 1>();
  if (states == 8) return functions<T, Element, 8>();
  if (states == 16) return functions<T, Element, 16>();
  return functions<T, Element, 0>();
}

inline KernelFunctions choose(int dtype, int64_t states) {
  if (dtype == kFloat32) return functions_for<float, float>(states);
  if (dtype == kBFloat16) return functions_for<float, BFloat16>(states);
  if (dtype == kFloat16) return functions<float, Float16, 0>();
  return functions<double, double, 0>();
}
