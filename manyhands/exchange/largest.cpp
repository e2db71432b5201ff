// Selection of the entries of largest magnitude of float32 vectors; see largest.py for the definition.
//
// Magnitudes are compared as integers (the bits without the sign order as the numbers do); NaN counts as infinity. Plain
// C++ that compilers vectorise; with AVX-512 positions are written by compress-store, sixteen entries at a time.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t INFINITE = 0x7f800000;

void magnitudes(const float* values, int64_t n, int32_t* keys) {
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, values + i, 4);
        keys[i] = std::min(bits & 0x7fffffff, INFINITE);
    }
}

int32_t count_at_least(const int32_t* keys, int32_t n, int32_t least) {
    int32_t count = 0;
    for (int32_t i = 0; i < n; ++i) count += keys[i] >= least;
    return count;
}

struct Least {
    int32_t key;    // the k-th largest
    int32_t above;  // how many are larger: fewer than k
};

// The answer, once exactly k keys are known to reach `bound`.
Least smallest_from(const int32_t* keys, int32_t n, int32_t bound) {
    int32_t least = INFINITE, above = 0;
    for (int32_t i = 0; i < n; ++i) least = std::min(least, keys[i] >= bound ? keys[i] : INFINITE);
    for (int32_t i = 0; i < n; ++i) above += keys[i] > least;
    return {least, above};
}

// The k-th largest of n keys by bisection, each step one vectorised pass over the first cache. `guess`, the neighbour's
// answer, narrows the bracket at the beginning.
Least kth(const int32_t* keys, int32_t n, int32_t k, int32_t guess) {
    int32_t low = 0, high = INFINITE + 1, above = 0;  // at least k reach low; fewer, `above`, reach high
    for (int32_t step = 1 << 20, probe = guess; probe > 0 && probe <= INFINITE; step *= 2) {
        const int32_t count = count_at_least(keys, n, probe);
        if (count == k) return smallest_from(keys, n, probe);
        const bool bracketed = count > k ? high <= INFINITE : low > 0;
        if (count > k) low = probe;
        else high = probe, above = count;
        if (bracketed || step > 1 << 28) break;
        probe += count > k ? step : -step;
    }
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2, count = count_at_least(keys, n, middle);
        if (count == k) return smallest_from(keys, n, middle);
        if (count > k) low = middle;
        else high = middle, above = count;
    }
    return {low, above};
}

}  // namespace

// The k largest of each of `chunks` chunks of `chunk` entries: positions [chunks * k], ascending.
EXPORT void manyhands_largest_of_chunks(const float* values, int64_t chunks, int32_t chunk, int32_t k, int64_t* where) {
    std::vector<int32_t> keys(chunk);
    int32_t guess = 0;
    for (int64_t c = 0; c < chunks; ++c, values += chunk) {
        magnitudes(values, chunk, keys.data());
        const Least found = kth(keys.data(), chunk, k, guess);
        const int32_t least = guess = found.key;
        int32_t ties = k - found.above;
        const int64_t begin = c * chunk;
        int32_t i = 0;
#if defined(__AVX512F__)
        const __m512i limit = _mm512_set1_epi32(least);
        for (; i + 16 <= chunk; i += 16) {
            __m512i block = _mm512_loadu_si512(keys.data() + i);
            __mmask16 take = _mm512_cmpge_epi32_mask(block, limit);
            if (!take) continue;
            for (uint32_t bits = take; bits; bits &= bits - 1) {
                int32_t at = i + __builtin_ctz(bits);
                if (keys[at] > least || ties-- > 0) *where++ = begin + at;
            }
        }
#endif
        for (; i < chunk; ++i)
            if (keys[i] > least || (keys[i] == least && ties-- > 0)) *where++ = begin + i;
    }
}

// Positions of entries whose magnitude is at least `threshold`, and of NaN, ascending; at most `room` of them.
// Returns how many there are: more than `room` means that it stopped.
EXPORT int64_t manyhands_at_least(const float* values, int64_t n, float threshold, int64_t room, int64_t* where) {
    int32_t limit;
    std::memcpy(&limit, &threshold, 4);
    limit = std::min(limit & 0x7fffffff, INFINITE);
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i limits = _mm512_set1_epi32(limit), magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i steps_low = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + 64 <= n; i += 64) {
        uint64_t take = 0;
        for (int part = 0; part < 4; ++part) {
            __m512i block = _mm512_and_si512(_mm512_loadu_si512(values + i + 16 * part), magnitude);
            take |= uint64_t(_mm512_cmpge_epi32_mask(block, limits)) << (16 * part);
        }
        if (!take) continue;
        if (found + 64 > room) {
            if (found + __builtin_popcountll(take) > room) return room + 1;
            for (uint64_t bits = take; bits; bits &= bits - 1) where[found++] = i + __builtin_ctzll(bits);
            continue;
        }
        for (int part = 0; part < 8; ++part) {
            const __mmask8 bits = uint8_t(take >> (8 * part));
            _mm512_mask_compressstoreu_epi64(where + found, bits, _mm512_add_epi64(_mm512_set1_epi64(i + 8 * part), steps_low));
            found += __builtin_popcount(bits);
        }
    }
#endif
    for (; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, values + i, 4);
        if ((bits & 0x7fffffff) < limit) continue;
        if (found == room) return room + 1;
        where[found++] = i;
    }
    return found;
}
