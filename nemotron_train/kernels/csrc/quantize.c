/* Quantization of a matrix in one sweep over it, for a CPU: the arithmetic of precision/nvfp4.py,
   mxfp8.py and rounding.py operation by operation, so that the bits are the same
   (tests/kernels/test_quantize.py checks this).

   Owns: the loops. Does not own: the definitions and their sources (in the Python files), the
   tensor's largest magnitude (computed before, since ranks may share it), compiling and calling
   (kernels/quantize.py, whose flags forbid fused multiply-adds).

   A block is `height` x `width` elements with one scale. A strip is one block high and is processed
   by one thread; TILE of its columns at a time stay in the first-level cache. The loops over a tile
   have no branches and a constant length, so that the compiler can vectorize them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The result of a tile: an operand of a product (code times block scale), or NVFP4's codes. */
enum output { NVFP4_OPERAND, NVFP4_CODES, MXFP8_OPERAND };
enum { TILE = 64, MAX_HEIGHT = 32, WORK_PER_THREAD = 1 << 14 };

static const float FLOAT_MAX = 3.40282346638528859812e38f;

/* The counter of random words, which are a function of the element's position; random_words in
   rounding.py. */
struct words {
    uint64_t seed;
    uint32_t stream, step;
    int64_t row_offset, column_offset;
};

/* Values that all blocks of a tensor share. */
struct scales {
    float sixth, decode_all; /* NVFP4 */
    int32_t largest;         /* MXFP8 */
};

/* The output: an operand in BF16 [rows, columns], or codes and block scales. */
struct target {
    uint16_t *operand;
    uint8_t *codes, *scales;
};

