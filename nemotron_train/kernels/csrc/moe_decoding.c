/* A few tokens through a LatentMoE layer: norm, router, shared expert, latent projection, chosen
   experts, latent projection, residual. model/moe (layer.py, decoding.py) defines the steps. */

#include "decoding.h"

struct moe {
    struct tokens tokens;
    int64_t num_experts, choices, hidden;
    int64_t latent, shared; /* widths; 0 if there are no latent projections, no shared expert */
    const void *router;     /* [num_experts, width] */
    const float *bias;      /* [num_experts]: added to the scores for the choice only */
    float scale;
    const void *shared1, *shared2;  /* [shared, width], [width, shared] */
    const void *latent1, *latent2;  /* [latent, width], [width, latent] */
    const void *weight1, *weight2;  /* [num_experts, hidden, latent or width], and transposed */
    float *workspace;                    /* see `moe_decoding` */
    int64_t *experts;               /* the chosen experts: [tokens, choices] */
};

/* Chooses the experts with the highest sigmoid(logit) + bias. probabilities: scale sigmoid(logit) /
   sum over the chosen experts, [tokens, choices]. */
INLINE void route(const struct moe *of, const float *logits, float *probabilities) {
    SHARED_OUT
    for (int64_t token = 0; token < of->tokens.count; token++) {
        float scores[MAX_WIDTH], biased[MAX_WIDTH], sum = 1e-20f;
        int64_t *experts = of->experts + token * of->choices;
        float *own = probabilities + token * of->choices;
        for (int64_t e = 0; e < of->num_experts; e++) {
            scores[e] = sigmoid(logits[token * of->num_experts + e]);
            biased[e] = scores[e] + of->bias[e];
        }
        for (int64_t choice = 0; choice < of->choices; choice++) {
            int64_t best = 0;
            for (int64_t e = 1; e < of->num_experts; e++)
                if (biased[e] > biased[best]) best = e;
            biased[best] = -INFINITY;
            experts[choice] = best;
            sum += own[choice] = scores[best];
        }
        for (int64_t choice = 0; choice < of->choices; choice++) own[choice] *= of->scale / sum;
    }
}

INLINE float squared_relu(float value) { return value < 0.0f ? 0.0f : value * value; }

/* hidden = p relu(W1 x)^2 for each choice, [tokens, choices, hidden]. */
INLINE void enter_experts(
    const struct moe *of, const float *x, const float *probabilities, float *hidden
) {
    int64_t width = of->latent ? of->latent : of->tokens.width;
    int64_t blocks = (of->hidden + TOGETHER - 1) / TOGETHER;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * of->choices * blocks; job++) {
        int64_t choice = job / blocks, first = job % blocks * TOGETHER;
        int64_t row = of->experts[choice] * of->hidden;
        int64_t count = smaller(TOGETHER, of->hidden - first);
        float *out = hidden + choice * of->hidden + first;
        product_rows(
            x + choice / of->choices * width, 1, width, of->weight1, row + first, count,
            of->tokens.is_bfloat16, out, 0
        );
        for (int64_t i = 0; i < count; i++) out[i] = squared_relu(out[i]) * probabilities[choice];
    }
}

/* y = sum over the choices of W2 hidden, [tokens, latent or width]. */
INLINE void leave_experts(const struct moe *of, const float *hidden, float *y) {
    int64_t width = of->latent ? of->latent : of->tokens.width;
    int64_t blocks = (width + TOGETHER - 1) / TOGETHER;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * blocks; job++) {
        int64_t token = job / blocks, first = job % blocks * TOGETHER;
        int64_t count = smaller(TOGETHER, width - first);
        float sum[TOGETHER] = {0}, part[TOGETHER];
        for (int64_t choice = token * of->choices; choice < (token + 1) * of->choices; choice++) {
            int64_t row = of->experts[choice] * width + first;
            product_rows(
                hidden + choice * of->hidden, 1, of->hidden, of->weight2, row, count,
                of->tokens.is_bfloat16, part, 0
            );
            for (int64_t i = 0; i < count; i++) sum[i] += part[i];
        }
        for (int64_t i = 0; i < count; i++)
            y[token * width + first + i] = rounded(sum[i], of->tokens.is_bfloat16);
    }
}

INLINE void activate_shared(const struct moe *of, float *hidden) {
    int is_bfloat16 = of->tokens.is_bfloat16;
    SHARED_OUT
    for (int64_t token = 0; token < of->tokens.count; token++)
        for (int64_t i = token * of->shared; i < (token + 1) * of->shared; i++)
            hidden[i] = rounded(squared_relu(rounded(hidden[i], is_bfloat16)), is_bfloat16);
}

/* to = to + from, both rounded first. */
INLINE void add(const struct moe *of, const float *from, float *to) {
    int is_bfloat16 = of->tokens.is_bfloat16;
    SHARED_OUT
    for (int64_t i = 0; i < of->tokens.count * of->tokens.width; i++)
        to[i] = rounded(to[i], is_bfloat16) + rounded(from[i], is_bfloat16);
}

/* workspace: arrays [tokens, ...] one after the other, with the widths: width (three times),
   num_experts, choices, shared, latent (twice), choices x hidden. */
void moe_decoding(const struct moe *of, int max_threads) {
    int64_t count = of->tokens.count, width = of->tokens.width, latent = of->latent;
    int is_bfloat16 = of->tokens.is_bfloat16;
    float *normed = of->workspace, *routed = normed + count * width, *shared = routed + count * width;
    float *logits = shared + count * width, *probabilities = logits + count * of->num_experts;
    float *shared_hidden = probabilities + count * of->choices;
    float *inputs = shared_hidden + count * of->shared, *outputs = inputs + count * latent;
    float *hidden = outputs + count * latent;
#pragma omp parallel num_threads(max_threads)
    {
        normed_tokens(&of->tokens, normed);
        linear(normed, count, width, of->router, of->num_experts, is_bfloat16, logits);
        if (of->shared) {
            linear(normed, count, width, of->shared1, of->shared, is_bfloat16, shared_hidden);
            activate_shared(of, shared_hidden);
            linear(shared_hidden, count, of->shared, of->shared2, width, is_bfloat16, shared);
        }
        route(of, logits, probabilities);
        if (latent) {
            linear(normed, count, width, of->latent1, latent, is_bfloat16, inputs);
            SHARED_OUT
            for (int64_t token = 0; token < count; token++)
                round_row(inputs + token * latent, latent, is_bfloat16);
        }
        enter_experts(of, latent ? inputs : normed, probabilities, hidden);
        leave_experts(of, hidden, latent ? outputs : routed);
        if (latent) linear(outputs, count, latent, of->latent2, width, is_bfloat16, routed);
        if (of->shared) add(of, shared, routed);
        add_residual(&of->tokens, routed);
    }
}
