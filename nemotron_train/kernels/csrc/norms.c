/* RMSNorm and Mamba-2's gated grouped RMSNorm, forward and backward. model/norm.py and
   model/mamba/gated_norm.py define them. A group of channels of one token is read once, stays in
   the cache, and is written once.

   With u = y SiLU(gate), or u = y without a gate: out = weight u / sqrt(mean of u^2 + epsilon). */

#include "rows.h"

/* Read by library.py. */
const int64_t max_width = MAX_WIDTH, block_tokens = BLOCK;

struct norm {
    int64_t batch, length, groups, width; /* width: channels a group, at most MAX_WIDTH */
    float epsilon;
    const void *weight; /* [groups x width] */
    int32_t weight_is_bfloat16;
    float *scale; /* [batch x length, groups], 1 / sqrt(...): out in forward, in for backward */
};

INLINE void forward_group(
    const struct norm *norm, const struct rows *y, const struct rows *gate, const struct rows *out,
    int64_t row, int64_t token, int64_t group, float *scale
) {
    float u[MAX_WIDTH];
    int64_t width = norm->width, channel = group * width;
    load(y->data, place(y, row, token) + channel, y->is_bfloat16, width, u);
    if (gate) {
        float other[MAX_WIDTH];
        load(gate->data, place(gate, row, token) + channel, gate->is_bfloat16, width, other);
        for (int64_t i = 0; i < width; i++) u[i] *= other[i] * sigmoid(other[i]);
    }
    int is_bfloat16 = norm->weight_is_bfloat16;
    *scale = normalize(u, width, norm->weight, channel, is_bfloat16, norm->epsilon);
    store(u, width, out->data, place(out, row, token) + channel, out->is_bfloat16);
}

/* With n = u scale and t = dout weight: dweight += dout n, du = scale (t - n mean(t n)), and with a
   gate dy = du SiLU(gate), dgate = du y SiLU'(gate). */
INLINE void backward_group(
    const struct norm *norm, const struct rows *y, const struct rows *gate,
    const struct rows *dout, const struct rows *dy, const struct rows *dgate, int64_t row,
    int64_t token, int64_t group, float scale, float *dweight
) {
    float y_values[MAX_WIDTH], gates[MAX_WIDTH], sigmoids[MAX_WIDTH], normed[MAX_WIDTH];
    float grad[MAX_WIDTH], sum = 0.0f;
    int64_t width = norm->width, channel = group * width;
    load(y->data, place(y, row, token) + channel, y->is_bfloat16, width, y_values);
    load(dout->data, place(dout, row, token) + channel, dout->is_bfloat16, width, grad);
    if (gate) {
        load(gate->data, place(gate, row, token) + channel, gate->is_bfloat16, width, gates);
        for (int64_t i = 0; i < width; i++) {
            sigmoids[i] = sigmoid(gates[i]);
            normed[i] = scale * y_values[i] * gates[i] * sigmoids[i];
        }
    } else {
        for (int64_t i = 0; i < width; i++) normed[i] = scale * y_values[i];
    }
    for (int64_t i = 0; i < width; i++) dweight[channel + i] += grad[i] * normed[i];
    float weight[MAX_WIDTH];
    load(norm->weight, channel, norm->weight_is_bfloat16, width, weight);
    for (int64_t i = 0; i < width; i++) grad[i] *= weight[i];
    SIMD_SUM(sum)
    for (int64_t i = 0; i < width; i++) sum += grad[i] * normed[i];
    float mean = sum / (float)width;
    for (int64_t i = 0; i < width; i++) grad[i] = scale * (grad[i] - normed[i] * mean);
    if (gate) {
        for (int64_t i = 0; i < width; i++) {
            float slope = sigmoids[i] * (1.0f + gates[i] * (1.0f - sigmoids[i]));
            normed[i] = grad[i] * y_values[i] * slope;
            grad[i] *= gates[i] * sigmoids[i];
        }
        store(normed, width, dgate->data, place(dgate, row, token) + channel, dgate->is_bfloat16);
    }
    store(grad, width, dy->data, place(dy, row, token) + channel, dy->is_bfloat16);
}

/* gate: null for a norm without a gate. The calls with a constant null let the compiler remove the
   gate's code. */
void norm_forward(
    const struct norm *norm, const struct rows *y, const struct rows *gate, const struct rows *out,
    int max_threads
) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t block = 0; block < num_blocks(norm->batch * norm->length); block++) {
        int64_t end = smaller((block + 1) * BLOCK, norm->batch * norm->length);
        for (int64_t i = block * BLOCK; i < end; i++)
            for (int64_t group = 0; group < norm->groups; group++) {
                float *scale = norm->scale + i * norm->groups + group;
                int64_t row = i % norm->batch, token = i / norm->batch;
                if (gate)
                    forward_group(norm, y, gate, out, row, token, group, scale);
                else
                    forward_group(norm, y, 0, out, row, token, group, scale);
            }
    }
}

/* parts: FP32 [blocks of batch x length, channels], zeros on entry, the sums over the tokens of
   each block; dweight: FP32 [channels]. */
void norm_backward(
    const struct norm *norm, const struct rows *y, const struct rows *gate,
    const struct rows *dout, const struct rows *dy, const struct rows *dgate, int max_threads,
    float *parts, float *dweight
) {
    int64_t blocks = num_blocks(norm->batch * norm->length), channels = norm->groups * norm->width;
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t end = smaller((block + 1) * BLOCK, norm->batch * norm->length);
        float *part = parts + block * channels;
        for (int64_t i = block * BLOCK; i < end; i++)
            for (int64_t group = 0; group < norm->groups; group++) {
                float scale = norm->scale[i * norm->groups + group];
                int64_t row = i % norm->batch, token = i / norm->batch;
                if (gate)
                    backward_group(norm, y, gate, dout, dy, dgate, row, token, group, scale, part);
                else
                    backward_group(norm, y, 0, dout, dy, 0, row, token, group, scale, part);
            }
    }
    sum_blocks(parts, blocks, channels, dweight);
}
