// The quantizing codecs' loops, for float32 on CPUs. Compiled for the processor at hand (core/native.py); vectorised by the compiler.
//
// The readable reference is in quantize.py, sign.py and natural.py, and these give the same bytes and the same floats, bit for bit:
// nothing is fused (-ffp-contract=off) and nothing reordered that rounds. Pointers need no alignment. A payload is
// [one scale a block][codes of all values, packed without gaps between blocks]; block b covers values [b*block, (b+1)*block).
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint32_t kInfinity = 0x7F800000;      // bits of float32; above it are the NaNs
constexpr uint16_t kSeen = 0x7FC0;              // bf16 NaN: the scale of a block that holds something not finite
constexpr uint32_t kLargest = 0x7F7FFFFF;
constexpr int kPiece = 1280;                    // values coded at a time: a multiple of every number of codes in a byte

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

// Random 32 bits of (mixed key, index): quantize.random_bits. Two multiplications (Wellons' lowbias32), half a key before each.
inline uint32_t random_bits(uint32_t index, uint32_t low, uint32_t high) {
  uint32_t x = index ^ low;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= high;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

uint32_t largest(const float* x, int64_t n) {  // bits of the largest magnitude: NaN > infinity > all others
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = bits_of(x[i]) & 0x7FFFFFFFu;
    most = a > most ? a : most;
  }
  return most;
}

double magnitude(const float* x, int64_t n) {  // sum of |x|; in float64 the order matters to no float32
  double lane[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) lane[k] += float_of(bits_of(x[i + k]) & 0x7FFFFFFFu);
  double sum = 0;
  for (; i < n; ++i) sum += float_of(bits_of(x[i]) & 0x7FFFFFFFu);
  for (double part : lane) sum += part;
  return sum;
}

template <typename T>
void put(uint8_t* place, int64_t index, T value) {
  std::memcpy(place + index * sizeof(T), &value, sizeof(T));
}

float scale_at(const uint8_t* payload, int64_t index) {
  uint16_t half;
  std::memcpy(&half, payload + 2 * index, 2);
  return float_of(uint32_t{half} << 16);
}

// --- packing: PER codes in a byte, the first in the lowest digits -----------------------------------------------------

constexpr int64_t packed(int64_t n, int per) { return (n + per - 1) / per; }

template <int PER>
void pack(uint8_t* codes, int n, uint8_t* out) {  // codes has room to be padded to whole bytes
  for (int i = n; i % PER != 0; ++i) codes[i] = 0;
  const int bytes = static_cast<int>(packed(n, PER));
  if constexpr (PER == 1) {
    std::memcpy(out, codes, n);
  } else if constexpr (PER == 2) {
    for (int j = 0; j < bytes; ++j) {
      uint16_t two;
      std::memcpy(&two, codes + 2 * j, 2);
      out[j] = static_cast<uint8_t>(two | two >> 4);
    }
  } else if constexpr (PER == 4) {
    for (int j = 0; j < bytes; ++j) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * j, 4);
      out[j] = static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
    }
  } else {
    constexpr uint64_t weights = 81 + (27ull << 8) + (9ull << 16) + (3ull << 24) + (1ull << 32);
    for (int j = 0; j < bytes; ++j) {
      uint64_t five;  // and three more, which reach only the bytes above
      std::memcpy(&five, codes + 5 * j, 8);
      out[j] = static_cast<uint8_t>(five * weights >> 32);  // byte 4 of the product: no byte below carries, all are < 243
    }
  }
}

struct Digits {  // the five base-3 digits of each byte
  uint64_t of[256];
  constexpr Digits() : of() {
    for (int b = 0; b < 256; ++b) {
      int rest = b;
      for (int k = 0; k < 5; ++k, rest /= 3) of[b] |= uint64_t(rest % 3) << 8 * k;
    }
  }
};
constexpr Digits kDigits;

template <int PER>
void unpack(const uint8_t* bytes, int n, uint8_t* codes) {  // codes has 8 bytes to spare
  if constexpr (PER == 1) {
    std::memcpy(codes, bytes, n);
  } else if constexpr (PER == 2) {
    for (int j = 0; j < packed(n, 2); ++j) {
      const uint32_t b = bytes[j];
      put<uint16_t>(codes, j, static_cast<uint16_t>((b | b << 4) & 0x0F0F));
    }
  } else if constexpr (PER == 4) {
    for (int j = 0; j < packed(n, 4); ++j) {
      const uint32_t b = bytes[j];
      put<uint32_t>(codes, j, (b | b << 6 | b << 12 | b << 18) & 0x03030303u);
    }
  } else {
    for (int j = 0; j < packed(n, 5); ++j) std::memcpy(codes + 5 * j, &kDigits.of[bytes[j]], 8);
  }
}

