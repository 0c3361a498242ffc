/* A few tokens through a Mamba-2 layer: norm, in_proj, convolution, recurrence, gated norm,
   out_proj, residual. convolution.py, decoding.py and gated_norm.py in model/mamba define them. */

#include "decoding.h"

enum { MAX_TAPS = 8 };

/* Read by library.py. */
const int64_t mamba_decoding_max_taps = MAX_TAPS;

struct mamba {
    struct tokens tokens;
    int64_t batch, most; /* sequences; tokens of the longest one */
    const int64_t *starts; /* [batch + 1]: first token of each sequence, and the token count */
    int64_t heads, head_dim, groups, state_size, taps;
    const void *in_proj;          /* [z, x, B, C, dt concatenated, width] */
    const void *conv_weight;      /* [channels, taps], channels: x, B and C */
    const void *conv_bias;        /* [channels] */
    const float *dt_bias, *A_log, *D; /* [heads] */
    float dt_min, dt_max;
    const void *gated_norm; /* [heads x head_dim] */
    const void *out_proj;   /* [width, heads x head_dim] */
    const void *window;     /* [batch, taps - 1, channels]: the inputs before this call */
    void *inputs;           /* [batch, taps - 1 + most, channels]: window, then the new inputs */
    const float *before;    /* state before this call, [batch, heads, head_dim, state_size] */
    float *after;           /* state after each token, [most, ...]; or `before` itself, which is
                               then updated in place to the state after the last token */
    float *workspace;            /* see `mamba_decoding` */
};

INLINE int64_t inner_width(const struct mamba *of) { return of->heads * of->head_dim; }

INLINE int64_t num_channels(const struct mamba *of) {
    return inner_width(of) + 2 * of->groups * of->state_size;
}

INLINE int64_t projected_width(const struct mamba *of) {
    return inner_width(of) + num_channels(of) + of->heads;
}

INLINE int64_t sequence_of(const struct mamba *of, int64_t token) {
    int64_t row = 0;
    while (of->starts[row + 1] <= token) row++;
    return row;
}

/* Fills of->inputs: for each sequence the window, then its new inputs. */
INLINE void gather_inputs(const struct mamba *of, const float *projected) {
    int64_t channels = num_channels(of), taps = of->taps - 1, each = taps + of->most;
    int is_bfloat16 = of->tokens.is_bfloat16;
    int64_t size = is_bfloat16 ? 2 : 4;
    SHARED_OUT
    for (int64_t job = 0; job < of->batch * each; job++) {
        int64_t row = job / each, place = job % each, token = of->starts[row] + place - taps;
        if (place < taps)
            memcpy(
                (char *)of->inputs + job * channels * size,
                (const char *)of->window + (row * taps + place) * channels * size,
                (size_t)(channels * size)
            );
        else if (token < of->starts[row + 1])
            store(
                projected + token * projected_width(of) + inner_width(of), channels, of->inputs,
                job * channels, is_bfloat16
            );
    }
}

/* out = SiLU(bias + sum over taps of weight input), [tokens, channels]. */
INLINE void convolve(const struct mamba *of, float *out) {
    int64_t channels = num_channels(of), blocks = num_blocks(channels);
    int is_bfloat16 = of->tokens.is_bfloat16;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * blocks; job++) {
        int64_t token = job / blocks, start = job % blocks * BLOCK, row = sequence_of(of, token);
        int64_t count = smaller(BLOCK, channels - start);
        int64_t first = row * (of->taps - 1 + of->most) + token - of->starts[row];
        float sum[BLOCK], x[BLOCK], weight[BLOCK * MAX_TAPS];
        load(of->conv_bias, start, is_bfloat16, count, sum);
        load(of->conv_weight, start * of->taps, is_bfloat16, count * of->taps, weight);
        for (int64_t tap = 0; tap < of->taps; tap++) {
            load(of->inputs, (first + tap) * channels + start, is_bfloat16, count, x);
            for (int64_t i = 0; i < count; i++) sum[i] += x[i] * weight[i * of->taps + tap];
        }
        for (int64_t i = 0; i < count; i++) sum[i] *= sigmoid(sum[i]);
        round_row(sum, count, is_bfloat16);
        memcpy(out + token * channels + start, sum, (size_t)count * sizeof(float));
    }
}

