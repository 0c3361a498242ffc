/* The elementwise work around the matrix products of the chunked SSD: per-head scaling with the
   change between token order and chunk order, the matching gradients, and the recurrence over chunk
   states. model/mamba/scan_scaling.py defines the functions.

   Shapes: tokens [B, S, H, P] with strides, H = G x J heads of P channels, S = K x L. In chunk
   order, factors of a head are [K, G, B, L, J] and operands of products [K, G, B, L, J, P],
   contiguous. */

#include "rows.h"

enum { MAX_HEAD = 256 };

/* Read by library.py. */
const int64_t scan_max_head_dim = MAX_HEAD;

struct scan {
    int64_t chunks, groups, batch, length, heads, head_dim; /* K, G, B, L, J, P */
};

/* One head of one token. Token order: row, token, first channel. Chunk order: index of its factor
   (`number`). */
struct head {
    int64_t row, token, channel, number;
};

INLINE struct head locate(const struct scan *scan, int64_t group, int64_t token, int64_t i) {
    int64_t row = token % scan->batch, position = token / scan->batch;
    int64_t chunk = position / scan->length, inside = position % scan->length;
    int64_t place_in_chunks = (chunk * scan->groups + group) * scan->batch + row;
    int64_t number = (place_in_chunks * scan->length + inside) * scan->heads + i;
    return (struct head){row, position, (group * scan->heads + i) * scan->head_dim, number};
}

/* Runs `body` for every head of every token, with `at` its location. P is a compile-time constant
   for the usual head sizes. */
#define EVERY_HEAD(body)                                                                          \
    _Pragma("omp parallel for schedule(static) num_threads(max_threads)")                         \
    for (int64_t token = 0; token < scan->batch * scan->chunks * scan->length; token++)           \
        for (int64_t group = 0; group < scan->groups; group++)                                    \
            for (int64_t i = 0; i < scan->heads; i++) {                                           \
                struct head at = locate(scan, group, token, i);                                   \
                if (scan->head_dim == 64)                                                         \
                    body(64);                                                                     \
                else if (scan->head_dim == 32)                                                    \
                    body(32);                                                                     \
                else                                                                              \
                    body(scan->head_dim);                                                         \
            }

INLINE void load_head(const struct rows *x, struct head at, int64_t width, float *to) {
    load(x->data, place(x, at.row, at.token) + at.channel, x->is_bfloat16, width, to);
}

INLINE void store_head(const float *from, int64_t width, const struct rows *x, struct head at) {
    store(from, width, x->data, place(x, at.row, at.token) + at.channel, x->is_bfloat16);
}

INLINE void to_chunks_of(
    const struct rows *x, struct head at, int64_t width, float scale, void *out
) {
    float values[MAX_HEAD];
    load_head(x, at, width, values);
    for (int64_t p = 0; p < width; p++) values[p] *= scale;
    store(values, width, out, at.number * width, x->is_bfloat16);
}

/* out = x scale1 scale2 in chunk order, in x's dtype. */
void scan_to_chunks(
    const struct scan *scan, const struct rows *x, const float *scale1, const float *scale2,
    void *out, int max_threads
) {
#define BODY(width) to_chunks_of(x, at, width, scale1[at.number] * scale2[at.number], out)
    EVERY_HEAD(BODY)
#undef BODY
}

INLINE void from_chunks_of(
    const struct rows *x, const void *part, struct head at, int64_t width, float own, float scale,
    const struct rows *out
) {
    float values[MAX_HEAD], others[MAX_HEAD];
    load_head(x, at, width, values);
    load(part, at.number * width, x->is_bfloat16, width, others);
    for (int64_t p = 0; p < width; p++) values[p] = values[p] * own + others[p] * scale;
    store_head(values, width, out, at);
}

/* out = x own + part scale in token order; part is in chunk order. */
void scan_from_chunks(
    const struct scan *scan, const struct rows *x, const void *part, const float *own,
    const float *scale, const struct rows *out, int max_threads
) {
#define BODY(width) from_chunks_of(x, part, at, width, own[at.number], scale[at.number], out)
    EVERY_HEAD(BODY)
#undef BODY
}

INLINE void readers_of(
    const struct rows *dy, const struct rows *x, const void *part, struct head at, int64_t width,
    float read, void *dyr, float *row, float *dyx
) {
    float grads[MAX_HEAD], values[MAX_HEAD], parts[MAX_HEAD], sum = 0.0f, sum_x = 0.0f;
    load_head(dy, at, width, grads);
    load_head(x, at, width, values);
    load(part, at.number * width, x->is_bfloat16, width, parts);
    SIMD_SUM(sum)
    for (int64_t p = 0; p < width; p++) sum += grads[p] * parts[p];
    SIMD_SUM(sum_x)
    for (int64_t p = 0; p < width; p++) sum_x += grads[p] * values[p];
    row[at.number] = sum * read;
    dyx[at.number] = sum_x;
    for (int64_t p = 0; p < width; p++) grads[p] *= read;
    store(grads, width, dyr, at.number * width, x->is_bfloat16);
}