// --- evenly spaced levels (quantize.py) ----------------------------------------------------------------------------------

template <bool STOCHASTIC>
void code(const float* x, int n, float inverse, float offset, int top, uint32_t index, uint64_t key, uint8_t* codes) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  const float half = offset + 0.5f;
  for (int i = 0; i < n; ++i) {
    float shift = half;
    if constexpr (STOCHASTIC)
      shift = offset + (static_cast<float>(static_cast<int32_t>(random_bits(index + i, low, high) >> 16)) * 0x1p-16f + 0x1p-17f);
    const int32_t level = static_cast<int32_t>(x[i] * inverse + shift);
    codes[i] = static_cast<uint8_t>(std::min(level, top));
  }
}

template <int PER, bool STOCHASTIC>
void uniform_encode(const float* x, int64_t n, int64_t block, uint8_t* payload, int top, uint64_t key) {
  const float offset = top * 0.5f;
  uint8_t codes[kPiece + 8];
  uint8_t* body = payload + 2 * ((n + block - 1) / block);
  int fill = 0;
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t begin = b * block, count = std::min(block, n - begin);
    const uint32_t most = largest(x + begin, count);
    float step = 0, inverse = 0;
    uint16_t stored = kSeen;
    if (most < kInfinity) {
      if (most != 0) {
        const float wanted = float_of(most) / offset;
        step = float_of((bits_of(wanted) + 0xFFFFu) & 0xFFFF0000u);  // bf16, rounded up: no value lies beyond the last level
        step = std::min(std::max(step, 0x1p-126f), 0x1.FEp127f);     // whose inverse is finite; bf16's largest
        inverse = 1.0f / step;
      }
      stored = static_cast<uint16_t>(bits_of(step) >> 16);
    }
    put<uint16_t>(payload, b, stored);
    for (int64_t done = 0; done < count;) {
      const int take = static_cast<int>(std::min<int64_t>(count - done, kPiece - fill));
      const int64_t from = begin + done;
      if (stored == kSeen) {
        std::memset(codes + fill, 0, take);
      } else {
        code<STOCHASTIC>(x + from, take, inverse, offset, top, static_cast<uint32_t>(from), key, codes + fill);
      }
      fill += take;
      done += take;
      if (fill == kPiece) {
        pack<PER>(codes, fill, body);
        body += kPiece / PER;
        fill = 0;
      }
    }
  }
  pack<PER>(codes, fill, body);
}

template <int PER>
void uniform_decode(const uint8_t* payload, int64_t n, int64_t block, float* out, int top) {
  const float offset = top * 0.5f, bound = float_of(kLargest);
  uint8_t codes[kPiece + 8];
  const uint8_t* body = payload + 2 * ((n + block - 1) / block);
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int count = static_cast<int>(std::min<int64_t>(kPiece, n - begin));
    unpack<PER>(body + begin / PER, count, codes);
    for (int done = 0; done < count;) {
      const int64_t from = begin + done, b = from / block;
      const int take = static_cast<int>(std::min<int64_t>(count - done, (b + 1) * block - from));
      const float step = scale_at(payload, b);
      for (int i = 0; i < take; ++i) {
        float value = (static_cast<float>(codes[done + i]) - offset) * step;
        value = value > bound ? bound : value;  // NaN stays
        out[from + i] = value < -bound ? -bound : value;
      }
      done += take;
    }
  }
}

// --- one bit (sign.py) ------------------------------------------------------------------------------------------------

void sign_bits(const float* x, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
#ifdef __AVX__
    out[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_loadu_ps(x + i)));
#else
    uint32_t byte = 0;
    for (int k = 0; k < 8; ++k) byte |= (bits_of(x[i + k]) >> 31) << k;
    out[i / 8] = static_cast<uint8_t>(byte);
#endif
  }
  if (i < n) {
    uint32_t byte = 0;
    for (int k = 0; i + k < n; ++k) byte |= (bits_of(x[i + k]) >> 31) << k;
    out[i / 8] = static_cast<uint8_t>(byte);
  }
}

uint16_t mean_scale(const float* x, int64_t n) {  // bf16 of mean |x|, to nearest even, never infinite
  if (largest(x, n) >= kInfinity) return kSeen;
  const uint32_t bits = bits_of(static_cast<float>(magnitude(x, n) / static_cast<double>(n)));
  return static_cast<uint16_t>(std::min<uint32_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16, 0x7F7Fu));
}

// --- powers of two (natural.py) --------------------------------------------------------------------------------------

