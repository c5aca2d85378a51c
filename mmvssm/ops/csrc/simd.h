// Vectors of one instruction set, and memory as rows of channels in a tensor's dtype.
//
// Compiled once per instruction set: instruction_sets.h includes it several times, each time inside a namespace of its
// own and with VECTOR_BYTES set to the width of the registers (hence no include guard). Neither it nor a kernel may use
// templates of the standard library: the linker may merge an instance compiled for AVX-512 with one used everywhere.

using Floats = float __attribute__((vector_size(VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using Words = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using HalfWords = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));
using Doubles = double __attribute__((vector_size(VECTOR_BYTES)));
using Longs = int64_t __attribute__((vector_size(VECTOR_BYTES)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Vector = Floats;
  using Mask = Ints;
};
template <>
struct Simd<double> {
  using Vector = Doubles;
  using Mask = Longs;
};
template <class T>
using VectorOf = typename Simd<T>::Vector;
template <class T>
constexpr int kLanes = VECTOR_BYTES / sizeof(T);

// An array of vectors, zero at first unless that is not wanted.
template <class V>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zero = true)
      : data_((V*)::operator new(count * sizeof(V), std::align_val_t{alignof(V)})) {
    if (zero) __builtin_memset(data_, 0, count * sizeof(V));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{alignof(V)}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator V*() const { return data_; }

 private:
  V* data_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Memory: rows of channels in the tensors' dtype, of which a vector at the end of a row takes only some
// ---------------------------------------------------------------------------------------------------------------------

inline Floats widen(BFloat16, HalfWords x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }

inline HalfWords narrow(BFloat16, Floats x) {
  const Words bits = (Words)x;
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  return __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, HalfWords);
}

inline Floats widen(Float16, HalfWords x) {
  const Words h = __builtin_convertvector(x, Words);
  const Floats magnitude = (Floats)((h & 0x7fff) << 13) * 0x1p112f;
  const Words special = (h & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000 : Words{};
  return (Floats)((Words)magnitude | special | (h & 0x8000) << 16);
}

inline HalfWords narrow(Float16, Floats x) {
  const Words sign = (Words)x & 0x80000000u, bits = (Words)x ^ sign;
  const Floats magnitude = (Floats)bits;
  const Words normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;  // to nearest, ties to even
  const Words subnormal = (Words)(magnitude + 0.5f) - 0x3f000000;                 // the addition rounds
  const Words special = magnitude == magnitude ? Words{} + 0x7c00 : Words{} + 0x7e00;
  const Words finite = magnitude < 0x1p-14f ? subnormal : normal;
  const Words half = magnitude < 65520.0f ? finite : special;
  return __builtin_convertvector(half | sign >> 16, HalfWords);
}

// In memory: the type of an element, and the vector of as many of them as T has lanes.
template <class T, class Element>
struct Packed {  // Element is BFloat16 or Float16
  using Vector = HalfWords;
  static inline VectorOf<T> widened(Vector x) { return widen(Element{}, x); }
  static inline Vector narrowed(VectorOf<T> x) { return narrow(Element{}, x); }
};
template <class T>
struct Packed<T, T> {
  using Vector = VectorOf<T>;
  static inline Vector widened(Vector x) { return x; }
  static inline Vector narrowed(Vector x) { return x; }
};

template <class T, class Element>
inline VectorOf<T> load(const Element* from) {
  typename Packed<T, Element>::Vector x;
  __builtin_memcpy(&x, from, sizeof x);
  return Packed<T, Element>::widened(x);
}

template <class T, class Element>
inline void store(Element* to, VectorOf<T> x) {
  const auto narrowed = Packed<T, Element>::narrowed(x);
  __builtin_memcpy(to, &narrowed, sizeof narrowed);
}

// A vector of which only the first lanes are in memory; the others are zero.
template <class T, class Element>
inline VectorOf<T> load_first(const Element* from, int lanes) {
  Element padded[kLanes<T>] = {};
  for (int i = 0; i < lanes; ++i) padded[i] = from[i];
  return load<T>(padded);
}

template <class T, class Element>
inline void store_first(Element* to, VectorOf<T> x, int lanes) {
  Element padded[kLanes<T>];
  store<T>(padded, x);
  for (int i = 0; i < lanes; ++i) to[i] = padded[i];
}

#if VECTOR_BYTES == 64
inline __mmask16 first(int lanes) { return (__mmask16)((1u << lanes) - 1); }

template <>
inline Floats load_first<float, float>(const float* from, int lanes) {
  return (Floats)_mm512_maskz_loadu_ps(first(lanes), from);
}
template <>
inline Floats load_first<float, BFloat16>(const BFloat16* from, int lanes) {
  return widen(BFloat16{}, (HalfWords)_mm256_maskz_loadu_epi16(first(lanes), from));
}
template <>
inline void store_first<float, float>(float* to, Floats x, int lanes) {
  _mm512_mask_storeu_ps(to, first(lanes), (__m512)x);
}
template <>
inline void store_first<float, BFloat16>(BFloat16* to, Floats x, int lanes) {
  _mm256_mask_storeu_epi16(to, first(lanes), (__m256i)narrow(BFloat16{}, x));
}
#endif

template <class T, bool kPartial, class Element>
inline VectorOf<T> load_some(const Element* from, int lanes) {
  return kPartial ? load_first<T>(from, lanes) : load<T>(from);
}

template <class T, bool kPartial, class Element>
inline void store_some(Element* to, VectorOf<T> x, int lanes) {
  kPartial ? store_first<T>(to, x, lanes) : store<T>(to, x);
}

template <class T, class Element>
inline T load_one(const Element* from) {
  Element padded[kLanes<T>] = {*from};
  return load<T>(padded)[0];
}
template <>
inline float load_one<float, float>(const float* from) {
  return *from;
}
template <>
inline double load_one<double, double>(const double* from) {
  return *from;
}
template <>
inline float load_one<float, BFloat16>(const BFloat16* from) {
  const uint32_t bits = (uint32_t)from->bits << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
