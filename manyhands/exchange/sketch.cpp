// The loops of sketch.py for float32: everything is read and written in order. See there for the definitions.

#include <algorithm>
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t TILE = 4096;  // entries of the vector that stay in the first cache while all rows see them

inline float least(float a, float b) { return a < b ? a : b; }
inline float most(float a, float b) { return a < b ? b : a; }
inline float middle(float a, float b, float c) { return most(least(a, b), least(most(a, b), c)); }

}  // namespace

// double_rows [rows, 2 columns], zeroed: row j collects signs[j, b] * block b from column shifts[j, b] on.
EXPORT void manyhands_sketch(const float* x, int64_t n, int64_t rows, int64_t columns, const int64_t* shifts,
                             const float* signs, float* double_rows) {
    const int64_t blocks = (n + columns - 1) / columns;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t end = std::min(n, (block + 1) * columns);
        for (int64_t begin = block * columns; begin < end; begin += TILE) {
            const int64_t length = std::min(TILE, end - begin);
            for (int64_t row = 0; row < rows; ++row) {
                const float sign = signs[row * blocks + block];
                float* to = double_rows + row * 2 * columns + shifts[row * blocks + block] + (begin - block * columns);
                const float* from = x + begin;
                for (int64_t i = 0; i < length; ++i) to[i] += sign * from[i];
            }
        }
    }
}

// The medians [n] of what the rows (1, 3 or 5, each twice side by side) hold for each entry.
EXPORT void manyhands_estimate(const float* double_rows, int64_t n, int64_t rows, int64_t columns, const int64_t* shifts,
                               const float* signs, float* out) {
    const int64_t blocks = (n + columns - 1) / columns;
    for (int64_t block = 0; block < blocks; ++block) {
        const float* from[5];
        float sign[5];
        for (int64_t row = 0; row < rows; ++row) {
            from[row] = double_rows + row * 2 * columns + shifts[row * blocks + block];
            sign[row] = signs[row * blocks + block];
        }
        float* to = out + block * columns;
        const int64_t length = std::min(columns, n - block * columns);
        if (rows == 1) {
            for (int64_t i = 0; i < length; ++i) to[i] = sign[0] * from[0][i];
        } else if (rows == 3) {
            const float *a = from[0], *b = from[1], *c = from[2];
            for (int64_t i = 0; i < length; ++i) to[i] = middle(sign[0] * a[i], sign[1] * b[i], sign[2] * c[i]);
        } else {
            const float *a = from[0], *b = from[1], *c = from[2], *d = from[3], *e = from[4];
            for (int64_t i = 0; i < length; ++i) {
                const float p = sign[0] * a[i], q = sign[1] * b[i], r = sign[2] * c[i], s = sign[3] * d[i];
                to[i] = middle(sign[4] * e[i], most(least(p, q), least(r, s)), least(most(p, q), most(r, s)));
            }
        }
    }
}
