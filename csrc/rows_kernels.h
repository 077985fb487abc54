// The kernels themselves, once for each instruction set. Included by rows_plain.cpp, rows_avx2.cpp and rows_avx512.cpp.
#pragma once
#include "rows.h"
#include "rows_vectors.h"

namespace commfuse {
namespace {

template <typename T>
constexpr int64_t kSize = sizeof(typename T::Raw);

// The last, shorter unit of a row goes through a buffer whose other elements are zeros.
template <typename T>
struct Part {
  alignas(64) uint8_t bytes[kUnit * kSize<T>] = {};
  Part() = default;
  Part(const uint8_t* in, int64_t num) { memcpy(bytes, in, static_cast<size_t>(num * kSize<T>)); }
  void copy_to(uint8_t* out, int64_t num) const { memcpy(out, bytes, static_cast<size_t>(num * kSize<T>)); }
};

// --- copies past the cache -----------------------------------------------------------------------------------------

void copy_nt(uint8_t* out, const uint8_t* in, uint64_t num_bytes) {
#if defined(__x86_64__)
  constexpr uint64_t kStep = 64;
  const uint64_t head = (kStep - reinterpret_cast<uint64_t>(out) % kStep) % kStep;
  if (num_bytes < head + kStep) {
    memcpy(out, in, num_bytes);
    return;
  }
  memcpy(out, in, head);
  uint64_t i = head;
  for (; i + kStep <= num_bytes; i += kStep) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), cast_bits<__m512i>(load<F>(in + i)));
#elif defined(__AVX2__)
    for (int j = 0; j < 64; j += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + j), cast_bits<__m256i>(load<F>(in + i + j)));
#else
    for (int j = 0; j < 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + j), cast_bits<__m128i>(load<F>(in + i + j)));
#endif
  }
  memcpy(out + i, in + i, num_bytes - i);
#else
  memcpy(out, in, num_bytes);
#endif
}

// Non-temporal stores are not ordered with the flag that is raised after them.
void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- weighted sums -------------------------------------------------------------------------------------------------

// Units of a row that are summed in registers at a time: two cache lines of every term. Longer runs did not pay.
constexpr int kUnitsAtOnce = kLanes == 16 ? 2 : 4;
// How far ahead each term's row is asked for: rows of different tokens lie anywhere, so the hardware meets each anew.
constexpr int64_t kAheadBytes = 512;

inline void add(Pair& sum, Pair x, F weight) {
  sum.a += x.a * weight;
  sum.b += x.b * weight;
}

template <typename In>
inline Pair load_f32(const uint8_t* row) {
  return In::from_natural(Float32::load(row));
}

template <typename In, typename Out>
inline void store_sum(uint8_t* out, Pair sum) {
  if constexpr (sizeof(typename In::Raw) == sizeof(typename Out::Raw)) Out::store(out, sum);
  else Out::store(out, Out::from_natural(In::to_natural(sum)));
}

template <typename In, typename Out, int kUnits>
inline void combine_units(const Term* terms, int64_t num_terms, int64_t column, uint8_t* out) {
  Pair sum[kUnits] = {};
  for (int64_t k = 0; k < num_terms; k++) {
    if (__builtin_expect(terms[k].kind == Term::nothing, 0)) continue;
    const auto* row = reinterpret_cast<const uint8_t*>(terms[k].address);
    const F weight = splat(terms[k].weight);
    if (__builtin_expect(terms[k].kind == Term::f32_row, 0)) {
      for (int j = 0; j < kUnits; j++) add(sum[j], load_f32<In>(row + (column + j * kUnit) * kSize<Float32>), weight);
      continue;
    }
    row += column * kSize<In>;
    for (int64_t i = 0; i < kUnits * kUnit * kSize<In>; i += 64) __builtin_prefetch(row + kAheadBytes + i);
    for (int j = 0; j < kUnits; j++) add(sum[j], In::load(row + j * kUnit * kSize<In>), weight);
  }
  for (int j = 0; j < kUnits; j++) store_sum<In, Out>(out + (column + j * kUnit) * kSize<Out>, sum[j]);
}

