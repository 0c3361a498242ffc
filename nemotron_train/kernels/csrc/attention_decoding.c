/* A few tokens through an attention layer: norm, linear_qkv, update of the KV cache, attention over
   it, linear_proj, residual. model/attention/decoding.py defines the attention. */

#include "decoding.h"

/* PIECE: keys that one job of a thread covers. MAX_QUERIES: query heads per key head, at most.
   MAX_HEAD: head dimension, at most. */
enum { PIECE = 256, MAX_QUERIES = 64, MAX_HEAD = 256 };

/* Read by library.py. */
const int64_t attention_decoding_piece = PIECE;
const int64_t attention_decoding_max_queries = MAX_QUERIES;
const int64_t attention_decoding_max_head_dim = MAX_HEAD;

struct attention {
    struct tokens tokens;
    int64_t groups;   /* key/value heads */
    int64_t queries;  /* query heads of each group, at most MAX_QUERIES */
    int64_t head_dim; /* at most MAX_HEAD */
    const void *linear_qkv;  /* [groups x (queries + 2) x head_dim, width]: a group's queries, its
                                key, its value */
    const void *linear_proj; /* [width, groups x queries x head_dim] */
    void *keys, *values;     /* [sequences, groups, cache_capacity, head_dim] */
    int64_t cache_capacity;      /* tokens of a sequence that fit */
    int64_t longest;         /* tokens of the longest sequence after this call */
    const int64_t *rows, *positions; /* [tokens]: the sequence of a token, its position there */
    float *workspace;                     /* see `attention_decoding` */
};

INLINE int64_t num_pieces(const struct attention *of) { return (of->longest + PIECE - 1) / PIECE; }

/* Address of a query head of a token's group (which < queries), of its key (which = queries) or of
   its value (which = queries + 1). */
INLINE float *head_of(
    const struct attention *of, float *projected, int64_t token, int64_t group, int64_t which
) {
    return projected + ((token * of->groups + group) * (of->queries + 2) + which) * of->head_dim;
}

INLINE int64_t cached(const struct attention *of, int64_t row, int64_t group, int64_t position) {
    return ((row * of->groups + group) * of->cache_capacity + position) * of->head_dim;
}

INLINE void fill_cache(const struct attention *of, float *projected) {
    int is_bfloat16 = of->tokens.is_bfloat16;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * of->groups; job++) {
        int64_t token = job / of->groups, group = job % of->groups;
        int64_t to = cached(of, of->rows[token], group, of->positions[token]);
        float *key = head_of(of, projected, token, group, of->queries);
        store(key, of->head_dim, of->keys, to, is_bfloat16);
        store(key + of->head_dim, of->head_dim, of->values, to, is_bfloat16);
        round_row(head_of(of, projected, token, group, 0), of->queries * of->head_dim, is_bfloat16);
    }
}

/* `count` rows of the cache (at most LANES) from element `first` on, converted to FP32 in `wide` if
   they are BF16. */
INLINE const float *cached_rows(
    const struct attention *of, const void *cache, int64_t first, int64_t count, float *wide
) {
    if (!of->tokens.is_bfloat16) return (const float *)cache + first;
    load(cache, first, 1, count * of->head_dim, wide);
    return wide;
}

/* scores [queries, PIECE] for `count` keys. The keys are transposed, LANES at a time, so that each
   lane sums the score of one key. */
INLINE void score(
    const struct attention *of, const float *query, int64_t first, int64_t count, float *scores
) {
    int64_t width = of->head_dim;
    float wide[LANES * MAX_HEAD], turned[LANES * MAX_HEAD], scale = 1.0f / sqrtf((float)width);
    for (int64_t start = 0; start < count; start += LANES) {
        int64_t num_keys = smaller(LANES, count - start);
        const float *keys = cached_rows(of, of->keys, first + start * width, num_keys, wide);
        for (int64_t i = 0; i < num_keys; i++)
            for (int64_t d = 0; d < width; d++) turned[d * LANES + i] = keys[i * width + d];
        for (int64_t head = 0; head < of->queries; head += TOGETHER) {
            lanes sums[TOGETHER] = {{0}};
            int64_t heads = smaller(TOGETHER, of->queries - head);
            const float *q[TOGETHER];
            for (int64_t h = 0; h < TOGETHER; h++)
                q[h] = query + (head + smaller(h, heads - 1)) * width;
            for (int64_t d = 0; d < width; d++)
                for (int h = 0; h < TOGETHER; h++)
                    sums[h] += q[h][d] * lanes_at(turned + d * LANES);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < num_keys; i++)
                    scores[(head + h) * PIECE + start + i] = sums[h][i] * scale;
        }
    }
}

/* Softmax over the piece without the division: replaces scores by weights e^(score - largest), and
   gives the largest score and the sum of weights of each head. */
INLINE void weigh(
    const struct attention *of, float *scores, int64_t count, float *largest, float *sums
) {
    for (int64_t head = 0; head < of->queries; head++) {
        float *own = scores + head * PIECE, most = own[0], sum = 0.0f;
        _Pragma("omp simd reduction(max : most)")
        for (int64_t i = 0; i < count; i++) most = own[i] > most ? own[i] : most;
        for (int64_t i = 0; i < count; i++) own[i] = exponential(own[i] - most);
        SIMD_SUM(sum)
        for (int64_t i = 0; i < count; i++) sum += own[i];
        largest[head] = most;
        sums[head] = sum;
    }
}

