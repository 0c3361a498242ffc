/* The sums for cross entropy, and its gradient, which overwrites the logits. model/cross_entropy.py
   defines them. The second loop over a row reads it from the cache. */

#include "rows.h"

enum { PART = 2048 };

struct logits {
    void *values; /* [rows, columns], contiguous */
    int64_t rows, columns;
    int32_t is_bfloat16;
};

/* largest, sum [rows]: the maximum of the row, and the sum of e^(logit - maximum). */
void cross_entropy_sums(const struct logits *logits, float *largest, float *sum, int max_threads) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t row = 0; row < logits->rows; row++) {
        float values[PART], most = -INFINITY, total = 0.0f;
        int64_t start = row * logits->columns;
        for (int64_t column = 0; column < logits->columns; column += PART) {
            int64_t count = smaller(PART, logits->columns - column);
            load(logits->values, start + column, logits->is_bfloat16, count, values);
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < count; i++) most = values[i] > most ? values[i] : most;
        }
        for (int64_t column = 0; column < logits->columns; column += PART) {
            int64_t count = smaller(PART, logits->columns - column);
            load(logits->values, start + column, logits->is_bfloat16, count, values);
            SIMD_SUM(total)
            for (int64_t i = 0; i < count; i++) total += exponential(values[i] - most);
        }
        largest[row] = most;
        sum[row] = total;
    }
}

/* Replaces each logit by e^(logit - largest) factor, and adds onehot at column `label`. */
void cross_entropy_gradient(
    const struct logits *logits, const float *largest, const float *factor, const int64_t *label,
    const float *onehot, int max_threads
) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t row = 0; row < logits->rows; row++) {
        float values[PART], most = largest[row], scale = factor[row];
        int64_t start = row * logits->columns;
        for (int64_t column = 0; column < logits->columns; column += PART) {
            int64_t count = smaller(PART, logits->columns - column), here = label[row] - column;
            load(logits->values, start + column, logits->is_bfloat16, count, values);
            for (int64_t i = 0; i < count; i++) values[i] = exponential(values[i] - most) * scale;
            if (here >= 0 && here < count) values[here] += onehot[row];
            store(values, count, logits->values, start + column, logits->is_bfloat16);
        }
    }
}
