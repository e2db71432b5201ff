// The passes over activations that cost a CPU most in a training step, each as one pass: tanh's GELU, cross entropy and
// the inner part of attention's backward. Elements are float32 or bfloat16; arithmetic is float32 everywhere. Rows, heads
// and ranges are divided among OpenMP's threads (the library that torch has loaded); results do not depend on how many.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;  // of a vector, in whatever pieces the processor has it: a fixed order of additions
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Floats every(float x) { return x - Floats{}; }
inline Floats as_floats(Words x) { return (Floats)x; }  // the same bits
inline Words as_words(Floats x) { return (Words)x; }

inline Floats load(const float* x) {
  Floats value;
  std::memcpy(&value, x, sizeof value);
  return value;
}
inline Floats load(const uint16_t* x) {  // bfloat16 is the upper half of a float
  Halves value;
  std::memcpy(&value, x, sizeof value);
  return as_floats(__builtin_convertvector(value, Words) << 16);
}
inline void store(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }
inline void store(Floats x, uint16_t* to) {  // to the nearest, ties to even
  const Words bits = as_words(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves value = __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0u, Halves);
  std::memcpy(to, &value, sizeof value);
}
template <typename T>
inline Floats load(const T* x, int64_t count, T fill) {  // the first `count` lanes; the others hold `fill`
  T some[kLanes];
  for (int k = 0; k < kLanes; ++k) some[k] = k < count ? x[k] : fill;
  return load(some);
}
template <typename T>
inline void store(Floats x, T* to, int64_t count) {
  T some[kLanes];
  store(x, some);
  std::memcpy(to, some, count * sizeof(T));
}

// e^x within 1.5 units in the last place: 2^n · e^r, r in [-ln2/2, ln2/2] by its Taylor polynomial of degree 7.
inline Floats exponential(Floats x) {
  const Floats low = every(-87.0f), high = every(88.0f);
  const Floats inside = x < low ? low : (x > high ? high : x);
  const Floats shifted = inside * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (inside - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = every(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const Words power = ((as_words(shifted) & 0x1ffu) + 127u) << 23;  // the low nine bits hold n modulo 512
  const Floats value = p * as_floats(power);
  return x < low ? every(0.0f) : (x > every(88.72f) ? every(INFINITY) : value);
}

// y = x · sigmoid(2u) = x/2 · (1 + tanh u), u = sqrt(2/π) (x + 0.044715 x³)
constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;

inline Floats gelu(Floats v) {
  return v / (1.0f + exponential(-kTwice * (v + kCubic * v * v * v)));
}
inline Floats gelu_slope(Floats v) {
  const Floats square = v * v;
  const Floats s = 1.0f / (1.0f + exponential(-kTwice * (v + kCubic * v * square)));
  return s + v * s * (1.0f - s) * (kTwice * (1.0f + 3.0f * kCubic * square));
}

constexpr int64_t kChunk = 4096;  // elements that one thread takes at a time

template <typename T>
void gelu(const T* x, T* y, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(gelu(load(x + i)), y + i);
    if (i < end) store(gelu(load(x + i, end - i, T{0})), y + i, end - i);
  }
}

template <typename T>
void gelu_backward(const T* grad, const T* x, T* out, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(load(grad + i) * gelu_slope(load(x + i)), out + i);
    if (i < end)
      store(load(grad + i, end - i, T{0}) * gelu_slope(load(x + i, end - i, T{0})), out + i, end - i);
  }
}

template <typename T>
float log_sum_exp(const T* x, int64_t n) {
  Floats most = every(-INFINITY), sum = every(0.0f);
  const int64_t whole = n / kLanes * kLanes;
  const T least = sizeof(T) == 4 ? static_cast<T>(-INFINITY) : static_cast<T>(0xff80);
  const Floats rest = load(x + whole, n - whole, least);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats v = load(x + i);
    most = v > most ? v : most;
  }
  most = rest > most ? rest : most;
  float top = most[0];
  for (int k = 1; k < kLanes; ++k) top = most[k] > top ? most[k] : top;
  if (std::isinf(top)) top = 0.0f;
  for (int64_t i = 0; i < whole; i += kLanes) sum += exponential(load(x + i) - top);
  sum += exponential(rest - top);
  float total = sum[0];
  for (int k = 1; k < kLanes; ++k) total += sum[k];
  return std::log(total) + top;
}

