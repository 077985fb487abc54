// Vectors of floats and their conversions, written with the compiler's portable vectors: the same source is AVX-512,
// AVX2, SSE2 or NEON by the flags of the file that includes it. Everything is in an unnamed namespace: a shared inline
// function compiled with AVX-512 could otherwise be picked by the linker for machines without it.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of 16-bit numbers are read as one 32-bit word");

namespace commfuse {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#define COMMFUSE_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define COMMFUSE_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define COMMFUSE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define COMMFUSE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define COMMFUSE_SWAP1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define COMMFUSE_SWAP2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define COMMFUSE_SWAP4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#define COMMFUSE_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define COMMFUSE_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define COMMFUSE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define COMMFUSE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define COMMFUSE_SWAP1 1, 0, 3, 2, 5, 4, 7, 6
#define COMMFUSE_SWAP2 2, 3, 0, 1, 6, 7, 4, 5
#define COMMFUSE_SWAP4 4, 5, 6, 7, 0, 1, 2, 3
#else
constexpr int kLanes = 4;
#define COMMFUSE_EVEN 0, 2, 4, 6
#define COMMFUSE_ODD 1, 3, 5, 7
#define COMMFUSE_LOW 0, 4, 1, 5
#define COMMFUSE_HIGH 2, 6, 3, 7
#define COMMFUSE_SWAP1 1, 0, 3, 2
#define COMMFUSE_SWAP2 2, 3, 0, 1
#define COMMFUSE_SWAP4 0, 1, 2, 3
#endif
constexpr int kUnit = 2 * kLanes;  // elements that are loaded, computed and stored together

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));  // a unit of 16-bit numbers
typedef int8_t Bytes __attribute__((vector_size(2 * kLanes)));    // a unit of bytes

// The floats of a unit. In which order the two vectors hold them is the business of each dtype (see Bf16).
template <typename V>
struct Two {
  V a, b;
};
typedef Two<F> Pair;

template <typename To, typename From>
inline To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
inline V load(const void* address) {
  V v;
  memcpy(&v, address, sizeof v);
  return v;
}

template <typename V>
inline void store(void* address, V v) {
  memcpy(address, &v, sizeof v);
}

inline F splat(float x) { return x - F{}; }
inline U splat_bits(uint32_t x) { return x - U{}; }

constexpr uint32_t kAbs = 0x7fffffff, kInfinity = 0x7f800000, kNan = 0x7fc00000;

inline I is_nan(F x) { return x != x; }

// 16 bits to 32 and back (of each lane's low half). Spelled out for x86, because __builtin_convertvector is taken apart
// lane by lane, or half by half, by some compilers.
inline U widen_halves(H x) {
#if defined(__AVX512F__)
  return cast_bits<U>(_mm512_cvtepu16_epi32(cast_bits<__m256i>(x)));
#elif defined(__AVX2__)
  return cast_bits<U>(_mm256_cvtepu16_epi32(cast_bits<__m128i>(x)));
#else
  return __builtin_convertvector(x, U);
#endif
}

inline H low_halves(U x) {
#if defined(__AVX512F__)
  return cast_bits<H>(_mm512_cvtepi32_epi16(cast_bits<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(cast_bits<__m256i>(x & 0xffff), __m256i{});
  return cast_bits<H>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const Shorts halves = cast_bits<Shorts>(x);
  return cast_bits<H>(__builtin_shufflevector(halves, halves, COMMFUSE_EVEN));
#endif
}

// To nearest even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction, and the low bits are the integer's.
inline U rounded_bits(F x) { return cast_bits<U>(x + splat(12582912.0f)); }
inline I round_to_int(F x) { return cast_bits<I>(rounded_bits(x) - 0x4b400000u); }

// The low byte of each lane of a unit in natural order.
inline Bytes natural_low_bytes(U a, U b) {
#if defined(__AVX512F__)
  const __m128i low = _mm512_cvtepi32_epi8(cast_bits<__m512i>(a)), high = _mm512_cvtepi32_epi8(cast_bits<__m512i>(b));
  return cast_bits<Bytes>(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
#else
  const Two<H> halves = {low_halves(a & 0xff), low_halves(b & 0xff)};
#if defined(__AVX2__)
  return cast_bits<Bytes>(_mm_packus_epi16(cast_bits<__m128i>(halves.a), cast_bits<__m128i>(halves.b)));
#elif defined(__SSE2__)
  const __m128i both = cast_bits<__m128i>(halves), packed = _mm_packus_epi16(both, both);
  return load<Bytes>(&packed);
#else
  return __builtin_convertvector(cast_bits<Shorts>(halves), Bytes);
#endif
#endif
}

// A unit of bytes as floats, in natural order.
inline Pair widen_bytes(Bytes x) {
#if defined(__AVX512F__)
  const __m256i bytes = cast_bits<__m256i>(x);
  return {cast_bits<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)))),
          cast_bits<F>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1))))};
#elif defined(__AVX2__)
  const __m128i bytes = cast_bits<__m128i>(x);
  return {cast_bits<F>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))),
          cast_bits<F>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))))};
#else
  Pair result;
  for (int i = 0; i < kLanes; i++) result.a[i] = x[i], result.b[i] = x[i + kLanes];
  return result;
#endif
}

