// Every variant of every row kernel against plain loops over single numbers, bit for bit.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "check.h"
#include "error.h"
#include "rows.h"

using namespace commfuse;

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// --- the judge: conversions of single numbers, written from the formats ----------------------------------------------

float from_fp16(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + float(fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}

uint16_t to_fp16(float x) {
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;  // half way between the largest and the next power rounds up
  if (size < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  std::frexp(size, &exponent);
  const auto digits = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024..2048
  return static_cast<uint16_t>(sign + ((exponent + 13) << 10) + digits);
}

float from_bf16(uint16_t raw) { return float_of(uint32_t(raw) << 16); }

uint16_t to_bf16(float x) {
  if (std::isnan(x)) return 0x7fc0;
  const uint32_t bits = bits_of(x), low = bits & 0xffff, high = bits >> 16;
  return static_cast<uint16_t>(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

float read(Dtype dtype, const uint8_t* at, int64_t i) {
  if (dtype == Dtype::f32) return reinterpret_cast<const float*>(at)[i];
  const uint16_t raw = reinterpret_cast<const uint16_t*>(at)[i];
  return dtype == Dtype::bf16 ? from_bf16(raw) : from_fp16(raw);
}

void write(Dtype dtype, uint8_t* at, int64_t i, float x) {
  if (dtype == Dtype::f32) reinterpret_cast<uint32_t*>(at)[i] = std::isnan(x) ? 0x7fc00000 : bits_of(x);
  else reinterpret_cast<uint16_t*>(at)[i] = dtype == Dtype::bf16 ? to_bf16(x) : to_fp16(x);
}

void combine_plainly(Dtype dtype, bool to_f32, const std::vector<Term>& terms, int64_t num_rows, int64_t hidden, uint8_t* out) {
  const int64_t per_row = static_cast<int64_t>(terms.size()) / num_rows;
  for (int64_t row = 0; row < num_rows; row++)
    for (int64_t i = 0; i < hidden; i++) {
      float sum = 0;
      for (int64_t k = 0; k < per_row; k++) {
        const Term& term = terms[row * per_row + k];
        if (term.kind == Term::nothing) continue;
        const float x = read(term.kind == Term::f32_row ? Dtype::f32 : dtype, reinterpret_cast<const uint8_t*>(term.address), i);
        volatile float product = x * term.weight;  // volatile: no fused multiply-add, whatever the flags
        volatile float next = sum + product;
        sum = next;
      }
      write(to_f32 ? Dtype::f32 : dtype, out, row * hidden + i, sum);
    }
}

float quantise_plainly(Dtype dtype, const uint8_t* in, const float* smooth, int64_t hidden, int8_t* out) {
  std::vector<float> f(static_cast<size_t>(hidden));
  float most = 0;
  bool is_finite = true;
  for (int64_t i = 0; i < hidden; i++) {
    f[i] = read(dtype, in, i) * (smooth ? smooth[i] : 1.0f);
    is_finite = is_finite && std::isfinite(f[i]);
    most = std::fmax(most, std::fabs(f[i]));
  }
  const float factor = 127.0f / most;
  const bool is_zero = !std::isfinite(factor);
  for (int64_t i = 0; i < hidden; i++) {
    volatile float product = f[i] * factor;
    out[i] = !is_finite || is_zero ? 0 : static_cast<int8_t>(std::nearbyint(product));
  }
  return !is_finite ? NAN : is_zero ? 0 : 1.0f / factor;
}

void pack_plainly(Dtype dtype, const uint8_t* in, int64_t hidden, int8_t* out, uint8_t* scales) {
  for (int64_t start = 0; start < hidden; start += 8) {
    const int64_t end = std::min(start + 8, hidden);
    float most = 0;
    bool is_finite = true;
    for (int64_t i = start; i < end; i++) {
      is_finite = is_finite && std::isfinite(read(dtype, in, i));
      most = std::fmax(most, std::fabs(read(dtype, in, i)));
    }
    const float scale = is_finite ? most * (1.0f / 127.0f) : NAN;
    write(dtype, scales, start / 8, scale);
    for (int64_t i = start; i < end; i++) {
      const float q = std::nearbyint(from_fp16(to_fp16(read(dtype, in, i) / scale)));
      out[i] = scale > 0 ? static_cast<int8_t>(std::fmin(std::fmax(q, -128.0f), 127.0f)) : 0;
    }
  }
}

// --- inputs ----------------------------------------------------------------------------------------------------------

enum class Content { ordinary, ties, any_bits, tiny, smallest, zero };

// Rows of 16-bit or 32-bit numbers; `any_bits` holds denormals, infinities, NaN and both zeros.
std::vector<uint8_t> make_rows(Dtype dtype, int64_t count, Content content, std::mt19937& random) {
  std::vector<uint8_t> rows(static_cast<size_t>(count) * size_of(dtype));
  for (int64_t i = 0; i < count; i++) {
    const float unit = float(int(random() % 2001) - 1000) / 500.0f;
    float x = unit;
    if (content == Content::ties) x = float(int(random() % 255) - 127) + 0.5f * float(random() % 2);
    if (content == Content::tiny) x = unit * 1e-38f;
    if (content == Content::smallest) x = float_of((random() & 0x80000000) | random() % 300);  // scales of few bits
    if (content == Content::zero) x = random() % 2 ? 0.0f : -0.0f;
    write(dtype, rows.data(), i, x);
    if (content != Content::any_bits) continue;
    if (dtype == Dtype::f32) reinterpret_cast<uint32_t*>(rows.data())[i] = random();
    else reinterpret_cast<uint16_t*>(rows.data())[i] = static_cast<uint16_t>(random());
  }
  return rows;
}

constexpr Dtype kDtypes[] = {Dtype::bf16, Dtype::fp16, Dtype::f32};
constexpr Content kContents[] = {Content::ordinary, Content::ties,     Content::any_bits,
                                 Content::tiny,     Content::smallest, Content::zero};
const int64_t kHiddens[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 255, 257, 520};

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// --- tests -------------------------------------------------------------------------------------------------------------

// All 2^16 numbers of each 16-bit dtype there and back, and float32 numbers around every rounding boundary.
void test_conversions() {
  for (Dtype dtype : {Dtype::bf16, Dtype::fp16}) {
    std::vector<uint16_t> all(65536), back(65536), expected(65536);
    std::vector<float> wide(65536);
    for (uint32_t i = 0; i < 65536; i++) {
      all[i] = static_cast<uint16_t>(i);
      write(dtype, reinterpret_cast<uint8_t*>(expected.data()), i, 0.0f + read(dtype, reinterpret_cast<uint8_t*>(all.data()), i));
    }
    const Term term{reinterpret_cast<uint64_t>(all.data()), 1.0f, Term::row};
    combine_rows(dtype, false, &term, 1, 1, 65536, reinterpret_cast<uint8_t*>(back.data()), 0);
    CHECK(same(back, expected));
    combine_rows(dtype, true, &term, 1, 1, 65536, reinterpret_cast<uint8_t*>(wide.data()), 0);
    for (uint32_t i = 0; i < 65536; i++) {
      const float x = 0.0f + read(dtype, reinterpret_cast<uint8_t*>(all.data()), i);
      CHECK(bits_of(wide[i]) == (std::isnan(x) ? 0x7fc00000 : bits_of(x)));
    }
    std::vector<float> edges;
    for (uint32_t i = 0; i < 65536; i++) {
      const uint32_t middle = dtype == Dtype::bf16 ? i << 16 | 0x8000
                                                   : bits_of((from_fp16(uint16_t(i)) + from_fp16(uint16_t(i + 1))) / 2);
      for (uint32_t delta : {-1u, 0u, 1u}) edges.push_back(float_of(middle + delta));
    }
    std::vector<uint16_t> rounded(edges.size());
    const Term edge{reinterpret_cast<uint64_t>(edges.data()), 1.0f, Term::f32_row};
    combine_rows(dtype, false, &edge, 1, 1, int64_t(edges.size()), reinterpret_cast<uint8_t*>(rounded.data()), 0);
    for (size_t i = 0; i < edges.size(); i++) {
      const float x = 0.0f + edges[i];
      CHECK(rounded[i] == (dtype == Dtype::bf16 ? to_bf16(x) : to_fp16(x)));
    }
  }
}

void test_combine(std::mt19937& random) {
  for (Dtype dtype : kDtypes)
    for (bool to_f32 : {false, true})
      for (Content content : kContents)
        for (int64_t hidden : kHiddens) {
          const int64_t num_rows = 3, per_row = 1 + int64_t(random() % 9);
          const std::vector<uint8_t> rows = make_rows(dtype, per_row * hidden, content, random);
          const std::vector<uint8_t> wide = make_rows(Dtype::f32, hidden, content, random);
          std::vector<Term> terms(static_cast<size_t>(num_rows * per_row));
          for (Term& term : terms) {
            const int64_t row = int64_t(random() % static_cast<uint32_t>(per_row));
            term.kind = random() % 8 == 0 ? Term::f32_row : random() % 4 == 0 ? Term::nothing : Term::row;
            const uint8_t* at = term.kind == Term::f32_row ? wide.data() : rows.data() + row * hidden * size_of(dtype);
            term.address = reinterpret_cast<uint64_t>(at);
            term.weight = content == Content::ordinary ? float(random() % 1000) / 700.0f : 1.0f / float(1 + random() % 3);
          }
          std::vector<uint8_t> out(num_rows * hidden * (to_f32 ? 4 : size_of(dtype))), expected = out;
          combine_rows(dtype, to_f32, terms.data(), num_rows, per_row, hidden, out.data(), out.size() / num_rows);
          combine_plainly(dtype, to_f32, terms, num_rows, hidden, expected.data());
          CHECK(same(out, expected));
        }
}

// More terms than are lined up at a time, and sums that leave fp16's range.
void test_combine_extremes() {
  const std::vector<uint16_t> big(40, 0x7bff);  // 65504
  std::vector<Term> terms(200, Term{reinterpret_cast<uint64_t>(big.data()), 1.0f, Term::row});
  terms[7].kind = Term::nothing;
  std::vector<uint16_t> out(40);
  combine_rows(Dtype::fp16, false, terms.data(), 1, 200, 40, reinterpret_cast<uint8_t*>(out.data()), 80);
  CHECK(std::all_of(out.begin(), out.end(), [](uint16_t x) { return x == 0x7c00; }));
  std::vector<float> sum(40);
  combine_rows(Dtype::fp16, true, terms.data(), 1, 200, 40, reinterpret_cast<uint8_t*>(sum.data()), 160);
  CHECK(sum[39] == 199.0f * 65504.0f);
}

void test_quantise(std::mt19937& random) {
  for (Dtype dtype : kDtypes)
    for (Content content : kContents)
      for (bool do_smooth : {false, true})
        for (int64_t hidden : kHiddens) {
          const int64_t num_rows = 4;
          std::vector<uint8_t> rows = make_rows(dtype, num_rows * hidden, content, random);
          if (content == Content::any_bits) write(dtype, rows.data(), hidden, 1.0f);
          std::vector<float> smooth(static_cast<size_t>(2 * hidden));
          for (float& x : smooth) x = float(random() % 100) / 50.0f;
          const std::vector<int32_t> in_index = {2, -1, 0, 3}, smooth_index = {1, 0, 0, 1};
          std::vector<int8_t> out(static_cast<size_t>(num_rows * hidden), 99), expected = out;
          std::vector<float> scales(num_rows, -7.0f), expected_scales = scales;
          quantise_rows({dtype, hidden, num_rows, rows.data(), hidden * size_of(dtype), num_rows, in_index.data(),
                         do_smooth ? smooth.data() : nullptr, 2, smooth_index.data()}, out.data(), scales.data());
          for (int64_t i : {0, 2, 3})
            expected_scales[i] = quantise_plainly(dtype, rows.data() + in_index[i] * hidden * size_of(dtype),
                                                  do_smooth ? smooth.data() + smooth_index[i] * hidden : nullptr, hidden,
                                                  expected.data() + i * hidden);
          CHECK(same(out, expected));
          for (int64_t i = 0; i < num_rows; i++)
            CHECK(std::isnan(expected_scales[i]) ? std::isnan(scales[i]) : bits_of(scales[i]) == bits_of(expected_scales[i]));
        }
}

// Numbers of the published examples: 127/3.5, the smoothed row, ties to even.
void test_quantise_examples() {
  const float row[8] = {1, -2, 0.5, 3.5, -0.25, 0, 2.75, -3}, smooth[8] = {1, .5, 2, 1, 4, 1, .25, 1};
  const float ties[8] = {127, .5, 1.5, 2.5, -.5, -1.5, -2.5, 63.5};
  int8_t q[8];
  float scale;
  auto run = [&](const float* in, const float* factors) {
    quantise_rows({Dtype::f32, 8, 1, reinterpret_cast<const uint8_t*>(in), 32, 1, nullptr, factors, 1, nullptr}, q, &scale);
    return std::vector<int>(q, q + 8);
  };
  CHECK((run(row, nullptr) == std::vector<int>{36, -73, 18, 127, -9, 0, 100, -109}));
  CHECK(std::fabs(scale - 0.027559055f) < 1e-9f);
  CHECK((run(row, smooth) == std::vector<int>{36, -36, 36, 127, -36, 0, 25, -109}));
  CHECK((run(ties, nullptr) == std::vector<int>{127, 0, 2, 2, 0, -2, -2, 64}));
  CHECK(scale == 1.0f);
  const QuantiseRows too_many{Dtype::f32, 8, 2, reinterpret_cast<const uint8_t*>(row), 32, 1, nullptr, nullptr, 0, nullptr};
  CHECK_THROWS(quantise_rows(too_many, q, &scale), "row 1 of 1");
}

void test_pack(std::mt19937& random) {
  for (Dtype dtype : kDtypes)
    for (Content content : kContents)
      for (int64_t hidden : kHiddens) {
        const int64_t num_rows = 2, num_blocks = (hidden + 7) / 8;
        const std::vector<uint8_t> rows = make_rows(dtype, num_rows * hidden, content, random);
        std::vector<int8_t> q(static_cast<size_t>(num_rows * hidden)), expected_q = q;
        std::vector<uint8_t> scales(num_rows * num_blocks * size_of(dtype)), expected_scales = scales;
        std::vector<uint8_t> back(rows.size()), expected_back = back;
        pack_rows(dtype, rows.data(), num_rows, hidden, q.data(), scales.data());
        unpack_rows(dtype, q.data(), scales.data(), num_rows, hidden, back.data());
        for (int64_t row = 0; row < num_rows; row++) {
          uint8_t* row_scales = expected_scales.data() + row * num_blocks * size_of(dtype);
          pack_plainly(dtype, rows.data() + row * hidden * size_of(dtype), hidden, expected_q.data() + row * hidden, row_scales);
          for (int64_t i = 0; i < hidden; i++)
            write(dtype, expected_back.data(), row * hidden + i,
                  float(expected_q[row * hidden + i]) * read(dtype, row_scales, i / 8));
        }
        CHECK(same(q, expected_q));
        CHECK(same(scales, expected_scales));
        CHECK(same(back, expected_back));
      }
}

void test_gather(std::mt19937& random) {
  for (uint64_t row_bytes : {1, 63, 64, 1024, 1111, 4096})
    for (uint64_t nt_bytes : {0, 1})
      for (uint64_t shift : {0, 1, 33}) {
        const uint64_t stride = row_bytes + 5, out_stride = row_bytes + 3;
        const std::vector<uint8_t> in = make_rows(Dtype::bf16, int64_t(stride * 6), Content::any_bits, random);
        const uint64_t in_bytes = 5 * stride + row_bytes;  // no room for a seventh row
        const std::vector<int32_t> index = {5, -1, 0, 0, 3};
        std::vector<uint8_t> out(out_stride * 5 + shift, 0xab), expected = out;
        gather_rows(out.data() + shift, out_stride, in.data(), in_bytes, stride, index.data(), 5, row_bytes, nt_bytes);
        for (int i : {0, 2, 3, 4})
          std::memcpy(expected.data() + shift + i * out_stride, in.data() + index[i] * stride, row_bytes);
        CHECK(same(out, expected));
        const std::vector<int32_t> bad = {0, 6};
        CHECK_THROWS(gather_rows(out.data(), out_stride, in.data(), in_bytes, stride, bad.data(), 2, row_bytes, 0), "row 6 of 6");
      }
}

// The caller's rounding mode and flush-to-zero must not reach the kernels, and must come back.
void test_float_mode() {
  std::vector<float> row(64), expected(64), out(64);
  for (size_t i = 0; i < row.size(); i++) row[i] = i % 2 ? 1.0f + float(i) / 7 : float_of(uint32_t(i) * 1000);
  const Term term{reinterpret_cast<uint64_t>(row.data()), 0.7f, Term::row};
  auto run = [&](std::vector<float>& result) {
    combine_rows(Dtype::f32, false, &term, 1, 1, 64, reinterpret_cast<uint8_t*>(result.data()), 256);
  };
  run(expected);
  std::fesetround(FE_UPWARD);
  run(out);
  CHECK(std::fegetround() == FE_UPWARD);
  std::fesetround(FE_TONEAREST);
  CHECK(same(out, expected));
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush results and operands to zero
  run(out);
  CHECK(_mm_getcsr() == (before | 0x8040));
  _mm_setcsr(before);
  CHECK(same(out, expected));
#endif
}

}  // namespace

int main() {
  int num_variants = 0;
  for (const char* name : {"plain", "avx2", "avx512"}) {
    if (!find_kernels(name)) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    choose_kernels(name);
    CHECK(std::string(kernels().name) == name);
    std::mt19937 random(1);
    test_conversions();
    test_combine(random);
    test_combine_extremes();
    test_quantise(random);
    test_quantise_examples();
    test_pack(random);
    test_gather(random);
    test_float_mode();
    std::printf("%s: the same bits as plain loops\n", name);
    num_variants++;
  }
  CHECK(num_variants >= 1);
  choose_kernels("");
  CHECK_THROWS(choose_kernels("avx1024"), "avx1024");
}