template <typename T>
void norms(const T* logits, int64_t rows, int64_t columns, float* norm, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) norm[row] = log_sum_exp(logits + row * columns, columns);
}

template <typename T>
void cross_entropy_backward(const T* logits, const int64_t* target, const float* weight, const float* norm, T* grad,
                            int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = logits + row * columns;
    T* out = grad + row * columns;
    const float w = weight[row], log_sum = norm[row];
    if (w == 0.0f) {  // an ignored row, whatever its logits
      std::memset(out, 0, columns * sizeof(T));
      continue;
    }
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(exponential(load(x + i) - log_sum) * w, out + i);
    if (i < columns) store(exponential(load(x + i, columns - i, T{0}) - log_sum) * w, out + i, columns - i);
    const int64_t t = target[row];
    store((exponential(load(x + t, 1, T{0}) - log_sum) - 1.0f) * w, out + t, 1);
  }
}

#ifdef __AVX512BF16__
// packed[pair][column] = the pair (2·pair, 2·pair + 1) of x's row `column`; columns up to `padded` are zero
inline void pack_pairs(const uint16_t* x, int64_t columns, int64_t padded, int64_t pairs, uint32_t* packed) {
  for (int64_t c = 0; c < columns; ++c) {
    const uint16_t* row = x + c * 2 * pairs;
    for (int64_t p = 0; p < pairs; ++p) std::memcpy(packed + p * padded + c, row + 2 * p, 4);
  }
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t c = columns; c < padded; ++c) packed[p * padded + c] = 0;
}

inline float inner(const uint16_t* a, const uint16_t* b, int64_t n) {
  Floats sum = every(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
  if (i < n) sum += load(a + i, n - i, uint16_t{0}) * load(b + i, n - i, uint16_t{0});
  return _mm512_reduce_add_ps((__m512)sum);
}

inline __m512bh pair_everywhere(const uint16_t* at) {
  int32_t pair;
  std::memcpy(&pair, at, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Rows i … i + R − 1 of one head, columns 0 … `reach`: P = exp(scale · q kᵀ − lse), dS = scale · P ∘ (dO vᵀ − delta)
template <int R>
void some_rows(const uint16_t* q, const uint16_t* grad, const uint32_t* k, const uint32_t* v, const float* lse,
               const float* delta, float scale, bool causal, int64_t i, int64_t columns, int64_t padded, int64_t pairs,
               uint16_t* p, uint16_t* ds) {
  const int64_t reach = causal ? (i + R < columns ? i + R : columns) : columns;
  const int64_t width = 2 * pairs;
  for (int64_t c = 0; c < columns; c += 32) {
    const __mmask16 low = columns - c >= 16 ? 0xffff : (1u << (columns - c)) - 1;
    const __mmask16 high =
        columns - c >= 32 ? 0xffff : (columns - c > 16 ? (1u << (columns - c - 16)) - 1 : 0);
    const __mmask16 stored[2] = {low, high};
    if (c >= reach) {
      for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
          _mm256_mask_storeu_epi16(p + r * columns + c + 16 * h, stored[h], _mm256_setzero_si256());
          _mm256_mask_storeu_epi16(ds + r * columns + c + 16 * h, stored[h], _mm256_setzero_si256());
        }
      continue;
    }
    __m512 s[R][2], g[R][2];
    for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = g[r][0] = g[r][1] = _mm512_setzero_ps();
    for (int64_t d = 0; d < pairs; ++d) {
      const __m512bh k0 = (__m512bh)_mm512_loadu_si512(k + d * padded + c);
      const __m512bh k1 = (__m512bh)_mm512_loadu_si512(k + d * padded + c + 16);
      const __m512bh v0 = (__m512bh)_mm512_loadu_si512(v + d * padded + c);
      const __m512bh v1 = (__m512bh)_mm512_loadu_si512(v + d * padded + c + 16);
      for (int r = 0; r < R; ++r) {
        const __m512bh a = pair_everywhere(q + r * width + 2 * d);
        const __m512bh b = pair_everywhere(grad + r * width + 2 * d);
        s[r][0] = _mm512_dpbf16_ps(s[r][0], a, k0);
        s[r][1] = _mm512_dpbf16_ps(s[r][1], a, k1);
        g[r][0] = _mm512_dpbf16_ps(g[r][0], b, v0);
        g[r][1] = _mm512_dpbf16_ps(g[r][1], b, v1);
      }
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h) {
        const __m512i column = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(c + 16 * h)));
        const __mmask16 seen =
            causal ? _mm512_cmple_epi32_mask(column, _mm512_set1_epi32(static_cast<int>(i + r))) : 0xffff;
        const __m512 score = _mm512_fmsub_ps(s[r][h], _mm512_set1_ps(scale), _mm512_set1_ps(lse[r]));
        const __m512 share = _mm512_maskz_mov_ps(seen, (__m512)exponential((Floats)score));
        const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(share, _mm512_set1_ps(scale)),
                                           _mm512_sub_ps(g[r][h], _mm512_set1_ps(delta[r])));
        _mm256_mask_storeu_epi16(p + r * columns + c + 16 * h, stored[h], (__m256i)_mm512_cvtneps_pbh(share));
        _mm256_mask_storeu_epi16(ds + r * columns + c + 16 * h, stored[h],
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(seen, slope)));
      }
  }
}
#endif

}  // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT void gelu_f32(const float* x, float* y, int64_t n, int threads) { gelu(x, y, n, threads); }
EXPORT void gelu_bf16(const uint16_t* x, uint16_t* y, int64_t n, int threads) { gelu(x, y, n, threads); }
EXPORT void gelu_backward_f32(const float* grad, const float* x, float* out, int64_t n, int threads) {
  gelu_backward(grad, x, out, n, threads);
}
EXPORT void gelu_backward_bf16(const uint16_t* grad, const uint16_t* x, uint16_t* out, int64_t n, int threads) {
  gelu_backward(grad, x, out, n, threads);
}
EXPORT void norms_f32(const float* logits, int64_t rows, int64_t columns, float* norm, int threads) {
  norms(logits, rows, columns, norm, threads);
}
EXPORT void norms_bf16(const uint16_t* logits, int64_t rows, int64_t columns, float* norm, int threads) {
  norms(logits, rows, columns, norm, threads);
}
EXPORT void cross_entropy_backward_f32(const float* logits, const int64_t* target, const float* weight,
                                       const float* norm, float* grad, int64_t rows, int64_t columns, int threads) {
  cross_entropy_backward(logits, target, weight, norm, grad, rows, columns, threads);
}
EXPORT void cross_entropy_backward_bf16(const uint16_t* logits, const int64_t* target, const float* weight,
                                        const float* norm, uint16_t* grad, int64_t rows, int64_t columns, int threads) {
  cross_entropy_backward(logits, target, weight, norm, grad, rows, columns, threads);
}

