// Mathematics of the kernels on vectors. Compiled once per instruction set, as simd.h, which it needs.

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
