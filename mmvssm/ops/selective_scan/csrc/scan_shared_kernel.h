// The scan of all walks over an image, for a group of its channels, where they share all but B, order and gap.
//
// Part of scan_kernel.h. A step's decays exp(step A) are then the same for every walk. They cost as much as all the
// rest of the step, so they are computed once. A walk that passed absent positions multiplies them by
// exp(gap rest A), which is looked up unless the gap is large.

// Its base is the kernel of walk 0, the task's walk, and knows what the walks share.
template <class T, class Element, int kStates>
class SharedKernel : private Kernel<T, Element, kStates> {
 public:
  // Runs the task's steps, from the first to the last of the walks, writing y and, if there is place, saved states.
  static void forward(const Scan& scan, const Task& task) {
    SharedKernel kernel(scan, task);
    scan.gap.data ? kernel.template all_walks_forward<true>() : kernel.template all_walks_forward<false>();
  }

 private:
  using Base = Kernel<T, Element, kStates>;
  using V = VectorOf<T>;
  using Base::A_;
  using Base::bias_;
  using Base::C;
  using Base::channel;
  using Base::each_state;
  using Base::kWidth;
  using Base::lanes;
  using Base::next;
  using Base::now;
  using Base::prefetch;
  using Base::prefetch_output;
  using Base::rest_;
  using Base::scan_;
  using Base::skip_;
  using Base::states;
  using Base::step_size;
  using Base::task_;
  using Base::vectors_;

  // Steps that a walk takes, its state in registers, before the next walk takes them: their decays stay in L1.
  static constexpr int kBurst = 16;
  static constexpr int kAhead = 16;   // steps between asking for a row and reading it
  static constexpr int kLargest = 8;  // gap for which exp(gap rest A) is looked up

  // What a step is to one of the walks.
  struct Step {
    const Element* u;  // row
    void* y;           // row
    int32_t gap;
  };

  SharedKernel(const Scan& scan, const Task& task)
      : Base(scan, task),
        state_(scan.walks * vectors_ * states()),
        decay_((int64_t)kBurst * states(), false),
        step_(kBurst, false),
        fade_(scan.gap.data ? vectors_ * kLargest * states() : 0),
        steps_(scan.walks * (kTile + kAhead), false),
        B_((scan.walks * kTile * states() + kWidth - 1) / kWidth, false) {
    if (scan.gap.data) look_up_fades();
  }

  // exp(step A) exp(gap rest A) is exp((step + gap rest) A) unless one of the two overflows. None does if neither can
  // exceed one; where they can, nothing is looked up.
  void look_up_fades() {
    bool bounded_by_one = scan_.softplus;  // then no step is negative
    for (int64_t v = 0; v < vectors_; ++v) {
      for (int i = 0; i < kWidth; ++i) {
        bounded_by_one &= rest_[v][i] >= 0;
        for (int n = 0; n < states(); ++n) bounded_by_one &= A_[v * states() + n][i] <= 0;
      }
      for (int gap = 1; gap <= kLargest; ++gap) {
        const V elapsed = bounded((T)gap * rest_[v]);
        V* fade = fade_ + (v * kLargest + gap - 1) * states();
        for (int n = 0; n < states(); ++n) fade[n] = exp2(elapsed * A_[v * states() + n]);
      }
    }
    largest_ = bounded_by_one ? kLargest : 0;
  }

  V* state(int64_t k, int64_t v) const { return state_ + (k * vectors_ + v) * states(); }
  const Step* steps(int64_t k) const { return steps_ + k * (kTile + kAhead); }
  T* B(int64_t k, int s) const { return (T*)(V*)B_ + (k * kTile + s) * states(); }

  template <bool kGaps>
  void all_walks_forward() {
    for (int64_t start = task_.start; start < task_.stop; start += kTile) {
      Base::enter_tile(start, start + kTile);
      for (int64_t k = 0; k < scan_.walks; ++k) enter_walk(k, start);
      for (int64_t v = 0; v < vectors_; ++v)
        lanes(v) == kWidth ? tile_forward<kGaps, false>(v, start / kTile) : tile_forward<kGaps, true>(v, start / kTile);
      Base::leave_tile();
    }
  }