template <typename In, typename Out>
void combine_part(const Term* terms, int64_t num_terms, int64_t column, int64_t num, uint8_t* out) {
  Pair sum = {};
  for (int64_t k = 0; k < num_terms; k++) {
    if (terms[k].kind == Term::nothing) continue;
    const auto* row = reinterpret_cast<const uint8_t*>(terms[k].address);
    const Pair x = terms[k].kind == Term::f32_row ? load_f32<In>(Part<Float32>(row + column * kSize<Float32>, num).bytes)
                                                  : In::load(Part<In>(row + column * kSize<In>, num).bytes);
    add(sum, x, splat(terms[k].weight));
  }
  Part<Out> part;
  store_sum<In, Out>(part.bytes, sum);
  part.copy_to(out + column * kSize<Out>, num);
}

template <typename In, typename Out>
void combine_row(const Term* terms, int64_t num_terms, int64_t hidden, uint8_t* out) {
  constexpr int64_t kStep = kUnitsAtOnce * kUnit;
  int64_t column = 0;
  for (; column + kStep <= hidden; column += kStep) combine_units<In, Out, kUnitsAtOnce>(terms, num_terms, column, out);
  for (; column + kUnit <= hidden; column += kUnit) combine_units<In, Out, 1>(terms, num_terms, column, out);
  if (column < hidden) combine_part<In, Out>(terms, num_terms, column, hidden - column, out);
}

constexpr int64_t kTermsAtOnce = 64;  // more are summed as they come, each skipping what is not there

template <typename In, typename Out>
void combine(const Term* terms, int64_t num_rows, int64_t terms_per_row, int64_t hidden, uint8_t* out, uint64_t out_stride) {
  Term present[kTermsAtOnce];
  for (int64_t row = 0; row < num_rows; row++, terms += terms_per_row, out += out_stride) {
    if (terms_per_row > kTermsAtOnce) {
      combine_row<In, Out>(terms, terms_per_row, hidden, out);
      continue;
    }
    int64_t num_terms = 0;
    for (int64_t k = 0; k < terms_per_row; k++)
      if (terms[k].kind != Term::nothing) present[num_terms++] = terms[k];
    combine_row<In, Out>(present, num_terms, hidden, out);
  }
}

// --- int8 with one scale a row -------------------------------------------------------------------------------------

template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
inline I magnitude(F x) { return cast_bits<I>(x) & static_cast<int32_t>(kAbs); }
inline I magnitude(Pair x) { return larger(magnitude(x.a), magnitude(x.b)); }

template <typename In>
inline Pair scaled(const uint8_t* in, const uint8_t* smooth) {
  Pair x = In::load(in);
  if (!smooth) return x;
  const Pair factors = In::from_natural(Float32::load(smooth));
  return {x.a * factors.a, x.b * factors.b};
}

// Calls work(column, number, units' memory) for all units of a row; `Work` sees whole units only.
template <typename In, bool kSmooth, typename Work>
inline void for_units(const uint8_t* in, const float* smooth, int64_t hidden, Work work) {
  const auto* factors = reinterpret_cast<const uint8_t*>(smooth);
  int64_t column = 0;
  for (; column + kUnit <= hidden; column += kUnit)
    work(column, kUnit, scaled<In>(in + column * kSize<In>, kSmooth ? factors + column * kSize<Float32> : nullptr));
  if (column == hidden) return;
  const int64_t num = hidden - column;
  const Part<In> part(in + column * kSize<In>, num);
  Part<Float32> part_factors;
  if (kSmooth) part_factors = Part<Float32>(factors + column * kSize<Float32>, num);
  work(column, num, scaled<In>(part.bytes, kSmooth ? part_factors.bytes : nullptr));
}