// --- one dtype each ------------------------------------------------------------------------------------------------
// load, store: a unit of rows' memory. from_natural, to_natural: between a unit of floats in order and the dtype's own.
// Every NaN is stored as the one positive quiet NaN: payloads depend on the order of a machine's operands, and results
// must not.

// A unit is read as 32-bit words: elements 0, 2, 4, ... are their low halves, 1, 3, 5, ... their high halves. A bf16 is
// the high half of a float, so a shift and a mask convert, and nothing needs to move between lanes.
struct Bf16 {
  typedef uint16_t Raw;
  static Pair load(const uint8_t* address) {
    const U words = commfuse::load<U>(address);
    return {cast_bits<F>(words << 16), cast_bits<F>(words & 0xffff0000u)};
  }
  static void store(uint8_t* address, Pair x) {
    commfuse::store(address, (round(x.a) >> 16) | (round(x.b) & 0xffff0000u));
  }
  // The low byte of each lane, in natural order: each pair of lanes makes one 16-bit word.
  static Bytes low_bytes(Two<U> x) { return cast_bits<Bytes>(low_halves((x.a & 0xff) | (x.b << 8))); }
  template <typename V>
  static Two<V> from_natural(Two<V> x) {
    return {__builtin_shufflevector(x.a, x.b, COMMFUSE_EVEN), __builtin_shufflevector(x.a, x.b, COMMFUSE_ODD)};
  }
  template <typename V>
  static Two<V> to_natural(Two<V> x) {
    return {__builtin_shufflevector(x.a, x.b, COMMFUSE_LOW), __builtin_shufflevector(x.a, x.b, COMMFUSE_HIGH)};
  }

 private:
  // To nearest even in the high half; what lies beyond the largest becomes infinity by itself.
  static U round(F x) {
    const U bits = cast_bits<U>(x), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return is_nan(x) ? splat_bits(kNan) : rounded;
  }
};

struct Fp16 {
  typedef uint16_t Raw;
  static Pair load(const uint8_t* address) {
    return {widen(commfuse::load<H>(address)), widen(commfuse::load<H>(address + sizeof(H)))};
  }
  static void store(uint8_t* address, Pair x) {
    commfuse::store(address, narrow(x.a));
    commfuse::store(address + sizeof(H), narrow(x.b));
  }
  static Bytes low_bytes(Two<U> x) { return natural_low_bytes(x.a, x.b); }
  template <typename V>
  static Two<V> from_natural(Two<V> x) {
    return x;
  }
  template <typename V>
  static Two<V> to_natural(Two<V> x) {
    return x;
  }
  // Through fp16 and back.
  static F round(F x) { return widen(convert(x)); }

 private:
#if defined(__AVX512F__)
  static F widen(H raw) { return cast_bits<F>(_mm512_cvtph_ps(cast_bits<__m256i>(raw))); }
  static H convert(F x) { return cast_bits<H>(_mm512_cvtps_ph(cast_bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
  static F widen(H raw) { return cast_bits<F>(_mm256_cvtph_ps(cast_bits<__m128i>(raw))); }
  static H convert(F x) { return cast_bits<H>(_mm256_cvtps_ph(cast_bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
  static F widen(H raw) {
    const U half = widen_halves(raw), shifted = (half & 0x7fff) << 13, exponent = shifted & 0x0f800000;
    const U normal = shifted + (112u << 23);   // the exponent's other bias
    const U special = normal + (112u << 23);   // infinity and NaN keep an exponent of ones
    const F small = cast_bits<F>(normal + (1u << 23)) - cast_bits<F>(splat_bits(113u << 23));  // denormals: the adder shifts
    const U magnitude = exponent == 0x0f800000 ? special : (exponent == 0 ? cast_bits<U>(small) : normal);
    return cast_bits<F>(magnitude | ((half & 0x8000) << 16));
  }
  static H convert(F x) {
    const U bits = cast_bits<U>(x), magnitude = bits & kAbs;
    const U rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U aligner = splat_bits(126u << 23);  // adding 0.5 makes the float adder round at the last denormal bit
    const U small = cast_bits<U>(cast_bits<F>(magnitude) + cast_bits<F>(aligner)) - aligner;
    const U finite = magnitude < (113u << 23) ? small : rounded;
    const U half = magnitude >= (143u << 23) ? splat_bits(0x7c00) : finite;  // 65536 and above
    return low_halves(half | ((bits >> 16) & 0x8000));
  }
#endif
  static H narrow(F x) {
    const H nan = low_halves(cast_bits<U>(is_nan(x)));
    return (convert(x) & ~nan) | (nan & 0x7e00);
  }
};

struct Float32 {
  typedef uint32_t Raw;
  static Pair load(const uint8_t* address) {
    return {commfuse::load<F>(address), commfuse::load<F>(address + sizeof(F))};
  }
  static void store(uint8_t* address, Pair x) {
    commfuse::store(address, clean(x.a));
    commfuse::store(address + sizeof(F), clean(x.b));
  }
  static Bytes low_bytes(Two<U> x) { return natural_low_bytes(x.a, x.b); }
  template <typename V>
  static Two<V> from_natural(Two<V> x) {
    return x;
  }
  template <typename V>
  static Two<V> to_natural(Two<V> x) {
    return x;
  }

 private:
  static F clean(F x) { return is_nan(x) ? cast_bits<F>(splat_bits(kNan)) : x; }
};

}  // namespace
}  // namespace commfuse