struct matrix {
    const void *values; /* [rows, columns], contiguous */
    int64_t rows, columns;
    int32_t is_bfloat16; /* else FP32 */
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

/* min and max that keep a NaN in `value`, as torch's clamp does. */
INLINE float at_most(float value, float limit) { return value > limit ? limit : value; }
INLINE float at_least(float value, float limit) { return value < limit ? limit : value; }

INLINE uint32_t max_bits(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* round_to_nearest_ in rounding.py. */
INLINE float round_to_nearest(float value, int mantissa_bits, int min_exponent) {
    uint32_t lowest = (uint32_t)(min_exponent + 127) << 23;
    uint32_t magic_bits = max_bits(bits_of(value) & 0x7F800000u, lowest);
    float magic = float_of(magic_bits + (((uint32_t)(23 - mantissa_bits) << 23) | (1u << 22)));
    return (value + magic) - magic;
}

/* _round_stochastically_ in nvfp4.py: returns twice the rounded number. For a NaN the result is
   arbitrary; the scale of its block is NaN too. */
INLINE float round_stochastically(float value, uint8_t word) {
    float power = float_of(max_bits(bits_of(value) & 0x7F800000u, 0x3F800000u));
    float increment = copysignf((float)word * power, value) * 0x1p-9f;
    float whole = (float)(int32_t)((value + increment) * 2.0f);
    return float_of(bits_of(whole) & 0xFFC00000u);
}

/* 2^exponent, exactly; 2^-127 (subnormal) for any smaller exponent. */
INLINE float power_of_two(int32_t exponent) {
    int32_t bits = (int32_t)((uint32_t)(exponent + 127) << 23);
    return float_of((uint32_t)(bits > (1 << 22) ? bits : (1 << 22)));
}

/* _scale_exponents in mxfp8.py. */
INLINE int32_t scale_exponent(float amax) {
    uint32_t bits = bits_of(amax * (1.0f / 448.0f));
    int32_t exponent = (int32_t)(bits >> 23);
    uint32_t mantissa = bits & 0x7FFFFFu;
    exponent += mantissa > 0 && !(exponent == 0 && mantissa <= 0x400000u);
    return (exponent > 254 ? 254 : exponent) - 127;
}

/* e2m1_codes in nvfp4.py, to nearest: the code, as a float, from the scaled number and its clamped
   value. A NaN has code 0. It is tested by its bits, since GCC 12 compiles a comparison with itself
   to branches. */
INLINE float e2m1_code(float scaled, float clamped) {
    uint32_t is_number = -(uint32_t)((bits_of(scaled) & 0x7FFFFFFFu) <= 0x7F800000u);
    uint32_t half_binade = bits_of(fabsf(round_to_nearest(clamped, 1, 0)) + 0.25f) >> 22;
    uint32_t sign = bits_of(scaled + 0.0f) >> 28 & 8;
    return (float)(int32_t)(((max_bits(half_binade, 252) - 252) | sign) & is_number);
}

/* The factors of a block: encode multiplies its elements before rounding, decode after it. */
INLINE void nvfp4_scale(float amax, struct scales scales, float *encode, float *decode) {
    float scale = round_to_nearest(at_most(amax * scales.sixth, 448.0f), 3, -6);
    *encode = at_most(1.0f / (scale * scales.decode_all), FLOAT_MAX);
    *decode = scale;
}

INLINE void mxfp8_scale(float amax, int32_t largest, float *encode, float *decode) {
    int32_t exponent = scale_exponent(amax), below = exponent - largest;
    float scale = below < -117 ? 0.0f : power_of_two(below);
    *encode = power_of_two(-exponent);
    *decode = amax != amax ? NAN : scale;
}

/* The key of a row's words: Philox4x32-10 of (row, stream, step, 0). */
static void row_key(const struct words *words, int64_t row, uint32_t key[2]) {
    uint32_t c0 = (uint32_t)(words->row_offset + row), c1 = words->stream, c2 = words->step, c3 = 0;
    uint32_t k0 = (uint32_t)words->seed, k1 = (uint32_t)(words->seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    key[0] = c0, key[1] = c1;
}

/* The random words of TILE columns from `column` of the whole matrix on, four bytes to an integer.
   Returns the address of the first one in buffer[TILE / 4 + 1]. */
INLINE const uint8_t *row_words(const uint32_t key[2], int64_t column, uint32_t *buffer) {
    uint32_t first = (uint32_t)(column >> 2);
    for (uint32_t i = 0; i < TILE / 4 + 1; i++) {
        uint32_t mixed = (first + i) * 0x9E3779B9u ^ key[0];
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6Bu + key[1];
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35u;
        buffer[i] = mixed ^ mixed >> 16;
    }
    return (const uint8_t *)buffer + (column & 3);
}

/* Loads `count` values of a row as FP32, then zeros up to TILE. A row past the end is all zeros. */
INLINE void load(const struct matrix *x, int64_t row, int64_t column, int count, float *values) {
    int64_t start = row * x->columns + column;
    if (row >= x->rows) {
        count = 0;
    } else if (x->is_bfloat16) {
        const uint16_t *from = (const uint16_t *)x->values + start;
        for (int i = 0; i < count; i++) values[i] = float_of((uint32_t)from[i] << 16);
    } else {
        memcpy(values, (const float *)x->values + start, (size_t)count * sizeof(float));
    }
    for (int i = count; i < TILE; i++) values[i] = 0.0f;
}

/* Stores one row of a tile as BF16. Exact: a code times its block's scale fits in BF16. */
INLINE void store_operand(const float *values, int count, uint16_t *to) {
    for (int i = 0; i < count; i++) to[i] = (uint16_t)(bits_of(values[i]) >> 16);
}

/* Stores one row of a tile of codes, two to a byte, the first in the lower half. */
INLINE void store_codes(const float *values, int count, uint8_t *to) {
    uint8_t packed[TILE / 2];
    for (int i = 0; i < TILE / 2; i++)
        packed[i] = (uint8_t)((int32_t)values[2 * i] | (int32_t)values[2 * i + 1] << 4);
    memcpy(to, packed, (size_t)(count + 1) / 2);
}

/* Stores scales as E4M3 bits; they are E4M3 numbers already. */
INLINE void store_scales(const float *scales, int count, uint8_t *to) {
    for (int i = 0; i < count; i++) {
        uint32_t normal = (bits_of(scales[i]) >> 20) - ((127 - 7) << 3);
        uint32_t subnormal = (uint32_t)(int32_t)(scales[i] * 512.0f);
        uint32_t bits = scales[i] < 0x1p-6f ? subnormal : normal;
        to[i] = (uint8_t)(scales[i] != scales[i] ? 0x7F : bits);
    }
}

/* Quantizes the values of a tile in place, and writes the scales of its blocks to block_decode.
   words: null to round to nearest. */
INLINE void quantize_tile(
    enum output output, int height, int width, float values[][TILE], const uint8_t *const *words,
    struct scales scales, float *block_decode
) {
    uint32_t largest[TILE];
    float block_encode[TILE], encode[TILE], decode[TILE];
    for (int i = 0; i < TILE; i++) largest[i] = bits_of(values[0][i]) & 0x7FFFFFFFu;
    for (int row = 1; row < height; row++)
        for (int i = 0; i < TILE; i++)
            largest[i] = max_bits(largest[i], bits_of(values[row][i]) & 0x7FFFFFFFu);
    for (int block = 0; block < TILE / width; block++) {
        uint32_t amax = 0;
        for (int i = 0; i < width; i++) amax = max_bits(amax, largest[block * width + i]);
        largest[block] = amax;
    }
    for (int block = 0; block < TILE / width; block++) {
        float amax = float_of(largest[block]);
        if (output == MXFP8_OPERAND)
            mxfp8_scale(amax, scales.largest, &block_encode[block], &block_decode[block]);
        else
            nvfp4_scale(amax, scales, &block_encode[block], &block_decode[block]);
        /* If the scale of a block rounded to zero, all its elements are +0 in an operand. */
        if (output == NVFP4_OPERAND)
            block_encode[block] = block_decode[block] == 0.0f ? 0.0f : block_encode[block];
    }
    for (int block = 0; block < TILE / width; block++)
        for (int i = block * width; i < (block + 1) * width; i++) {
            encode[i] = block_encode[block];
            decode[i] = block_decode[block];
        }
    for (int row = 0; row < height; row++)
        for (int i = 0; i < TILE; i++) {
            float value = values[row][i] * encode[i];
            float limit = output == MXFP8_OPERAND ? 448.0f : 6.0f;
            float clamped = at_most(at_least(value, -limit), limit);
            if (output == NVFP4_CODES)
                values[row][i] = e2m1_code(value, clamped);
            else if (output == MXFP8_OPERAND)
                values[row][i] = round_to_nearest(clamped, 3, -6) * decode[i];
            else if (words)
                values[row][i] = round_stochastically(clamped, words[row][i]) * 0.5f * decode[i];
            else
                values[row][i] = round_to_nearest(clamped, 1, 0) * decode[i];
        }
}

INLINE void quantize_strip(
    enum output output, int height, int width, int stochastic, const struct matrix *x,
    int64_t strip, struct scales scales, const struct words *words, struct target target
) {
    float values[MAX_HEIGHT][TILE], block_decode[TILE] = {0};
    uint32_t keys[MAX_HEIGHT][2], buffers[MAX_HEIGHT][TILE / 4 + 1];
    const uint8_t *tile_words[MAX_HEIGHT];
    int64_t top = strip * height, bytes = (x->columns + 1) / 2, blocks = (x->columns + 15) / 16;
    int64_t end = top + height < x->rows ? top + height : x->rows;
    if (stochastic)
        for (int row = 0; row < height; row++) row_key(words, top + row, keys[row]);
    for (int64_t column = 0; column < x->columns; column += TILE) {
        int count = (int)(x->columns - column < TILE ? x->columns - column : TILE);
        for (int row = 0; row < height; row++) load(x, top + row, column, count, values[row]);
        if (stochastic)
            for (int row = 0; row < height; row++)
                tile_words[row] = row_words(keys[row], words->column_offset + column, buffers[row]);
        const uint8_t *const *drawn = stochastic ? tile_words : 0;
        quantize_tile(output, height, width, values, drawn, scales, block_decode);
        if (output == NVFP4_CODES) {
            for (int64_t row = top; row < end; row++)
                store_codes(values[row - top], count, target.codes + row * bytes + column / 2);
            for (int64_t row = top; row < top + height; row++) {
                uint8_t *to = target.scales + row * blocks + column / 16;
                store_scales(block_decode, (count + 15) / 16, to);
            }
        } else {
            for (int64_t row = top; row < end; row++)
                store_operand(values[row - top], count, target.operand + row * x->columns + column);
        }
    }
}

static int threads_for(const struct matrix *x, int max_threads) {
    int64_t wanted = x->rows * x->columns / WORK_PER_THREAD + 1;
    return wanted < max_threads ? (int)wanted : max_threads;
}

/* max |x| of each strip of `height` rows, FP32; NaN if an element is NaN (as bits, a NaN compares
   larger than any number). */
void strip_amax(const struct matrix *x, int64_t height, int max_threads, float *amax) {
    int64_t strips = (x->rows + height - 1) / height;
#pragma omp parallel for schedule(static) num_threads(threads_for(x, max_threads))
    for (int64_t strip = 0; strip < strips; strip++) {
        int64_t start = strip * height * x->columns;
        int64_t end = (strip + 1) * height * x->columns;
        if (end > x->rows * x->columns) end = x->rows * x->columns;
        uint32_t largest = 0;
        if (x->is_bfloat16) {
            const uint16_t *from = x->values;
            uint16_t narrow = 0;
            for (int64_t i = start; i < end; i++) {
                uint16_t bits = from[i] & 0x7FFF;
                narrow = bits > narrow ? bits : narrow;
            }
            largest = (uint32_t)narrow << 16;
        } else {
            const uint32_t *from = x->values;
            for (int64_t i = start; i < end; i++)
                largest = max_bits(largest, from[i] & 0x7FFFFFFFu);
        }
        amax[strip] = float_of(largest);
    }
}

static struct scales nvfp4_scales(float amax) {
    float encode_all = at_most(2688.0f / amax, FLOAT_MAX);
    encode_all = encode_all == 0.0f ? 1.0f : encode_all;
    return (struct scales){encode_all * (1.0f / 6.0f), 1.0f / encode_all, 0};
}

/* nvfp4_operand in nvfp4.py. layout: block shape, 0: 1 x 16; 1: 16 x 1; 2: 16 x 16 (to nearest
   only). amax: of the tensor that a strip belongs to, strip i at amax[i x amax_stride] (stride 0:
   one for all). words: null to round to nearest. out: BF16 [rows, columns]. */
void nvfp4_operand(
    const struct matrix *x, int layout, const float *amax, int64_t amax_stride,
    const struct words *words, int max_threads, uint16_t *out
) {
    int64_t strips = layout == 0 ? x->rows : (x->rows + 15) / 16;
    struct target target = {out, 0, 0};
#pragma omp parallel for schedule(static) num_threads(threads_for(x, max_threads))
    for (int64_t strip = 0; strip < strips; strip++) {
        struct scales scales = nvfp4_scales(amax[strip * amax_stride]);
        if (layout == 0 && words)
            quantize_strip(NVFP4_OPERAND, 1, 16, 1, x, strip, scales, words, target);
        else if (layout == 0)
            quantize_strip(NVFP4_OPERAND, 1, 16, 0, x, strip, scales, 0, target);
        else if (layout == 1 && words)
            quantize_strip(NVFP4_OPERAND, 16, 1, 1, x, strip, scales, words, target);
        else if (layout == 1)
            quantize_strip(NVFP4_OPERAND, 16, 1, 0, x, strip, scales, 0, target);
        else
            quantize_strip(NVFP4_OPERAND, 16, 16, 0, x, strip, scales, 0, target);
    }
}

/* quantize_nvfp4 in nvfp4.py, to nearest. layout: block shape, 0: 1 x 16; 2: 16 x 16. codes: [rows,
   ceil(columns / 2)]; block_scales: [rows, ceil(columns / 16)], the scale of a 16 x 16 block
   repeated for each of its rows. */
void nvfp4_codes(
    const struct matrix *x, int layout, const float *amax, int max_threads, uint8_t *codes,
    uint8_t *block_scales
) {
    int64_t strips = layout == 0 ? x->rows : (x->rows + 15) / 16;
    struct target target = {0, codes, block_scales};
#pragma omp parallel for schedule(static) num_threads(threads_for(x, max_threads))
    for (int64_t strip = 0; strip < strips; strip++) {
        struct scales scales = nvfp4_scales(*amax);
        if (layout == 0)
            quantize_strip(NVFP4_CODES, 1, 16, 0, x, strip, scales, 0, target);
        else
            quantize_strip(NVFP4_CODES, 16, 16, 0, x, strip, scales, 0, target);
    }
}

/* mxfp8_operand in mxfp8.py. layout: block shape, 0: 1 x 32; 1: 32 x 1. amax: of the whole
   tensor. */
void mxfp8_operand(
    const struct matrix *x, int layout, const float *amax, int max_threads, uint16_t *out
) {
    int64_t strips = layout == 0 ? x->rows : (x->rows + 31) / 32;
    struct target target = {out, 0, 0};
#pragma omp parallel for schedule(static) num_threads(threads_for(x, max_threads))
    for (int64_t strip = 0; strip < strips; strip++) {
        struct scales scales = {0.0f, 0.0f, scale_exponent(*amax)};
        if (layout == 0)
            quantize_strip(MXFP8_OPERAND, 1, 32, 0, x, strip, scales, 0, target);
        else
            quantize_strip(MXFP8_OPERAND, 32, 1, 0, x, strip, scales, 0, target);
    }
}