/* state = state decay + (dt x) B, y = state C + D x, for one head and one token. */
INLINE void step_head(
    const struct mamba *of, const float *convolved, float dt, int64_t head, const float *before,
    float *after, float *y
) {
    int64_t size = of->state_size, group = head / (of->heads / of->groups);
    const float *x = convolved + head * of->head_dim;
    const float *B = convolved + inner_width(of) + group * size;
    const float *C = B + of->groups * size;
    dt += of->dt_bias[head];
    dt = dt > 20.0f ? dt : log1pf(expf(dt)); /* torch's softplus */
    dt = dt < of->dt_min ? of->dt_min : dt > of->dt_max ? of->dt_max : dt;
    float decay = expf(dt * -expf(of->A_log[head]));
    for (int64_t p = 0; p < of->head_dim; p++) {
        const float *old = before + p * size;
        float *new = after + p * size, written = x[p] * dt, sum = 0.0f;
        SIMD_SUM(sum)
        for (int64_t n = 0; n < size; n++) {
            new[n] = old[n] * decay + written * B[n];
            sum += new[n] * C[n];
        }
        y[p] = rounded(sum + x[p] * of->D[head], of->tokens.is_bfloat16);
    }
}

/* The recurrence of all heads over their tokens. y: [tokens, heads x head_dim]. */
INLINE void recur(
    const struct mamba *of, const float *projected, const float *convolved, float *y
) {
    int64_t state = of->head_dim * of->state_size, each = of->batch * of->heads * state;
    int64_t inner = inner_width(of), channels = num_channels(of), width = projected_width(of);
    int64_t stride = of->after == of->before ? 0 : each;
    SHARED_OUT
    for (int64_t job = 0; job < of->batch * of->heads; job++) {
        int64_t row = job / of->heads, head = job % of->heads;
        const float *before = of->before + job * state;
        float *after = of->after + job * state;
        for (int64_t token = of->starts[row]; token < of->starts[row + 1]; token++) {
            float dt = projected[token * width + width - of->heads + head];
            float *own = y + token * inner + head * of->head_dim;
            step_head(of, convolved + token * channels, dt, head, before, after, own);
            before = after;
            after += stride;
        }
        /* A shorter sequence repeats its last state in the remaining entries. */
        for (int64_t i = of->starts[row + 1] - of->starts[row]; stride && i < of->most; i++) {
            memcpy(after, before, (size_t)state * sizeof(float));
            after += stride;
        }
    }
}

INLINE void gate(const struct mamba *of, const float *projected, float *y) {
    int64_t inner = inner_width(of), width = inner / of->groups;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * of->groups; job++) {
        int64_t token = job / of->groups, channel = job % of->groups * width;
        const float *z = projected + token * projected_width(of) + channel;
        float *u = y + token * inner + channel;
        for (int64_t i = 0; i < width; i++) u[i] *= z[i] * sigmoid(z[i]);
        normalize_rounded(u, width, of->gated_norm, channel, &of->tokens);
    }
}

INLINE void round_tokens(float *values, int64_t rows, int64_t width, int is_bfloat16) {
    if (!is_bfloat16) return;
    SHARED_OUT
    for (int64_t row = 0; row < rows; row++) round_row(values + row * width, width, 1);
}

/* workspace: four arrays one after the other, [tokens, width] (normed, later the result),
   [tokens, projected width], [tokens, channels] and [tokens, inner width]. */
void mamba_decoding(const struct mamba *of, int max_threads) {
    int64_t count = of->tokens.count, width = of->tokens.width, inner = inner_width(of);
    int is_bfloat16 = of->tokens.is_bfloat16;
    float *normed = of->workspace, *projected = normed + count * width;
    float *convolved = projected + count * projected_width(of);
    float *y = convolved + count * num_channels(of);
#pragma omp parallel num_threads(max_threads)
    {
        normed_tokens(&of->tokens, normed);
        linear(normed, count, width, of->in_proj, projected_width(of), is_bfloat16, projected);
        round_tokens(projected, count, projected_width(of), is_bfloat16);
        gather_inputs(of, projected);
        convolve(of, convolved);
        recur(of, projected, convolved, y);
        gate(of, projected, y);
        linear(y, count, inner, of->out_proj, width, is_bfloat16, normed);
        add_residual(&of->tokens, normed);
    }
}
