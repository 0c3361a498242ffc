/* Building blocks of the decoding kernels. One call computes a whole layer for a few tokens, so
   weights and states are read once, and reading them is the main cost.

   Values between the steps are FP32. With `is_bfloat16`, a step's result is rounded to BF16 where
   the modules of the layer round it. The functions run inside one parallel region: each distributes
   its loop over the threads, with a barrier at the end. No result depends on the number of threads,
   and no token on later tokens. */

#pragma once
#include "rows.h"

#define SHARED_OUT _Pragma("omp for schedule(static)")

struct tokens {
    int64_t count, width;
    int32_t is_bfloat16; /* dtype of all `void *`: x, out, weights, caches; `float *` is FP32 */
    float epsilon;       /* of the norms */
    const void *x;       /* [count, width], the residual stream */
    void *out;           /* [count, width]: x plus the output of the layer */
    const void *norm;    /* [width] */
};

INLINE float rounded(float value, int is_bfloat16) {
    return is_bfloat16 ? float_of((uint32_t)to_bfloat16(value) << 16) : value;
}

INLINE void round_row(float *values, int64_t count, int is_bfloat16) {
    if (is_bfloat16)
        for (int64_t i = 0; i < count; i++) values[i] = rounded(values[i], 1);
}

/* `normalize` with the result rounded. */
INLINE void normalize_rounded(
    float *u, int64_t width, const void *weight, int64_t start, const struct tokens *of
) {
    normalize(u, width, weight, start, of->is_bfloat16, of->epsilon);
    round_row(u, width, of->is_bfloat16);
}

/* out = norm(x) of the residual stream, [count, width]. */
INLINE void normed_tokens(const struct tokens *of, float *out) {
    SHARED_OUT
    for (int64_t token = 0; token < of->count; token++) {
        float *row = out + token * of->width;
        load(of->x, token * of->width, of->is_bfloat16, of->width, row);
        normalize_rounded(row, of->width, of->norm, 0, of);
    }
}

/* LANES: floats in one vector. TOGETHER: rows of one operand that share a read of the other. The
   compiler maps `lanes` to the vector registers of the processor. */
enum { LANES = 16, TOGETHER = 4 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

INLINE lanes lanes_at(const float *from) {
    lanes values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE float sum_of(lanes values) {
    float sum = 0.0f;
    SIMD_SUM(sum)
    for (int i = 0; i < LANES; i++) sum += values[i];
    return sum;
}

/* to[j][i] = w[i] . x[j], for `rows` rows of x (a constant at each call, at most TOGETHER) and the
   first `count` of TOGETHER rows of weights. */
INLINE void product_block(
    const float *const *w, int64_t count, const float *x, int rows, int64_t width, float *to,
    int64_t to_width
) {
    lanes sums[TOGETHER][TOGETHER] = {{{0}}};
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES)
        for (int j = 0; j < rows; j++) {
            lanes own = lanes_at(x + j * width + k);
            for (int i = 0; i < TOGETHER; i++) sums[j][i] += lanes_at(w[i] + k) * own;
        }
    for (int j = 0; j < rows; j++)
        for (int64_t i = 0; i < count; i++) {
            float sum = sum_of(sums[j][i]);
            for (int64_t rest = k; rest < width; rest++) sum += w[i][rest] * x[j * width + rest];
            to[j * to_width + i] = sum;
        }
}

/* `count` (at most TOGETHER) rows of weights from `first` on, times each of `rows` rows of x:
   to[row][0 ... count - 1], rows `to_width` apart. BF16 weights are converted to FP32 once for all
   rows. */
INLINE void product_rows(
    const float *x, int64_t rows, int64_t width, const void *weight, int64_t first, int64_t count,
    int is_bfloat16, float *to, int64_t to_width
) {
    float wide[TOGETHER * MAX_WIDTH];
    const float *start = wide, *w[TOGETHER];
    if (is_bfloat16)
        load(weight, first * width, 1, count * width, wide);
    else
        start = (const float *)weight + first * width;
    for (int i = 0; i < TOGETHER; i++) w[i] = start + smaller(i, count - 1) * width;
    for (; rows >= 4; rows -= 4, x += 4 * width, to += 4 * to_width)
        product_block(w, count, x, 4, width, to, to_width);
    if (rows == 3) product_block(w, count, x, 3, width, to, to_width);
    if (rows == 2) product_block(w, count, x, 2, width, to, to_width);
    if (rows == 1) product_block(w, count, x, 1, width, to, to_width);
}

/* y = x W', FP32, not rounded: x [rows, width], weight [outputs, width], y [rows, outputs]. */
INLINE void linear(
    const float *x, int64_t rows, int64_t width, const void *weight, int64_t outputs,
    int is_bfloat16, float *y
) {
    SHARED_OUT
    for (int64_t first = 0; first < outputs; first += TOGETHER) {
        int64_t count = smaller(TOGETHER, outputs - first);
        product_rows(x, rows, width, weight, first, count, is_bfloat16, y + first, outputs);
    }
}

/* out = x + y; y is rounded first. */
INLINE void add_residual(const struct tokens *of, const float *y) {
    SHARED_OUT
    for (int64_t token = 0; token < of->count; token++) {
        float x[MAX_WIDTH];
        load(of->x, token * of->width, of->is_bfloat16, of->width, x);
        for (int64_t i = 0; i < of->width; i++)
            x[i] += rounded(y[token * of->width + i], of->is_bfloat16);
        store(x, of->width, of->out, token * of->width, of->is_bfloat16);
    }
}