template <typename V>
inline int32_t largest_lane(V x) {
  int32_t result = 0;
  for (size_t i = 0; i < sizeof x / sizeof x[0]; i++) result = x[i] > result ? x[i] : result;
  return result;
}

// The bits of the largest magnitude of a row. Magnitudes compare like their bits, with NaN above infinity: one maximum
// finds size and faults. Without factors 16-bit rows are compared as they are.
template <typename In, bool kSmooth>
uint32_t max_magnitude(const uint8_t* in, const float* smooth, int64_t hidden) {
  if constexpr (kSmooth || kSize<In> == 4) {
    I most = {};
    for_units<In, kSmooth>(in, smooth, hidden, [&](int64_t, int64_t, Pair x) { most = larger(most, magnitude(x)); });
    return static_cast<uint32_t>(largest_lane(most));
  } else {
    Shorts most = {};
    int64_t column = 0;
    for (; column + kUnit <= hidden; column += kUnit) most = larger(most, load<Shorts>(in + column * 2) & 0x7fff);
    if (column < hidden) most = larger(most, load<Shorts>(Part<In>(in + column * 2, hidden - column).bytes) & 0x7fff);
    const auto raw = static_cast<uint16_t>(largest_lane(most));
    return static_cast<uint32_t>(magnitude(In::load(Part<In>(reinterpret_cast<const uint8_t*>(&raw), 1).bytes).a)[0]);
  }
}

template <typename In, bool kSmooth>
float quantise_row(const uint8_t* in, const float* smooth, int64_t hidden, int8_t* out) {
  const uint32_t bits = max_magnitude<In, kSmooth>(in, smooth, hidden);
  const float factor = 127.0f / cast_bits<float>(bits);
  if (bits >= kInfinity || cast_bits<uint32_t>(factor) >= kInfinity) {
    memset(out, 0, static_cast<size_t>(hidden));
    return bits >= kInfinity ? cast_bits<float>(kNan) : 0.0f;
  }
  const F factors = splat(factor);
  for_units<In, kSmooth>(in, smooth, hidden, [&](int64_t column, int64_t num, Pair x) {
    const Bytes bytes = In::low_bytes({rounded_bits(x.a * factors), rounded_bits(x.b * factors)});
    memcpy(out + column, &bytes, num == kUnit ? sizeof bytes : static_cast<size_t>(num));
  });
  return 1.0f / factor;
}

template <typename In>
float quantise(const uint8_t* in, const float* smooth, int64_t hidden, int8_t* out) {
  return smooth ? quantise_row<In, true>(in, smooth, hidden, out) : quantise_row<In, false>(in, smooth, hidden, out);
}

// --- int8 on the wire, blocks of 8 ---------------------------------------------------------------------------------

constexpr int kPacked = 8;
static_assert(kUnit % kPacked == 0);

// The largest magnitude of each block of 8, in all lanes that hold the block: a lane takes the larger of its own and of
// those whose index differs in one bit. x in natural order.
inline I block_size(I x) {
  x = larger(x, __builtin_shufflevector(x, x, COMMFUSE_SWAP1));
  x = larger(x, __builtin_shufflevector(x, x, COMMFUSE_SWAP2));
  return larger(x, __builtin_shufflevector(x, x, COMMFUSE_SWAP4));
}

inline Two<I> block_sizes(Pair x) {
  const I both = larger(magnitude(x.a), magnitude(x.b));
  if (kLanes < kPacked) return {block_size(both), block_size(both)};  // the block is the unit
  return {block_size(magnitude(x.a)), block_size(magnitude(x.b))};
}

// scale = max * f32(1/127), NaN where the block holds one or an infinity; q is within int8 in any case.
inline F packed_scale(I size) {
  const F scale = cast_bits<F>(size) * (1.0f / 127.0f);
  return size >= static_cast<int32_t>(kInfinity) ? cast_bits<F>(splat_bits(kNan)) : scale;
}