/* out [queries, head_dim] += the weighted sum of `count` values. */
INLINE void add_values(
    const struct attention *of, const float *weights, int64_t first, int64_t count, float *out
) {
    int64_t width = of->head_dim;
    float wide[LANES * MAX_HEAD];
    for (int64_t start = 0; start < count; start += LANES) {
        int64_t num_values = smaller(LANES, count - start);
        const float *values = cached_rows(of, of->values, first + start * width, num_values, wide);
        for (int64_t head = 0; head < of->queries; head += TOGETHER) {
            int64_t heads = smaller(TOGETHER, of->queries - head), lane = 0;
            const float *own[TOGETHER];
            for (int64_t h = 0; h < TOGETHER; h++)
                own[h] = weights + (head + smaller(h, heads - 1)) * PIECE + start;
            for (; lane + LANES <= width; lane += LANES) {
                lanes sums[TOGETHER] = {{0}};
                for (int64_t i = 0; i < num_values; i++)
                    for (int h = 0; h < TOGETHER; h++)
                        sums[h] += own[h][i] * lanes_at(values + i * width + lane);
                for (int64_t h = 0; h < heads; h++)
                    for (int64_t j = 0; j < LANES; j++)
                        out[(head + h) * width + lane + j] += sums[h][j];
            }
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < num_values; i++)
                    for (int64_t j = lane; j < width; j++)
                        out[(head + h) * width + j] += own[h][i] * values[i * width + j];
        }
    }
}

/* Attention over each piece separately. parts: largest scores, sums of weights and weighted values
   of each piece, [tokens, groups, pieces, queries x (2 + head_dim)]. */
INLINE void attend_pieces(const struct attention *of, float *projected, float *parts) {
    int64_t pieces = num_pieces(of), size = of->queries * (2 + of->head_dim);
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * of->groups * pieces; job++) {
        int64_t token = job / pieces / of->groups, group = job / pieces % of->groups;
        int64_t start = job % pieces * PIECE;
        int64_t count = smaller(PIECE, of->positions[token] + 1 - start);
        if (count <= 0) continue;
        float scores[MAX_QUERIES * PIECE], *part = parts + job * size;
        int64_t first = cached(of, of->rows[token], group, start);
        score(of, head_of(of, projected, token, group, 0), first, count, scores);
        weigh(of, scores, count, part, part + of->queries);
        part += 2 * of->queries;
        memset(part, 0, (size_t)(of->queries * of->head_dim) * sizeof(float));
        add_values(of, scores, first, count, part);
    }
}

/* Combines the pieces: each is rescaled to the largest score of all pieces, then summed and divided
   by the sum of weights. mixed: [tokens, groups x queries x head_dim]. */
INLINE void join_pieces(const struct attention *of, const float *parts, float *mixed) {
    int64_t pieces = num_pieces(of), size = of->queries * (2 + of->head_dim), width = of->head_dim;
    SHARED_OUT
    for (int64_t job = 0; job < of->tokens.count * of->groups * of->queries; job++) {
        int64_t head = job % of->queries, token = job / of->queries / of->groups;
        int64_t seen = of->positions[token] / PIECE + 1;
        const float *part = parts + job / of->queries * pieces * size;
        float most = part[head], sum = 0.0f, *out = mixed + job * width;
        for (int64_t i = 1; i < seen; i++)
            most = part[i * size + head] > most ? part[i * size + head] : most;
        memset(out, 0, (size_t)width * sizeof(float));
        for (int64_t i = 0; i < seen; i++) {
            const float *own = part + i * size;
            float weight = exponential(own[head] - most);
            sum += weight * own[of->queries + head];
            own += 2 * of->queries + head * width;
            for (int64_t d = 0; d < width; d++) out[d] += weight * own[d];
        }
        for (int64_t d = 0; d < width; d++) out[d] /= sum;
        round_row(out, width, of->tokens.is_bfloat16);
    }
}

/* workspace: arrays one after the other, [tokens, width] (normed, later the result), [tokens,
   projected width], [tokens, mixed width], and the parts of `attend_pieces`. */
void attention_decoding(const struct attention *of, int max_threads) {
    int64_t count = of->tokens.count, width = of->tokens.width;
    int is_bfloat16 = of->tokens.is_bfloat16;
    int64_t outputs = of->groups * (of->queries + 2) * of->head_dim;
    int64_t inner = of->groups * of->queries * of->head_dim;
    float *normed = of->workspace, *projected = normed + count * width;
    float *mixed = projected + count * outputs, *parts = mixed + count * inner;
#pragma omp parallel num_threads(max_threads)
    {
        normed_tokens(&of->tokens, normed);
        linear(normed, count, width, of->linear_qkv, outputs, is_bfloat16, projected);
        fill_cache(of, projected);
        attend_pieces(of, projected, parts);
        join_pieces(of, parts, mixed);
        linear(mixed, count, inner, of->linear_proj, width, is_bfloat16, normed);
        add_residual(&of->tokens, normed);
    }
}
