// Loops of replay.py: see there. A value is read once, goes through several steps in a register, and is written once; the same
// bits as its reference.

#include <cmath>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Share {
    float first, keep, second, eps, scale;
};

struct Arrays {
    const float *value, *first, *second, *mean;
    float *to_value, *to_first, *to_second;
};

// numbers: of each step three, 1 - rate·decay, rate / (1 - beta1^t), sqrt(1 - beta2^t)
template <int steps>
void walk(int64_t size, const Arrays& at, const float* numbers, const Share& share) {
    const float *value = at.value, *first = at.first, *second = at.second, *mean = at.mean;
    float *to_value = at.to_value, *to_first = at.to_first, *to_second = at.to_second;
    float shrink[steps], rate[steps], root[steps];
    for (int step = 0; step < steps; step++) {
        shrink[step] = numbers[3 * step];
        rate[step] = numbers[3 * step + 1];
        root[step] = numbers[3 * step + 2];
    }
    const float share1 = share.first, keep2 = share.keep, share2 = share.second, eps = share.eps, scale = share.scale;
    // each array is written where it was read, or elsewhere
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
    for (int64_t i = 0; i < size; i++) {
        float x = value[i], m = first[i], v = second[i];
        const float g = mean[i] * scale, square = (g * share2) * g;
#ifdef __clang__
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 4
#endif
        for (int step = 0; step < steps; step++) {
            m = m + (g - m) * share1;
            v = v * keep2 + square;
            x = x * shrink[step] - (m * rate[step]) / (std::sqrt(v) / root[step] + eps);
        }
        to_value[i] = x;
        to_first[i] = m;
        to_second[i] = v;
    }
}

}  // namespace

EXPORT void replay_adamw(
    int64_t size, const float* value, const float* first, const float* second, float* to_value, float* to_first,
    float* to_second, const float* mean, int64_t steps, const float* numbers, float share1, float keep2, float share2,
    float eps, float scale
) {
    const Share share = {share1, keep2, share2, eps, scale};
    Arrays at = {value, first, second, mean, to_value, to_first, to_second};
    for (; steps > 0; steps -= 4, numbers += 12) {
        if (steps >= 4) walk<4>(size, at, numbers, share);
        else if (steps == 3) walk<3>(size, at, numbers, share);
        else if (steps == 2) walk<2>(size, at, numbers, share);
        else walk<1>(size, at, numbers, share);
        at.value = to_value, at.first = to_first, at.second = to_second;
    }
}

// Σ x², added up in doubles in one order on every processor
EXPORT double square_length(int64_t size, const float* x) {
    constexpr int lanes = 16;
    double sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes)
        for (int lane = 0; lane < lanes; lane++) sums[lane] += double(x[i + lane]) * double(x[i + lane]);
    for (int lane = 0; i < size; i++, lane++) sums[lane] += double(x[i]) * double(x[i]);
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}