inline U packed(F x, F scale) {
  const I q = round_to_int(Fp16::round(x / scale));
  // A denormal scale may be off by half of itself: keep to the range. A zero or NaN scale: 0.
  const I kept = q > 127 ? I{} + 127 : q < -128 ? I{} - 128 : q;
  return cast_bits<U>(scale > 0 ? kept : I{});
}

// Every eighth of a unit's scales, in natural order.
template <typename T>
inline void store_scales(uint8_t* out, F scale_a, F scale_b, int64_t num_scales) {
  alignas(64) uint8_t all[kUnit * kSize<T>];
  T::store(all, T::from_natural(Pair{scale_a, scale_b}));
  for (int64_t i = 0; i < num_scales; i++) memcpy(out + i * kSize<T>, all + i * kPacked * kSize<T>, kSize<T>);
}

template <typename T>
void pack(const uint8_t* in, int64_t hidden, int8_t* out, uint8_t* scales) {
  for_units<T, false>(in, nullptr, hidden, [&](int64_t column, int64_t num, Pair unit) {
    const Pair x = T::to_natural(unit);
    const Two<I> size = block_sizes(x);
    const F scale_a = packed_scale(size.a), scale_b = packed_scale(size.b);
    const Bytes bytes = natural_low_bytes(packed(x.a, scale_a), packed(x.b, scale_b));
    memcpy(out + column, &bytes, num == kUnit ? sizeof bytes : static_cast<size_t>(num));
    store_scales<T>(scales + column / kPacked * kSize<T>, scale_a, scale_b, (num + kPacked - 1) / kPacked);
  });
}

// A unit's scales, one for each 8 of its elements, spread over half of them.
template <int kHalf>
inline F spread_scales(F scales) {
#if defined(__AVX512F__)
  return kHalf == 0 ? __builtin_shufflevector(scales, scales, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                    : __builtin_shufflevector(scales, scales, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
#else
  return splat(scales[kHalf * kLanes / kPacked]);
#endif
}

template <typename T>
inline void unpack_unit(const int8_t* in, const uint8_t* scales, uint8_t* out) {
  alignas(64) uint8_t some[kUnit * kSize<T>] = {};
  memcpy(some, scales, kUnit / kPacked * kSize<T>);
  const F each = T::to_natural(T::load(some)).a;
  const Pair q = widen_bytes(load<Bytes>(in));
  T::store(out, T::from_natural(Pair{q.a * spread_scales<0>(each), q.b * spread_scales<1>(each)}));
}

template <typename T>
void unpack(const int8_t* in, const uint8_t* scales, int64_t hidden, uint8_t* out) {
  int64_t column = 0;
  for (; column + kUnit <= hidden; column += kUnit)
    unpack_unit<T>(in + column, scales + column / kPacked * kSize<T>, out + column * kSize<T>);
  if (column == hidden) return;
  const int64_t num = hidden - column;
  Bytes bytes = {};
  memcpy(&bytes, in + column, static_cast<size_t>(num));
  int8_t last[kUnit];
  store(last, bytes);
  const Part<T> some(scales + column / kPacked * kSize<T>, (num + kPacked - 1) / kPacked);
  Part<T> result;
  unpack_unit<T>(last, some.bytes, result.bytes);
  result.copy_to(out + column * kSize<T>, num);
}

#define COMMFUSE_KERNELS(kernels_name)                                                           \
  {                                                                                              \
    kernels_name, copy_nt, fence,                                                                \
        {{combine<Bf16, Bf16>, combine<Bf16, Float32>},                                          \
         {combine<Fp16, Fp16>, combine<Fp16, Float32>},                                          \
         {combine<Float32, Float32>, combine<Float32, Float32>}},                                \
        {quantise<Bf16>, quantise<Fp16>, quantise<Float32>}, {pack<Bf16>, pack<Fp16>, pack<Float32>}, \
    {                                                                                            \
      unpack<Bf16>, unpack<Fp16>, unpack<Float32>                                                \
    }                                                                                            \
  }

}  // namespace
}  // namespace commfuse
