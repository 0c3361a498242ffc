/* The short causal convolution with SiLU, forward and backward. model/mamba/convolution.py defines
   it.

   A job is a tile of channels of a block of tokens, processed token by token. The last few inputs
   and unfinished gradients stay in the first-level cache. The backward kernel recomputes the sums
   before the SiLU: a few multiplications cost less than saving them. */

#include "rows.h"

enum { TILE = 128, MAX_TAPS = 4 };

/* Read by library.py. */
const int64_t convolution_max_taps = MAX_TAPS;

struct convolution {
    int64_t batch, length, channels;
    int32_t taps;
    const float *weight;         /* [taps, channels]; tap j reads j tokens back */
    const float *bias;           /* [channels] */
    const int64_t *document_ids; /* [batch, length], or null: one document a row */
};

struct tile {
    float weight[MAX_TAPS][TILE], bias[TILE], x[MAX_TAPS][TILE];
};

/* Number of taps of `token` that stay inside the row and the document. */
INLINE int seen(const struct convolution *conv, int64_t row, int64_t token) {
    const int64_t *ids = conv->document_ids ? conv->document_ids + row * conv->length : 0;
    int taps = 1;
    while (taps < conv->taps && taps <= token && (!ids || ids[token - taps] == ids[token])) taps++;
    return taps;
}

INLINE void load_tile(const void *from, int64_t start, int is_bfloat16, int count, float *to) {
    if (count == TILE) {
        load(from, start, is_bfloat16, TILE, to);
    } else {
        load(from, start, is_bfloat16, count, to);
        for (int i = count; i < TILE; i++) to[i] = 0.0f;
    }
}

INLINE void store_tile(const float *from, int count, void *to, int64_t start, int is_bfloat16) {
    if (count == TILE)
        store(from, TILE, to, start, is_bfloat16);
    else
        store(from, count, to, start, is_bfloat16);
}

/* Loads the weights of the tile, and its inputs before `token`. tile->x is a ring buffer: the input
   of token t is in x[t % MAX_TAPS]. */
INLINE void start_tile(
    struct tile *tile, const struct convolution *conv, const struct rows *x, int64_t row,
    int64_t token, int64_t channel, int count
) {
    load_tile(conv->bias, channel, 0, count, tile->bias);
    for (int j = 0; j < conv->taps; j++) {
        load_tile(conv->weight, j * conv->channels + channel, 0, count, tile->weight[j]);
        int64_t before = token - j;
        if (j > 0 && before >= 0) {
            float *to = tile->x[before % MAX_TAPS];
            load_tile(x->data, place(x, row, before) + channel, x->is_bfloat16, count, to);
        }
    }
}

INLINE void convolve(const struct tile *tile, int64_t token, int taps, float *total) {
    const float *x[MAX_TAPS];
    for (int j = 0; j < MAX_TAPS; j++) x[j] = tile->x[(token - j + MAX_TAPS) % MAX_TAPS];
    if (taps == MAX_TAPS) {
        for (int i = 0; i < TILE; i++)
            total[i] = tile->bias[i] + tile->weight[0][i] * x[0][i] + tile->weight[1][i] * x[1][i] +
                       tile->weight[2][i] * x[2][i] + tile->weight[3][i] * x[3][i];
        return;
    }
    for (int i = 0; i < TILE; i++) total[i] = tile->bias[i] + tile->weight[0][i] * x[0][i];
    for (int j = 1; j < taps; j++)
        for (int i = 0; i < TILE; i++) total[i] += tile->weight[j][i] * x[j][i];
}

void convolution_forward(
    const struct convolution *conv, const struct rows *x, const struct rows *y, int max_threads
) {
    int64_t blocks = num_blocks(conv->length), tiles = (conv->channels + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t job = 0; job < conv->batch * blocks * tiles; job++) {
        int64_t channel = job % tiles * TILE, row = job / tiles / blocks;
        int64_t start = job / tiles % blocks * BLOCK, end = smaller(start + BLOCK, conv->length);
        int count = (int)smaller(TILE, conv->channels - channel);
        struct tile tile;
        float total[TILE];
        start_tile(&tile, conv, x, row, start, channel, count);
        for (int64_t token = start; token < end; token++) {
            int64_t from = place(x, row, token) + channel;
            load_tile(x->data, from, x->is_bfloat16, count, tile.x[token % MAX_TAPS]);
            convolve(&tile, token, seen(conv, row, token), total);
            for (int i = 0; i < TILE; i++) total[i] *= sigmoid(total[i]);
            store_tile(total, count, y->data, place(y, row, token) + channel, y->is_bfloat16);
        }
    }
}