/* Gradients of y = x own + part read. dyr = dy read, of part, in chunk order; row = read sum_P dy
   part, of log(read); dyx = sum_P dy x, of own. */
void scan_readers(
    const struct scan *scan, const struct rows *dy, const struct rows *x, const void *part,
    const float *read, void *dyr, float *row, float *dyx, int max_threads
) {
#define BODY(width) readers_of(dy, x, part, at, width, read[at.number], dyr, row, dyx)
    EVERY_HEAD(BODY)
#undef BODY
}

INLINE void writers_of(
    const struct rows *dy, const struct rows *x, const void *dxw, struct head at, int64_t width,
    float own, float dt, float write, const struct rows *dx, float *dxdt
) {
    float grads[MAX_HEAD], values[MAX_HEAD], parts[MAX_HEAD], sum = 0.0f;
    load_head(dy, at, width, grads);
    load_head(x, at, width, values);
    load(dxw, at.number * width, x->is_bfloat16, width, parts);
    SIMD_SUM(sum)
    for (int64_t p = 0; p < width; p++) sum += parts[p] * values[p];
    dxdt[at.number] = sum * write;
    for (int64_t p = 0; p < width; p++) grads[p] = grads[p] * own + parts[p] * (dt * write);
    store_head(grads, width, dx, at);
}

/* Gradients of xw = x dt write and of y = x own + ... dx = dy own + dxw dt write in token order;
   dxdt = write sum_P dxw x, of dt. */
void scan_writers(
    const struct scan *scan, const struct rows *dy, const struct rows *x, const void *dxw,
    const float *own, const float *dt, const float *write, const struct rows *dx, float *dxdt,
    int max_threads
) {
#define BODY(width)                                                                               \
    writers_of(                                                                                   \
        dy, x, dxw, at, width, own[at.number], dt[at.number], write[at.number], dx, dxdt          \
    )
    EVERY_HEAD(BODY)
#undef BODY
}

/* states [K + 1, R, N, J, P], FP32, in place: states[k + 1] = end[k] states[k + 1] + carry[k]
   states[k]. end, carry: [K, R, J] with R = G x B. */
void scan_states(
    const struct scan *scan, int64_t state_size, float *states, const float *end,
    const float *carry, int max_threads
) {
    int64_t rows = scan->groups * scan->batch, heads = scan->heads, width = scan->head_dim;
    int64_t step = rows * state_size * heads * width;
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t line = 0; line < rows * state_size; line++)
        for (int64_t k = 0; k < scan->chunks; k++)
            for (int64_t i = 0; i < heads; i++) {
                int64_t number = (k * rows + line / state_size) * heads + i;
                const float *from = states + k * step + (line * heads + i) * width;
                float *to = states + (k + 1) * step + (line * heads + i) * width;
                for (int64_t p = 0; p < width; p++)
                    to[p] = to[p] * end[number] + from[p] * carry[number];
            }
}

/* The gradient of scan_states, from the last chunk to the first. dstates [K + 1, R, N, J, P], FP32:
   on entry, entry k is the gradient with respect to the state entering chunk k from the outputs of
   chunk k only. In place: dstates[k] += carry[k] dstates[k + 1]. Also ends [K, R, J] = sum over N
   and P of dstates[k + 1] states[k + 1], and dsum [K, R, N, J, P] = end[k] dstates[k + 1], BF16 or
   FP32. */
void scan_states_backward(
    const struct scan *scan, int64_t state_size, float *dstates, const float *states,
    const float *end, const float *carry, float *ends, void *dsum, int is_bfloat16,
    int max_threads
) {
    int64_t rows = scan->groups * scan->batch, heads = scan->heads, width = scan->head_dim;
    int64_t step = rows * state_size * heads * width;
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = scan->chunks - 1; k >= 0; k--) {
            const int64_t number = (k * rows + row) * heads;
            for (int64_t i = 0; i < heads; i++) ends[number + i] = 0.0f;
            for (int64_t line = row * state_size; line < (row + 1) * state_size; line++)
                for (int64_t i = 0; i < heads; i++) {
                    int64_t here = k * step + (line * heads + i) * width;
                    const float *after = dstates + here + step, *state = states + here + step;
                    float *before = dstates + here, sum = 0.0f, scaled[MAX_HEAD];
                    float scale = end[number + i], kept = carry[number + i];
                    SIMD_SUM(sum)
                    for (int64_t p = 0; p < width; p++) sum += after[p] * state[p];
                    ends[number + i] += sum;
                    for (int64_t p = 0; p < width; p++) before[p] += after[p] * kept;
                    for (int64_t p = 0; p < width; p++) scaled[p] = after[p] * scale;
                    store(scaled, width, dsum, here, is_bfloat16);
                }
        }
}
