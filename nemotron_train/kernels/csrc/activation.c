/* The activation p relu(h)^2 with one weight p a row, and its gradient. model/activation.py defines
   them. Rows are contiguous. */

#include "rows.h"

struct activation {
    int64_t rows, width; /* width: at most MAX_WIDTH */
    const void *hidden;  /* [rows, width] */
    const float *weight; /* [rows], or null: 1 */
    int32_t is_bfloat16;
};

/* Keeps NaN. */
INLINE float relu(float value) { return value < 0.0f ? 0.0f : value; }

/* out = p relu(hidden)^2, [rows, width]; out may be the memory of hidden. */
void squared_relu(const struct activation *of, void *out, int max_threads) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t row = 0; row < of->rows; row++) {
        float values[MAX_WIDTH], weight = of->weight ? of->weight[row] : 1.0f;
        load(of->hidden, row * of->width, of->is_bfloat16, of->width, values);
        for (int64_t i = 0; i < of->width; i++) {
            float positive = relu(values[i]);
            values[i] = positive * positive * weight;
        }
        store(values, of->width, out, row * of->width, of->is_bfloat16);
    }
}

/* grad: in, the gradient of the result; out, the gradient of hidden, 2 p relu(h) grad. dweight
   [rows], or null: the gradient of p, the sum of relu(h)^2 grad over the row. */
void squared_relu_backward(
    const struct activation *of, void *grad, float *dweight, int max_threads
) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t row = 0; row < of->rows; row++) {
        float values[MAX_WIDTH], grads[MAX_WIDTH], sum = 0.0f;
        float twice = of->weight ? 2.0f * of->weight[row] : 2.0f;
        load(of->hidden, row * of->width, of->is_bfloat16, of->width, values);
        load(grad, row * of->width, of->is_bfloat16, of->width, grads);
        for (int64_t i = 0; i < of->width; i++) {
            values[i] = relu(values[i]);
            grads[i] *= values[i];
        }
        if (dweight) {
            SIMD_SUM(sum)
            for (int64_t i = 0; i < of->width; i++) sum += values[i] * grads[i];
            dweight[row] = sum;
        }
        for (int64_t i = 0; i < of->width; i++) grads[i] *= twice;
        store(grads, of->width, grad, row * of->width, of->is_bfloat16);
    }
}
