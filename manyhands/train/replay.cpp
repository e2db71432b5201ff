// Loops of replay.py: see there. One pass over memory for any number of steps; the same bits as its reference.

#include <cmath>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// numbers: of each step three, 1 - rate·decay, rate / (1 - beta1^t), sqrt(1 - beta2^t)
EXPORT void replay_adamw(
    int64_t size, const float* value, const float* first, const float* second, float* to_value, float* to_first,
    float* to_second, const float* mean, int64_t steps, const float* numbers, float share1, float keep2, float share2,
    float eps
) {
    const int64_t block = 1024;  // the inner loops run over steps on what the first cache holds
    for (int64_t begin = 0; begin < size; begin += block) {
        const int64_t count = size - begin < block ? size - begin : block;
        float x[block], m[block], v[block], g[block], square[block];
        for (int64_t i = 0; i < count; i++) {
            x[i] = value[begin + i];
            m[i] = first[begin + i];
            v[i] = second[begin + i];
            g[i] = mean[begin + i];
            square[i] = (g[i] * share2) * g[i];
        }
        for (int64_t step = 0; step < steps; step++) {
            const float shrink = numbers[3 * step], rate = numbers[3 * step + 1], root = numbers[3 * step + 2];
            for (int64_t i = 0; i < count; i++) {
                m[i] = m[i] + (g[i] - m[i]) * share1;
                v[i] = v[i] * keep2 + square[i];
                x[i] = x[i] * shrink - (m[i] * rate) / (std::sqrt(v[i]) / root + eps);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            to_value[begin + i] = x[i];
            to_first[begin + i] = m[i];
            to_second[begin + i] = v[i];
        }
    }
}
