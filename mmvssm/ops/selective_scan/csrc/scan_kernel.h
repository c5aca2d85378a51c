// The scan over one stretch of one walk, for a group of its channels. See scan_cpu.cpp for the mathematics.
//
// This file is compiled once per instruction set: see instruction_sets.h and, for what it must not use, simd.h.
//
// Vectors run over channels, which are adjacent in memory. Steps are handled in tiles of kTile: one vector of channels
// after the other, or a few together, runs through a tile with its state in registers, while what the same channels
// need in the tile that follows is fetched. Where loops are long, what they use is copied to local variables: a
// compiler cannot tell that members do not change when tensors are written.

#include "../../csrc/vector_math.h"

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

// x with the lanes that are kDistance apart exchanged.
template <class T, int kDistance, int... I>
inline VectorOf<T> exchanged(VectorOf<T> x, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, (I ^ kDistance)...);
#else
  return __builtin_shuffle(x, typename Simd<T>::Mask{(I ^ kDistance)...});
#endif
}

// Lanes of b where their number has the bit kDistance, else of a.
template <class T, int kDistance, int... I>
inline VectorOf<T> blended(VectorOf<T> a, VectorOf<T> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (I & kDistance ? I + (int)sizeof...(I) : I)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::Mask{(I & kDistance ? I + (int)sizeof...(I) : I)...});
#endif
}

// Sums over lanes of kCount vectors, a power of two: lane i of the result is the sum of the vector at(first + i). They
// are asked for in order and added up in pairs, so that few of them exist at a time.
template <class T, int kCount, class At>
inline __attribute__((always_inline)) VectorOf<T> sums_over_lanes(const At& at, int first) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>{};
  if constexpr (kCount == 1) {
    return at(first);
  } else {
    constexpr int kHalf = kCount / 2;
    const VectorOf<T> a = sums_over_lanes<T, kHalf>(at, first), b = sums_over_lanes<T, kHalf>(at, first + kHalf);
    return blended<T, kHalf>(a, b, kAll) + exchanged<T, kHalf>(blended<T, kHalf>(b, a, kAll), kAll);
  }
}