#ifdef __AVX512BF16__
// For each of `heads`: P and dS [length, length] in bfloat16 from q, k, v, grad, out [length, 2 · pairs] in bfloat16 and lse
// [length] in float32. `scratch`: threads · (2 · pairs + 1) · (length rounded up to 32) words.
EXPORT void attention_shares(const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* grad,
                             const uint16_t* out, const float* lse, float scale, int causal, int64_t heads,
                             int64_t length, int64_t pairs, uint16_t* p, uint16_t* ds, uint32_t* scratch, int threads) {
  const int64_t padded = (length + 31) / 32 * 32, one = length * 2 * pairs, square = length * length;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    uint32_t* keys = scratch + t * (2 * pairs + 1) * padded;
    uint32_t* values = keys + pairs * padded;
    float* delta = reinterpret_cast<float*>(values + pairs * padded);  // rowsum(dO ∘ O)
    for (int64_t h = heads * t / threads; h < heads * (t + 1) / threads; ++h) {
      pack_pairs(k + h * one, length, padded, pairs, keys);
      pack_pairs(v + h * one, length, padded, pairs, values);
      for (int64_t row = 0; row < length; ++row)
        delta[row] = inner(grad + h * one + row * 2 * pairs, out + h * one + row * 2 * pairs, 2 * pairs);
      int64_t i = 0;
      for (; i + 4 <= length; i += 4)
        some_rows<4>(q + h * one + i * 2 * pairs, grad + h * one + i * 2 * pairs, keys, values, lse + h * length + i,
                     delta + i, scale, causal, i, length, padded, pairs, p + h * square + i * length,
                     ds + h * square + i * length);
      for (; i < length; ++i)
        some_rows<1>(q + h * one + i * 2 * pairs, grad + h * one + i * 2 * pairs, keys, values, lse + h * length + i,
                     delta + i, scale, causal, i, length, padded, pairs, p + h * square + i * length,
                     ds + h * square + i * length);
    }
  }
}
#endif
}