template <bool STOCHASTIC>
void power(const float* x, int64_t n, uint32_t lower, uint32_t index, uint64_t key, uint8_t* codes) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t add = 0x400000u;
    if constexpr (STOCHASTIC) add = random_bits(index + static_cast<uint32_t>(i), low, high) >> 9;
    const uint32_t bits = bits_of(x[i]);
    const uint32_t field = std::min<uint32_t>(((bits & 0x7FFFFFFFu) + add) >> 23, 254u);
    const uint32_t level = std::max(field, lower) - lower;
    codes[i] = static_cast<uint8_t>(level | (bits >> 31) << 7);
  }
}

}  // namespace

// `key`: of rng.mix. `per`: codes in a byte (1, 2, 4 or 5); `top`: the largest code; levels are (code - top/2) * step.
EXPORT void manyhands_uniform_encode(const float* x, int64_t n, int64_t block, uint8_t* payload, int per, int top,
                                     int stochastic, uint64_t key) {
  auto run = [&](auto nearest, auto random) { (stochastic ? random : nearest)(x, n, block, payload, top, key); };
  if (per == 1) run(uniform_encode<1, false>, uniform_encode<1, true>);
  if (per == 2) run(uniform_encode<2, false>, uniform_encode<2, true>);
  if (per == 4) run(uniform_encode<4, false>, uniform_encode<4, true>);
  if (per == 5) run(uniform_encode<5, false>, uniform_encode<5, true>);
}

EXPORT void manyhands_uniform_decode(const uint8_t* payload, int64_t n, int64_t block, float* out, int per, int top) {
  if (per == 1) uniform_decode<1>(payload, n, block, out, top);
  if (per == 2) uniform_decode<2>(payload, n, block, out, top);
  if (per == 4) uniform_decode<4>(payload, n, block, out, top);
  if (per == 5) uniform_decode<5>(payload, n, block, out, top);
}

EXPORT void manyhands_sign_encode(const float* x, int64_t n, int64_t block, uint8_t* payload) {
  constexpr int64_t piece = 4096;  // read twice while it is near
  const int64_t blocks = (n + block - 1) / block;
  uint8_t* body = payload + 2 * blocks;
  int64_t coded = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = std::min(n, (b + 1) * block);
    put<uint16_t>(payload, b, mean_scale(x + b * block, end - b * block));
    for (; coded + piece <= end; coded += piece) sign_bits(x + coded, piece, body + coded / 8);
  }
  sign_bits(x + coded, n - coded, body + coded / 8);
}

EXPORT void manyhands_sign_decode(const uint8_t* payload, int64_t n, int64_t block, float* out) {
  const uint8_t* body = payload + 2 * ((n + block - 1) / block);
  uint32_t values[256];
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t begin = b * block, end = std::min(n, begin + block);
    const uint32_t scale = bits_of(scale_at(payload, b));
    for (int64_t i = begin; i < end;) {  // whole bytes at a time, 256 values of them
      const int64_t base = i & ~int64_t{7};
      const int bytes = static_cast<int>(std::min<int64_t>(32, (end - base + 7) / 8));
      for (int j = 0; j < bytes; ++j) {
        const uint32_t byte = body[base / 8 + j];
        for (int k = 0; k < 8; ++k) values[8 * j + k] = scale ^ (byte >> k) << 31;
      }
      const int64_t stop = std::min(end, base + 8 * bytes);
      std::memcpy(out + i, values + (i - base), 4 * (stop - i));
      i = stop;
    }
  }
}

EXPORT void manyhands_natural_encode(const float* x, int64_t n, int64_t block, uint8_t* payload, int stochastic,
                                     uint64_t key) {
  uint8_t* body = payload + (n + block - 1) / block;
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t begin = b * block, count = std::min(block, n - begin);
    const uint32_t most = largest(x + begin, count);
    if (most >= kInfinity) {
      payload[b] = 255;
      std::memset(body + begin, 0, count);
      continue;
    }
    const uint32_t highest = std::min<uint32_t>((most >> 23) + 1, 254u);  // a value may be rounded up to it
    const uint32_t lower = std::max<uint32_t>(highest, 127u) - 127u;
    payload[b] = static_cast<uint8_t>(lower);
    (stochastic ? power<true> : power<false>)(x + begin, count, lower, static_cast<uint32_t>(begin), key, body + begin);
  }
}

EXPORT void manyhands_natural_decode(const uint8_t* payload, int64_t n, int64_t block, float* out) {
  const uint8_t* body = payload + (n + block - 1) / block;
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t begin = b * block, end = std::min(n, begin + block);
    const uint32_t lower = payload[b];
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t code = body[i], level = code & 127u;
      const uint32_t bits = (level == 0 ? 0u : (level + lower) << 23) | (code >> 7) << 31;
      out[i] = float_of(lower == 255 ? 0x7FC00000u : bits);
    }
  }
}
