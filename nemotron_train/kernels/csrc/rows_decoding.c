/* Norms and linears of a few rows, for the parts of the model outside the layers. */

#include "decoding.h"

/* out = norm(x), row by row. */
void norm_rows(const struct tokens *of, int max_threads) {
#pragma omp parallel for schedule(static) num_threads(max_threads)
    for (int64_t token = 0; token < of->count; token++) {
        float row[MAX_WIDTH];
        load(of->x, token * of->width, of->is_bfloat16, of->width, row);
        normalize_rounded(row, of->width, of->norm, 0, of);
        store(row, of->width, of->out, token * of->width, of->is_bfloat16);
    }
}

/* y = x W' for a few rows: x FP32 [rows, width] (converted from BF16), weight BF16 [outputs,
   width], y BF16 [rows, outputs]; workspace: [rows, outputs]. */
void few_rows(
    const float *x, int64_t rows, int64_t width, const void *weight, int64_t outputs, float *workspace,
    void *y, int max_threads
) {
#pragma omp parallel num_threads(max_threads)
    {
        linear(x, rows, width, weight, outputs, 1, workspace);
        SHARED_OUT
        for (int64_t row = 0; row < rows; row++)
            store(workspace + row * outputs, outputs, y, row * outputs, 1);
    }
}