struct gradients {
    float x[MAX_TAPS][TILE], weight[MAX_TAPS][TILE], bias[TILE];
};

/* Adds one token's contribution to all gradients. grad: gradient of the sum before the SiLU. dx is
   added for tokens of this block only; taps and bias only for tokens before `end`, since the next
   block counts its own. */
INLINE void spread(
    const struct tile *tile, struct gradients *to, int64_t token, int taps, int64_t start,
    int64_t end, const float *grad
) {
    for (int j = 0; j < taps; j++) {
        float *dx = to->x[(token - j + MAX_TAPS) % MAX_TAPS];
        const float *x = tile->x[(token - j + MAX_TAPS) % MAX_TAPS];
        if (token - j >= start && token - j < end)
            for (int i = 0; i < TILE; i++) dx[i] += tile->weight[j][i] * grad[i];
        if (token < end)
            for (int i = 0; i < TILE; i++) to->weight[j][i] += grad[i] * x[i];
    }
    if (token < end)
        for (int i = 0; i < TILE; i++) to->bias[i] += grad[i];
}

/* parts: FP32 [batch x blocks, taps + 1, channels], the sums over the tokens of each block.
   out: [taps + 1, channels], the gradients of the taps, then of the bias. */
void convolution_backward(
    const struct convolution *conv, const struct rows *x, const struct rows *dy,
    const struct rows *dx, int max_threads, float *parts, float *out
) {
    int64_t blocks = num_blocks(conv->length), tiles = (conv->channels + TILE - 1) / TILE;
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t job = 0; job < conv->batch * blocks * tiles; job++) {
        int64_t channel = job % tiles * TILE, row = job / tiles / blocks;
        int64_t start = job / tiles % blocks * BLOCK, end = smaller(start + BLOCK, conv->length);
        int count = (int)smaller(TILE, conv->channels - channel);
        struct tile tile;
        struct gradients to = {0};
        float total[TILE], grad[TILE];
        start_tile(&tile, conv, x, row, start, channel, count);
        /* The gradients of the last taps - 1 inputs also depend on outputs of the next block. */
        for (int64_t token = start; token < end + conv->taps - 1; token++) {
            if (token < end) memset(to.x[token % MAX_TAPS], 0, sizeof to.x[0]);
            if (token < conv->length) {
                int taps = seen(conv, row, token);
                int64_t from = place(x, row, token) + channel;
                load_tile(x->data, from, x->is_bfloat16, count, tile.x[token % MAX_TAPS]);
                from = place(dy, row, token) + channel;
                load_tile(dy->data, from, dy->is_bfloat16, count, grad);
                convolve(&tile, token, taps, total);
                for (int i = 0; i < TILE; i++) {
                    float gate = sigmoid(total[i]);
                    grad[i] *= gate * (1.0f + total[i] * (1.0f - gate));
                }
                spread(&tile, &to, token, taps, start, end, grad);
            }
            int64_t done = token - conv->taps + 1;
            if (done >= start && done < end) {
                int64_t place_dx = place(dx, row, done) + channel;
                store_tile(to.x[done % MAX_TAPS], count, dx->data, place_dx, dx->is_bfloat16);
            }
        }
        float *part = parts + job / tiles * (conv->taps + 1) * conv->channels + channel;
        for (int j = 0; j < conv->taps; j++, part += conv->channels)
            memcpy(part, to.weight[j], (size_t)count * sizeof(float));
        memcpy(part, to.bias, (size_t)count * sizeof(float));
    }
    sum_blocks(parts, conv->batch * blocks, (conv->taps + 1) * conv->channels, out);
}