// Adds up lanes that are kCount, 2 kCount, ... apart.
template <class T, int kCount>
inline VectorOf<T> sums_of_rest(VectorOf<T> x) {
  if constexpr (kCount < kLanes<T>) {
    x = sums_of_rest<T, 2 * kCount>(x);
    x += exchanged<T, kCount>(x, std::make_integer_sequence<int, kLanes<T>>{});
  }
  return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// The scan
// ---------------------------------------------------------------------------------------------------------------------

// kStates is the number of states N where that is known when compiling, else 0.
template <class T, class Element, int kStates>
class Kernel {
 public:
  static constexpr int kWidth = kLanes<T>;

  // Runs the task's steps from the state `entry` (zero if null), writing y and, if there is place, the saved states.
  static void forward(const Scan& scan, const Task& task, const void* entry) {
    scan.sum_y ? Kernel(scan, task).template walk_forward<true, true>((const T*)entry, nullptr, nullptr)
               : Kernel(scan, task).template walk_forward<true, false>((const T*)entry, nullptr, nullptr);
  }

  // Runs them from a zero state for nothing but the state in which they end and the time that passes, per channel.
  static void forward_carry(const Scan& scan, const Task& task, void* end, void* elapsed) {
    Kernel(scan, task).template walk_forward<false, false>(nullptr, (T*)end, (T*)elapsed);
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

  // Vectors of channels whose states are in registers at the same time. With one state there is little to do for a
  // vector, so that several share what a step costs.
  static constexpr int kGroup = kStates == 1 ? 4 : 1;
  static constexpr int kLocal = kStates ? kStates : 1;  // states, where their number is known

  // Where the steps of a tile read and write.
  struct Rows {
    int length = 0;
    const Element *u[kTile], *delta[kTile], *grad_y[kTile];
    void *y[kTile], *grad_u[kTile], *grad_delta[kTile];
    int64_t source[kTile];
  };

  // What the backward pass notes of a vector of channels while it runs a tile forwards, to use it on the way back.
  struct Tape {
    explicit Tape(int states)
        : before(kTile * states, false), decay(kTile * states, false), step(kTile, false), slope(kTile, false) {}
    Buffer<V> before;       // (kTile, N): the state before each step
    Buffer<V> decay;        // (kTile, N)
    Buffer<V> step, slope;  // (kTile): slope is the derivative of the step by delta
  };

  // Gradients of B or C at the steps of a tile, summed over the task's channels.
  class Sums {
   public:
    explicit Sums(int states) : sums_((kTile * states + kWidth - 1) / kWidth + 1, false), terms_(kTerms(states)) {}

    // Adds term(n), for a vector of channels, at step s. These are the task's first channels if `begin`.
    template <class Term>
    inline __attribute__((always_inline)) void add(int s, int states, bool begin, const Term& term) {
      if constexpr (kStates == 1) {
        terms_[s] = begin ? term(0) : terms_[s] + term(0);  // lanes are added up by finish
      } else if constexpr (kStates > 1) {
        constexpr int kCount = kStates < kWidth ? kStates : kWidth;
#pragma GCC unroll 16
        for (int n = 0; n < kStates; n += kCount)
          put<kCount>(s * kStates + n, begin, sums_of_rest<T, kCount>(sums_over_lanes<T, kCount>(term, n)));
      } else {
        for (int n = 0; n < states; ++n) terms_[n] = term(n);  // those that follow stay zero
        for (int n = 0; n < states; n += kWidth) {
          const V sum = sums_over_lanes<T, kWidth>([&](int m) { return terms_[m]; }, n);
          for (int i = 0; i < kWidth && n + i < states; ++i) {
            T& to = data()[s * states + n + i];
            to = begin ? sum[i] : to + sum[i];
          }
        }
      }
    }

    // After the last vector of channels. Returns (kTile, N).
    const T* finish() {
      if constexpr (kStates == 1)
        for (int s = 0; s < kTile; s += kWidth)
          sums_[s / kWidth] = sums_over_lanes<T, kWidth>([&](int m) { return terms_[m]; }, s);
      return data();
    }

   private:
    static constexpr int64_t kTerms(int states) { return kStates == 1 ? kTile : (states / kWidth + 1) * kWidth; }
    T* data() const { return (T*)(V*)sums_; }
    template <int kCount>
    void put(int place, bool begin, V sum) {
      if (!begin) sum += load_some<T, (kCount < kWidth)>(data() + place, kCount);
      store_some<T, (kCount < kWidth)>(data() + place, sum, kCount);
    }
    Buffer<V> sums_;   // (kTile, N) elements
    Buffer<V> terms_;  // of one step, or with one state of all
  };

  // Gradients per channel, summed over steps.
  struct Totals {
    Totals(int64_t vectors, int states) : A(vectors * states), D(vectors), delta_bias(vectors), rest(vectors) {}
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
  void* output(void* x, Scan::Sum sum, int64_t token) const { return output(x, sum, token, task_.walk); }
  void* output(void* x, Scan::Sum sum, int64_t token, int64_t walk) const {
    const int64_t row = task_.batch * scan_.length + token, row_of_walk = row * scan_.walks + walk;
    if (sum == Scan::kPerWalk) return (Element*)x + row_of_walk * scan_.channels;
    return (T*)x + (sum == Scan::kSums ? row : row_of_walk) * scan_.channels;
  }
  T* saved_state(int64_t chunk) const { return saved_state(chunk, task_.walk); }
  T* saved_state(int64_t chunk, int64_t walk) const {  // (B, K, S, D, N)
    const int64_t chunks = (scan_.length + kTile - 1) / kTile;
    return (T*)scan_.saved_states + ((task_.batch * scan_.walks + walk) * chunks + chunk) * scan_.channels * states();
  }
  T* B(int s) const { return (T*)(V*)B_ + s * states(); }
  T* C(int s) const { return (T*)(V*)C_ + s * states(); }

  // Looks up what the steps of the tile at `start` have in common for all channels, and where those of the one at
  // `next`, which follows, read and write: that is fetched meanwhile.
  void enter_tile(int64_t start, int64_t next) {
    if (now().length == 0) look_up_rows(start);
    now_ ^= 1;
    look_up_rows(next < task_.start || next >= task_.stop ? start : next);
    now_ ^= 1;
    const Rows& rows = now();
    const int32_t* gap = scan_.gap.walk(task_.batch, task_.walk);
    for (int s = 0; s < rows.length; ++s) {
      gap_[s] = gap ? (T)gap[start + s] : (T)0;
      const Element *from_B = input(scan_.B, rows.source[s]), *from_C = input(scan_.C, rows.source[s]);
      for (int n = 0; n < states(); ++n) {
        B(s)[n] = load_one<T>(from_B + n);
        C(s)[n] = load_one<T>(from_C + n);
      }
    }
  }
  void leave_tile() { now_ ^= 1; }

  const Rows& now() const { return rows_[now_]; }
  const Rows& next() const { return rows_[now_ ^ 1]; }

  void look_up_rows(int64_t start) {
    Rows& rows = rows_[now_];
    rows.length = (int)((start + kTile < task_.stop ? start + kTile : task_.stop) - start);
    const int32_t* order = scan_.order.walk(task_.batch, task_.walk);
    const int32_t* source = scan_.source.walk(task_.batch, task_.walk);
    for (int s = 0; s < kTile; ++s) {
      const int64_t t = s < rows.length ? start + s : start;  // those beyond are only fetched
      const int64_t i = order ? order[t] : t, j = source ? source[t] : i;
      rows.source[s] = j;
      rows.u[s] = input(scan_.u, i);
      rows.delta[s] = input(scan_.delta, j);
      rows.grad_y[s] = input(scan_.grad_y, i);
      rows.y[s] = output(scan_.y, scan_.sum_y, i);
      rows.grad_u[s] = output(scan_.grad_u, scan_.sum_grad_u, i);
      rows.grad_delta[s] = output(scan_.grad_delta, scan_.sum_grad_delta, j);
    }
  }

  // Calls body(v, count, partial) for the vectors in groups of kGroup, then for single ones. `count` and `partial` are
  // constants; the latter says whether the vector is cut off by the end of the task's channels.
  template <class Body>
  void each_group(const Body& body) const {
    const int64_t whole = lanes(vectors_ - 1) == kWidth ? vectors_ : vectors_ - 1;
    int64_t v = 0;
    for (; v + kGroup <= whole; v += kGroup) body(v, std::integral_constant<int, kGroup>{}, std::false_type{});
    if (kGroup > 1)
      for (; v < whole; ++v) body(v, std::integral_constant<int, 1>{}, std::false_type{});
    if (whole < vectors_) body(whole, std::integral_constant<int, 1>{}, std::true_type{});
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

  // Asks for a vector's worth of a row. It may lie in two cache lines; the second is asked for with the next vector.
  static void prefetch(const Element* from) { __builtin_prefetch(from, 0, 2); }
  static void prefetch_output(void* row, bool add, int64_t c) {
    __builtin_prefetch(add ? (void*)((T*)row + c) : (Element*)row + c, 1, 2);
  }

  // Writes channels from c on to an output's row, or adds them to it.
  template <bool kPartial>
  static void put(void* row, bool add, int64_t c, V x, int width) {
    if (!add) return store_some<T, kPartial>((Element*)row + c, x, width);
    T* to = (T*)row + c;
    store_some<T, kPartial>(to, load_some<T, kPartial>(to, width) + x, width);
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

  // With kAdd, walks add to y.
  template <bool kEmit, bool kAdd>
  void walk_forward(const T* entry, T* end, T* elapsed_sum) {
    Buffer<V> state(vectors_ * states()), time(vectors_);
    for (int64_t v = 0; v < vectors_ && entry; ++v)
      load_matrix<T>(state + v * states(), entry + channel(v) * states(), states(), lanes(v));
    for (int64_t start = task_.start; start < task_.stop; start += kTile) {
      enter_tile(start, start + kTile);
      for (int64_t v = 0; v < vectors_ && kEmit && scan_.saved_states; ++v) {
        T* to = saved_state(start / kTile) + channel(v) * states();
        store_matrix<T>(to, state + v * states(), states(), lanes(v));
      }
      each_group([&](int64_t v, auto count, auto partial) {
        tile_forward<kEmit, kAdd, decltype(count)::value, decltype(partial)::value>(v, state, time);
      });
      leave_tile();
    }
    for (int64_t v = 0; v < vectors_ && end; ++v) {
      store_matrix<T>(end + channel(v) * states(), state + v * states(), states(), lanes(v));
      store_first<T>(elapsed_sum + channel(v), time[v], lanes(v));
    }
  }

  // kCount vectors of channels from v on take the tile's steps.
  template <bool kEmit, bool kAdd, int kCount, bool kPartial>
  void tile_forward(int64_t v, V* states_of_all, V* times) const {
    const Rows &now = this->now(), &next = this->next();
    const int64_t c = channel(v);
    const int width = lanes(v + kCount - 1), length = now.length;
    V local_state[kCount * kLocal], local_A[kCount * kLocal], bias[kCount], skip[kCount], rest[kCount], time[kCount];
    V* h = kStates ? local_state : states_of_all + v * states();
    const V* A = kStates ? local_A : A_ + v * states();
    for (int i = 0; kStates && i < kCount * kStates; ++i) {
      h[i] = states_of_all[v * kStates + i];
      local_A[i] = A_[v * kStates + i];
    }
    for (int i = 0; i < kCount; ++i)
      bias[i] = bias_[v + i], skip[i] = skip_[v + i], rest[i] = rest_[v + i], time[i] = V{};
    for (int s = 0; s < length; ++s) {
      const Element *delta_row = now.delta[s] + c, *u_row = now.u[s] + c;
      const T gap = gap_[s];
      const T *B_s = B(s), *C_s = C(s);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        prefetch(next.delta[s] + c + i * kWidth);
        prefetch(next.u[s] + c + i * kWidth);
        if (kEmit) prefetch_output(next.y[s], kAdd, c + i * kWidth);
        const V u = load_some<T, kPartial>(u_row + i * kWidth, width);
        const V step = step_size(load_some<T, kPartial>(delta_row + i * kWidth, width) + bias[i]);
        const V elapsed = bounded(step + gap * rest[i]), drive = step * u;
        V y = skip[i] * u;
        each_state([&](int n) __attribute__((always_inline)) {
          V& state = h[i * states() + n];
          state = exp2(elapsed * A[i * states() + n]) * state + drive * B_s[n];
          if (kEmit) y += state * C_s[n];
        });
        if (kEmit)
          put<kPartial>(now.y[s], kAdd, c + i * kWidth, y, width);
        else
          time[i] += elapsed;
      }
    }
    for (int i = 0; i < kCount; ++i) times[v + i] += time[i];
    for (int i = 0; kStates && i < kCount * kStates; ++i) states_of_all[v * kStates + i] = h[i];
  }

  void walk_backward(const T* adjoint, const Partials& partials) {
    Tape tape(states());
    Sums sum_B(states()), sum_C(states());
    Totals totals(vectors_, states());
    Buffer<V> carry(vectors_ * states());
    for (int64_t v = 0; v < vectors_ && adjoint; ++v)
      load_matrix<T>(carry + v * states(), adjoint + channel(v) * states(), states(), lanes(v));
    for (int64_t start = last_tile(); start >= task_.start; start -= kTile) {
      enter_tile(start, start - kTile);
      for (int64_t v = 0; v < vectors_; ++v)
        lanes(v) == kWidth ? tile_backward<false>(v, start / kTile, tape, sum_B, sum_C, totals, carry)
                           : tile_backward<true>(v, start / kTile, tape, sum_B, sum_C, totals, carry);
      const T *of_B = sum_B.finish(), *of_C = sum_C.finish();
      for (int s = 0; s < now().length; ++s) {
        const int64_t place = partials.row(scan_, task_, now().source[s]) * states();
        for (int n = 0; n < states(); ++n) {
          ((T*)partials.B)[place + n] = of_B[s * states() + n];
          ((T*)partials.C)[place + n] = of_C[s * states() + n];
        }
      }
      leave_tile();
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t place = partials.stretch(scan_, task_) + channel_index(v);
      store_matrix<T>((T*)partials.A + place * states(), totals.A + v * states(), states(), lanes(v));
      store_first<T>((T*)partials.D + place, totals.D[v], lanes(v));
      store_first<T>((T*)partials.delta_bias + place, totals.delta_bias[v], lanes(v));
      store_first<T>((T*)partials.rest + place, totals.rest[v], lanes(v));
    }
  }

  template <bool kPartial>
  void tile_backward(int64_t v, int64_t chunk, Tape& tape, Sums& sum_B, Sums& sum_C, Totals& totals, V* carry) const {
    replay_tile<kPartial>(v, chunk, tape, sum_C);
    return_through_tile<kPartial>(v, tape, sum_B, totals, carry + v * states());
  }

  // One vector of channels takes the tile's steps again, from the saved state.
  template <bool kPartial>
  void replay_tile(int64_t v, int64_t chunk, const Tape& tape, Sums& sum_C) const {
    const Rows& now = this->now();
    const int64_t c = channel(v);
    const int width = lanes(v), length = now.length, states = this->states();
    V *const steps = tape.step, *const slopes = tape.slope, *decay = tape.decay, *before = tape.before;
    V local_state[kLocal], local_A[kLocal];
    V* h = local_state;
    const V* A = local_A;
    const Buffer<V> more(kStates ? 0 : states);
    if (!kStates) h = more, A = A_ + v * states;
    for (int n = 0; kStates && n < kStates; ++n) local_A[n] = A_[v * kStates + n];
    load_matrix<T>(h, saved_state(chunk) + c * states, states, width);
    const V bias = bias_[v], rest = rest_[v];
    for (int s = 0; s < length; ++s, decay += states, before += states) {
      const V u = load_some<T, kPartial>(now.u[s] + c, width), dy = load_some<T, kPartial>(now.grad_y[s] + c, width);
      V slope;
      const V step = step_size(load_some<T, kPartial>(now.delta[s] + c, width) + bias, &slope);
      steps[s] = step, slopes[s] = slope;
      const V elapsed = bounded(step + gap_[s] * rest), drive = step * u;
      const T* B_s = B(s);
      sum_C.add(s, states, v == 0, [&](int n) __attribute__((always_inline)) {
        const V d = exp2(elapsed * A[n]), h_n = h[n];
        decay[n] = d, before[n] = h_n;
        return dy * (h[n] = d * h_n + drive * B_s[n]);
      });
    }
  }

  // And goes back through them. On entry to step t, `carry` is decay_{t+1} g_{t+1}.
  template <bool kPartial>
  void return_through_tile(int64_t v, const Tape& tape, Sums& sum_B, Totals& totals, V* carry) const {
    const Rows &now = this->now(), &next = this->next();
    const int64_t c = channel(v);
    const int width = lanes(v), length = now.length, states = this->states();
    const bool add_u = scan_.sum_grad_u, add_delta = scan_.sum_grad_delta;
    const V *const steps = tape.step, *const slopes = tape.slope;
    const V *decay = tape.decay + length * states, *before = tape.before + length * states;
    // Of the tile alone: rounding errors would grow with the length if single steps were added to the totals.
    V local_g[kLocal], local_A[kLocal], local_grad_A[kLocal], grad_D = {}, grad_bias = {}, grad_rest = {};
    V *g = local_g, *grad_A = local_grad_A;
    const V* A = local_A;
    const Buffer<V> more(kStates ? 0 : states);
    if (!kStates) g = carry, A = A_ + v * states, grad_A = more;
    for (int n = 0; kStates && n < kStates; ++n) g[n] = carry[n], local_A[n] = A_[v * kStates + n], grad_A[n] = V{};
    const V skip = skip_[v], rest = rest_[v];
    // The tile that follows is fetched row by row, this vector's share of it: in the order of memory, which is faster.
    int64_t row = kTile - 1 - v * kTile / vectors_, place = channel(v * kTile % vectors_);
    for (int s = length - 1; s >= 0; --s) {
      decay -= states, before -= states;
      prefetch(next.delta[row] + place);
      prefetch(next.u[row] + place);
      prefetch(next.grad_y[row] + place);
      prefetch_output(next.grad_u[row], add_u, place);
      prefetch_output(next.grad_delta[row], add_delta, place);
      place += kWidth;
      if (place >= task_.last_channel) place = task_.first_channel, --row;
      const V u = load_some<T, kPartial>(now.u[s] + c, width), dy = load_some<T, kPartial>(now.grad_y[s] + c, width);
      const V step = steps[s], elapsed = bounded(step + gap_[s] * rest), drive = step * u;
      const T *B_s = B(s), *C_s = C(s);
      V grad_elapsed = {}, grad_drive = {};
      sum_B.add(s, states, v == 0, [&](int n) __attribute__((always_inline)) {
        const V g_n = g[n] + dy * C_s[n], carried = g_n * decay[n], grad_exponent = carried * before[n];
        g[n] = carried;
        grad_A[n] += grad_exponent * elapsed;
        grad_elapsed += grad_exponent * A[n];
        grad_drive += g_n * B_s[n];
        return g_n * drive;
      });
      grad_elapsed *= (T)(1 / kLog2E);  // A holds log2(e) A
      const V grad_raw = (grad_drive * u + grad_elapsed) * slopes[s];
      put<kPartial>(now.grad_u[s], add_u, c, grad_drive * step + skip * dy, width);
      put<kPartial>(now.grad_delta[s], add_delta, c, grad_raw, width);
      grad_D += dy * u;
      grad_bias += grad_raw;
      grad_rest += grad_elapsed * gap_[s];
    }
    for (int n = 0; n < states; ++n) totals.A[v * states + n] += grad_A[n], carry[n] = g[n];
    totals.D[v] += grad_D, totals.delta_bias[v] += grad_bias, totals.rest[v] += grad_rest;
  }

  void walk_adjoint(T* adjoint, T* elapsed_sum) {
    Buffer<V> carry(vectors_ * states()), time(vectors_);
    for (int64_t start = last_tile(); start >= task_.start; start -= kTile) {
      enter_tile(start, start - kTile);
      for (int64_t v = 0; v < vectors_; ++v)
        lanes(v) == kWidth ? tile_adjoint<false>(v, carry, time) : tile_adjoint<true>(v, carry, time);
      leave_tile();
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      store_matrix<T>(adjoint + channel(v) * states(), carry + v * states(), states(), lanes(v));
      store_first<T>(elapsed_sum + channel(v), time[v], lanes(v));
    }
  }

  template <bool kPartial>
  void tile_adjoint(int64_t v, V* carry, V* times) const {
    const Rows& now = this->now();
    const int64_t c = channel(v);
    const int width = lanes(v);
    const V *A = A_ + v * states(), bias = bias_[v], rest = rest_[v];
    V *g = carry + v * states(), time = {};
    for (int s = now.length - 1; s >= 0; --s) {
      const V dy = load_some<T, kPartial>(now.grad_y[s] + c, width);
      const V step = step_size(load_some<T, kPartial>(now.delta[s] + c, width) + bias);
      const V elapsed = bounded(step + gap_[s] * rest);
      each_state([&](int n) __attribute__((always_inline)) { g[n] = exp2(elapsed * A[n]) * (g[n] + dy * C(s)[n]); });
      time += elapsed;
    }
    times[v] += time;
  }

  int64_t last_tile() const { return task_.start + (task_.stop - 1 - task_.start) / kTile * kTile; }

  const Scan& scan_;
  const Task& task_;
  const int64_t vectors_;
  Buffer<V> A_;  // (vectors, N), times log2(e)
  Buffer<V> bias_, skip_, rest_;
  Rows rows_[2];  // of the current tile and of the one that follows; now_ says which is which
  int now_ = 0;
  // Of the current tile:
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
#if VECTOR_BYTES > 16 || !defined(__x86_64__)  // x86-64 processors without AVX2 are rare, and compiling takes long
  if (states == 8) return functions<T, Element, 8>();
  if (states == 16) return functions<T, Element, 16>();
#endif
  return functions<T, Element, 0>();
}

inline KernelFunctions choose(int64_t dtype, int64_t states) {
  if (dtype == kFloat32) return functions_for<float, float>(states);
  if (dtype == kBFloat16) return functions_for<float, BFloat16>(states);
  if (dtype == kFloat16) return functions<float, Float16, 0>();
  return functions<double, double, 0>();
}