  // Does for walk k what enter_tile does for what the walks share: looks up the tile's steps, and the next tile's first
  // ones only to prefetch them.
  void enter_walk(int64_t k, int64_t start) {
    const int64_t b = task_.batch;
    const int32_t *order = scan_.order.walk(b, k), *source = scan_.source.walk(b, k), *gap = scan_.gap.walk(b, k);
    for (int s = 0; s < now().length + kAhead; ++s) {
      const int64_t t = start + s < task_.stop ? start + s : start;
      const int64_t i = order ? order[t] : t, j = source ? source[t] : i;
      void* y = Base::output(scan_.y, scan_.sum_y, i, k);
      steps_[k * (kTile + kAhead) + s] = {Base::input(scan_.u, i, k), y, gap ? gap[t] : 0};
      if (s >= now().length) continue;
      const Element* from_B = Base::input(scan_.B, j, k);
      for (int n = 0; n < states(); ++n) B(k, s)[n] = load_one<T>(from_B + n);
    }
  }

  template <bool kGaps, bool kPartial>
  void tile_forward(int64_t v, int64_t chunk) {
    for (int64_t k = 0; k < scan_.walks && scan_.saved_states; ++k) {
      T* to = Base::saved_state(chunk, k) + channel(v) * states();
      store_matrix<T>(to, state(k, v), states(), lanes(v));
    }
    const int length = now().length;
    for (int first = 0; first < length; first += kBurst) {
      const int last = length - first < kBurst ? length : first + kBurst;
      decay_forward<kPartial>(v, first, last);
      for (int64_t k = 0; k < scan_.walks; ++k) burst_forward<kGaps, kPartial>(k, v, first, last);
    }
  }

  // What steps first to last are to all walks, for one vector of channels.
  template <bool kPartial>
  void decay_forward(int64_t v, int first, int last) {
    const int64_t c = channel(v);
    const V* A = A_ + v * states();
    for (int s = first; s < last; ++s) {
      prefetch(next().delta[s] + c);
      const V step = step_size(load_some<T, kPartial>(now().delta[s] + c, lanes(v)) + bias_[v]);
      const V elapsed = bounded(step);
      V* decay = decay_ + (s - first) * states();
      step_[s - first] = step;
      each_state([&](int n) __attribute__((always_inline)) { decay[n] = exp2(elapsed * A[n]); });
    }
  }

  // Walk k takes them.
  template <bool kGaps, bool kPartial>
  void burst_forward(int64_t k, int64_t v, int first, int last) {
    const int64_t c = channel(v);
    const int width = kPartial ? lanes(v) : kWidth;
    const bool add = scan_.sum_y;
    const Step* steps = this->steps(k);
    const V skip = skip_[v], rest = rest_[v];
    const V *A = A_ + v * states(), *fades = fade_ + v * kLargest * states();
    V registers[kStates ? kStates : 1];  // of the state, where their number is known
    V* h = kStates ? registers : state(k, v);
    if (kStates) each_state([&](int n) __attribute__((always_inline)) { h[n] = state(k, v)[n]; });
    for (int s = first; s < last; ++s) {
      prefetch(steps[s + kAhead].u + c);
      prefetch_output(steps[s + kAhead].y, add, c);
      const V u = load_some<T, kPartial>(steps[s].u + c, width);
      const V step = step_[s - first], drive = step * u;
      const V* decay = decay_ + (s - first) * states();
      const T *B_s = B(k, s), *C_s = C(s);
      V y = skip * u;
      const int32_t gap = kGaps ? steps[s].gap : 0;
      if (gap == 0) {
        each_state([&](int n) __attribute__((always_inline)) {
          h[n] = decay[n] * h[n] + drive * B_s[n];
          y += h[n] * C_s[n];
        });
      } else if (gap > 0 && gap <= largest_) {
        const V* fade = fades + (gap - 1) * states();
        each_state([&](int n) __attribute__((always_inline)) {
          h[n] = decay[n] * fade[n] * h[n] + drive * B_s[n];
          y += h[n] * C_s[n];
        });
      } else {
        const V elapsed = bounded(step + (T)gap * rest);
        each_state([&](int n) __attribute__((always_inline)) {
          h[n] = exp2(elapsed * A[n]) * h[n] + drive * B_s[n];
          y += h[n] * C_s[n];
        });
      }
      Base::template put<kPartial>(steps[s].y, add, c, y, width);
    }
    if (kStates) each_state([&](int n) __attribute__((always_inline)) { state(k, v)[n] = h[n]; });
  }

  Buffer<V> state_;      // (K, vectors, N)
  Buffer<V> decay_;      // (kBurst, N), of the current burst
  Buffer<V> step_;       // (kBurst)
  Buffer<V> fade_;       // (vectors, kLargest, N): exp(gap rest A) for gaps from 1 on
  int32_t largest_ = 0;  // gap that is looked up
  // Of the current tile:
  Buffer<Step> steps_;  // (K, kTile + kAhead)
  Buffer<V> B_;         // (K, kTile, N) elements
};
