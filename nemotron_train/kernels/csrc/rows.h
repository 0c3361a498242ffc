/* Functions that all layer kernels share. Rows are BF16 or FP32; the arithmetic is FP32.

   Owns: reading and writing rows, exp and sigmoid, the division of a tensor into blocks of tokens.
   A sum over tokens is computed within each block, then over the blocks in order, so the result
   does not depend on the number of threads. Loops have a constant length or cover a whole row, and
   have no branches, so that the compiler can vectorize them. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Lets the compiler reorder this sum over a row into vector lanes. Nothing else is reordered. */
#define SIMD_SUM(name) _Pragma(STRING(omp simd reduction(+ : name)))
#define STRING(text) #text

enum { MAX_WIDTH = 8192, BLOCK = 64 };

/* A [B, S, C] tensor with contiguous channels; strides in elements. */
struct rows {
    void *data;
    int64_t batch_stride, token_stride;
    int32_t is_bfloat16;
};

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even; keeps NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

INLINE void load(const void *from, int64_t start, int is_bfloat16, int64_t count, float *to) {
    if (is_bfloat16) {
        const uint16_t *values = (const uint16_t *)from + start;
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)values[i] << 16);
    } else {
        const float *values = (const float *)from + start;
        for (int64_t i = 0; i < count; i++) to[i] = values[i];
    }
}

INLINE void store(const float *from, int64_t count, void *to, int64_t start, int is_bfloat16) {
    if (is_bfloat16) {
        uint16_t *values = (uint16_t *)to + start;
        for (int64_t i = 0; i < count; i++) values[i] = to_bfloat16(from[i]);
    } else {
        float *values = (float *)to + start;
        for (int64_t i = 0; i < count; i++) values[i] = from[i];
    }
}

INLINE int64_t place(const struct rows *x, int64_t row, int64_t token) {
    return row * x->batch_stride + token * x->token_stride;
}

/* e^x to about one unit in the last place; infinite from 88.4 on; keeps NaN.
   x = n log 2 + r with |r| <= log 2 / 2. e^r is a Taylor polynomial of degree 7 (error 5e-9), and
   the result is multiplied by 2^n through the exponent bits. */
INLINE float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float round_to_integer = 0x1.8p23f;
    float shifted = x * 1.44269504f + round_to_integer;
    float n = shifted - round_to_integer;
    float r = x - n * 0x1.62e4p-1f;
    r = r - n * 1.42860677e-6f;
    float power = 1.0f / 5040;
    power = power * r + 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    return power * float_of((bits_of(shifted) + 127) << 23);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* u = weight u scale, in place; returns scale = 1 / sqrt(mean of u^2 + epsilon). weight: read from
   element `start` on. width: at most MAX_WIDTH. */
INLINE float normalize(
    float *u, int64_t width, const void *weight, int64_t start, int is_bfloat16, float epsilon
) {
    float weights[MAX_WIDTH], sum = 0.0f;
    SIMD_SUM(sum)
    for (int64_t i = 0; i < width; i++) sum += u[i] * u[i];
    float scale = 1.0f / sqrtf(sum / (float)width + epsilon);
    load(weight, start, is_bfloat16, width, weights);
    for (int64_t i = 0; i < width; i++) u[i] *= scale * weights[i];
    return scale;
}

INLINE int64_t num_blocks(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* out[i] = sum over blocks of parts[block][i], in the order of the blocks. */
INLINE void sum_blocks(const float *parts, int64_t blocks, int64_t width, float *out) {
    memcpy(out, parts, (size_t)width * sizeof(float));
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < width; i++) out[i] += parts[block * width + i];
}
