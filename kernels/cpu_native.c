// Sparse-linear attention of one key-value head in float32, forward and backward, on one thread.
//
// native.py compiles this at first use with the system's C compiler. The formulas are those of kernels/reference.py and
// of algorithms 1 and 2 of SLA (arXiv 2509.24006); alpha and key_mean are SLA2's (arXiv 2602.12675). The projection W
// is folded into the values: V' = V W^T, see NOTE [Projected values] in cpu_linear.py.
//
// NOTE [Panels]
// A matrix (rows, columns) is stored as [columns / PANEL][rows][PANEL]. The panel of a right operand is one run of
// memory that stays in the first-level cache while the left operand goes by. Head dimensions are padded to whole panels
// with zeros, the last block of tokens to a whole block.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define TILE 8  // rows of a register tile
#else
#define LANES 8
#define TILE 4
#endif
#define PANEL (2 * LANES)
#define PAGE 4096        // floats that are summed at a time
#define BLOCK 64         // tokens of a key block
#define MAX_DIM 256      // largest head dimension
#define MAX_QUERIES 128  // tokens of a query block, at most

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { SOFTMAX, ELU, RELU };
enum { NONE, MARGINAL, ALL };

// Strides are in elements; the innermost is 1. Query heads that share the key-value head are `group`.
struct call {
    const float *query, *key, *value;
    float *output, *logsumexp;           // logsumexp: (group, length)
    const int8_t *block_map;             // (group, T_m, T_n)
    const float *weight, *offset;        // (dim, dim) and (dim), contiguous, or null
    const float *key_bias, *key_weight;  // (T_n * BLOCK): added to scores, -inf past the end; factor of phi(K); or null
    const float *alpha;                  // (group, T_m) or null
    const float *key_mean;               // (dim) or null
    float *arena;                        // room for sla_arena(call, ...) floats
    const float *grad_output;
    float *grad_query, *grad_key, *grad_value;
    float *grad_weight, *grad_offset;  // added to
    float *grad_alpha;                 // (group, T_m)
    int64_t query_head, query_token, key_token, value_token, output_head, output_token, map_head, map_row, alpha_head,
        alpha_row;
    int64_t grad_output_head, grad_output_token, grad_query_head, grad_query_token, grad_key_token, grad_value_token;
    int64_t length, dim, group, block_q;
    int32_t feature_map, linear;
    float scale, epsilon, min_denominator;
};

// Sizes of a call, and the buffers that live as long as it.
struct work {
    const struct call *call;
    int64_t rows, columns, dims, most;  // T_m, T_n, padded dim, most critical blocks of a row
    int64_t tokens, square, queries;    // floats of a key block, of a state, of a query block
    int64_t used;
    float *keys_t, *keys, *values_t, *values, *features, *projected;
    float *weight, *weight_t, *states, *state_total, *sums, *sum_total;
    float *grad_states, *grad_sums, *grad_keys, *grad_values, *grad_weight;
    float *query, *query_features, *state, *sum, *linear, *sparse, *scores, *grad_scores, *grad, *grad_linear, *scratch;
    const float **list;
};

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec value) { *(vec *)to = value; }

// Not `zero + value`, which is an addition: it would have to turn -0 into 0.
static inline vec splat(float v) {
#if LANES == 16
    return (vec){v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
#else
    return (vec){v, v, v, v, v, v, v, v};
#endif
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

static inline float add_lanes(vec value) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
}

static inline float largest_lane(vec value) {
    float most = value[0];
    for (int lane = 1; lane < LANES; lane++) most = value[lane] > most ? value[lane] : most;
    return most;
}

// exp within 2 ulp, for arguments up to 88; 0 from -87 down; NaN stays. Degree-6 minimax polynomial after Cephes' expf.
static inline vec exponential(vec x) {
    vec shifted = x * 1.44269504f + 12582912.0f;  // rounds x / log(2) into the lowest bits
    vec quotient = shifted - 12582912.0f;
    vec r = x - quotient * 0.693359375f + quotient * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = ((ivec)shifted - 0x4B400000 + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~(x <= -87.0f));
}

// TILE rows of one panel of C = factor A B or, with `add`, C + factor A B. After `depth` columns the left operand steps
// on by `a_step`, `steps` times in all.
static inline __attribute__((always_inline)) void multiply_tile(const float *a, int64_t a_row, int64_t a_column,
                                                                int64_t a_step, const float *b, int64_t steps,
                                                                int64_t depth, float factor, float *c, int add) {
    vec sums[TILE][2];
    for (int i = 0; i < TILE; i++) sums[i][0] = sums[i][1] = splat(0);
    for (int64_t step = 0; step < steps; step++, a += a_step, b += depth * PANEL)
        for (int64_t k = 0; k < depth; k++) {
            vec first = load(b + k * PANEL), second = load(b + k * PANEL + LANES);
            for (int i = 0; i < TILE; i++) {
                vec left = splat(a[i * a_row + k * a_column]);
                sums[i][0] += left * first;
                sums[i][1] += left * second;
            }
        }
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < 2; v++) {
            float *at = c + i * PANEL + v * LANES;
            store(at, add ? load(at) + factor * sums[i][v] : factor * sums[i][v]);
        }
}

// C (rows, columns) = factor A B for A (rows, inner) and B (inner, columns), or C + factor A B.
static void multiply(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b, float factor,
                     float *c, int add) {
    for (int64_t panel = 0; panel < columns / PANEL; panel++, b += inner * PANEL, c += rows * PANEL)
        for (int64_t i = 0; i < rows; i += TILE)
            multiply_tile(a + i * PANEL, PANEL, 1, rows * PANEL, b, inner / PANEL, PANEL, factor, c + i * PANEL, add);
}

// C (rows, columns) = factor A^T B for A (inner, rows) and B (inner, columns), or C + factor A^T B.
static void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const float *a, const float *b,
                                float factor, float *c, int add) {
    for (int64_t panel = 0; panel < columns / PANEL; panel++, b += inner * PANEL, c += rows * PANEL)
        for (int64_t i = 0; i < rows; i += TILE)
            multiply_tile(a + i / PANEL * inner * PANEL + i % PANEL, 1, PANEL, 0, b, 1, inner, factor, c + i * PANEL,
                          add);
}

// (valid, dim) of row stride `stride` into (rows, dims), zero elsewhere.
static void pack(const float *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows, int64_t dims, float *to) {
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(float));
    for (int64_t first = 0; first < dim; first += PANEL, to += rows * PANEL) {
        int64_t width = least(PANEL, dim - first);
        for (int64_t row = 0; row < valid; row++)
            for (int64_t i = 0; i < width; i++) to[row * PANEL + i] = from[row * stride + first + i];
    }
}

// (valid, dim) of row stride `stride` into its transpose (dims, rows), zero elsewhere.
static void pack_transposed(const float *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows, int64_t dims,
                            float *to) {
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(float));
    for (int64_t row = 0; row < valid; row++) {
        float *into = to + row / PANEL * dims * PANEL + row % PANEL;
        for (int64_t d = 0; d < dim; d++) into[d * PANEL] = from[row * stride + d];
    }
}

// (rows, dims) plus `other` (or null) into (valid, dim) of row stride `stride`.
static void unpack(const float *from, const float *other, int64_t rows, int64_t valid, int64_t dim, float *to,
                   int64_t stride) {
    for (int64_t first = 0; first < dim; first += PANEL) {
        int64_t width = least(PANEL, dim - first), base = first * rows;
        for (int64_t row = 0; row < valid; row++)
            for (int64_t i = 0; i < width; i++) {
                float value = from[base + row * PANEL + i];
                to[row * stride + first + i] = other ? value + other[base + row * PANEL + i] : value;
            }
    }
}

// phi of packed tokens (rows, dims), in place, less `mean`; padding columns stay zero.
static void feature(float *tokens, int64_t rows, int64_t dim, int64_t dims, const float *mean, int32_t map) {
    int64_t panels = dims / PANEL;
    for (int64_t row = 0; row < rows; row++) {
        float line[MAX_DIM];
        for (int64_t p = 0; p < panels; p++)
            for (int i = 0; i < PANEL; i++) line[p * PANEL + i] = tokens[(p * rows + row) * PANEL + i];
        if (mean)
            for (int64_t d = 0; d < dim; d++) line[d] -= mean[d];
        if (map == RELU) {
            for (int64_t d = 0; d < dims; d += LANES) store(line + d, larger(load(line + d), splat(0)));
        } else if (map == ELU) {  // elu(x) + 1 = max(x, 0) + exp(min(x, 0))
            for (int64_t d = 0; d < dims; d += LANES) {
                vec x = load(line + d), positive = larger(x, splat(0));
                store(line + d, positive + exponential(x - positive));
            }
        } else {
            for (int64_t d = dim; d < dims; d++) line[d] = -INFINITY;
            vec most = load(line), total = splat(0);
            for (int64_t d = LANES; d < dims; d += LANES) most = larger(most, load(line + d));
            vec maximum = splat(largest_lane(most));
            for (int64_t d = 0; d < dims; d += LANES) {
                vec x = exponential(load(line + d) - maximum);
                store(line + d, x);
                total += x;
            }
            vec factor = splat(1 / add_lanes(total));
            for (int64_t d = 0; d < dims; d += LANES) store(line + d, load(line + d) * factor);
        }
        for (int64_t d = dim; d < dims; d++) line[d] = 0;
        for (int64_t p = 0; p < panels; p++)
            for (int i = 0; i < PANEL; i++) tokens[(p * rows + row) * PANEL + i] = line[p * PANEL + i];
    }
}

// grad (rows, dims) of phi into that of its argument, in place; `shift` (rows) is rowsum(phi * grad), for softmax.
static void feature_backward(float *grad, const float *features, const float *shift, int64_t rows, int64_t dims,
                             int32_t map) {
    for (int64_t p = 0; p < dims / PANEL; p++)
        for (int64_t row = 0; row < rows; row++)
            for (int v = 0; v < 2; v++) {
                int64_t at = (p * rows + row) * PANEL + v * LANES;
                vec x = load(features + at), g = load(grad + at);
                if (map == SOFTMAX)
                    g = x * (g - shift[row]);
                else if (map == ELU)  // elu(x) + 1 is its own derivative exp(x) up to 1, and 1 from there
                    g = g * -larger(-x, splat(-1));
                else
                    g = (vec)((ivec)g & (x > 0.0f));
                store(grad + at, g);
            }
}

// rowsum(a * b) of (rows, dims).
static void row_products(const float *a, const float *b, int64_t rows, int64_t dims, float *sums) {
    for (int64_t row = 0; row < rows; row++) {
        vec total = splat(0);
        for (int64_t p = 0; p < dims / PANEL; p++)
            for (int v = 0; v < 2; v++) {
                int64_t at = (p * rows + row) * PANEL + v * LANES;
                total += load(a + at) * load(b + at);
            }
        sums[row] = add_lanes(total);
    }
}

// Multiplies row r of (rows, dims) by factors[r].
static void scale_rows(float *tokens, const float *factors, int64_t rows, int64_t dims) {
    for (int64_t p = 0; p < dims / PANEL; p++)
        for (int64_t row = 0; row < rows; row++)
            for (int v = 0; v < 2; v++) {
                float *at = tokens + (p * rows + row) * PANEL + v * LANES;
                store(at, load(at) * factors[row]);
            }
}

// Column sums of (rows, dims) times factors[r] (or 1), into or added to dims floats.
static void column_sums(const float *tokens, const float *factors, int64_t rows, int64_t dims, float *sums, int add) {
    for (int64_t p = 0; p < dims / PANEL; p++)
        for (int v = 0; v < 2; v++) {
            vec total = add ? load(sums + p * PANEL + v * LANES) : splat(0);
            for (int64_t row = 0; row < rows; row++)
                total += load(tokens + (p * rows + row) * PANEL + v * LANES) * (factors ? factors[row] : 1);
            store(sums + p * PANEL + v * LANES, total);
        }
}

// The sum of `count` runs of `size` floats, `stride` apart, in two levels: its error stays that of short sums.
static void total_of(const float *from, int64_t stride, int64_t count, int64_t size, float *to) {
    for (int64_t at = 0; at < size; at += PANEL) {
        vec total[2] = {splat(0), splat(0)};
        for (int64_t start = 0; start < count; start += 16) {
            vec part[2] = {splat(0), splat(0)};
            for (int64_t n = start; n < least(start + 16, count); n++)
                for (int v = 0; v < 2; v++) part[v] += load(from + n * stride + at + v * LANES);
            for (int v = 0; v < 2; v++) total[v] += part[v];
        }
        for (int v = 0; v < 2; v++) store(to + at + v * LANES, total[v]);
    }
}

// The sum of the runs whose class is 0: by adding them or, where they are the majority, by subtracting the others from
// the total, of which at least half is left.
static void selected_sum(const float *from, const float *total, int64_t size, const int8_t *classes, int64_t class_step,
                         int64_t count, const float **list, float *to) {
    int64_t selected = 0, listed = 0;
    for (int64_t n = 0; n < count; n++) selected += classes[n * class_step] == 0;
    int most = 2 * selected > count;
    for (int64_t n = 0; n < count; n++)
        if ((classes[n * class_step] == 0) != most) list[listed++] = from + n * size;
    for (int64_t at = 0; at < size; at += PAGE) {
        int64_t width = least(PAGE, size - at);
        float *into = to + at;
        for (int64_t i = 0; i < width; i++) into[i] = most ? total[at + i] : 0;
        float sign = most ? -1 : 1;
        int64_t n = 0;
        for (; n + 4 <= listed; n += 4) {  // four streams at once: it is memory that limits this
            const float *one = list[n] + at, *two = list[n + 1] + at, *three = list[n + 2] + at,
                        *four = list[n + 3] + at;
            for (int64_t i = 0; i < width; i++) into[i] += sign * ((one[i] + two[i]) + (three[i] + four[i]));
        }
        for (; n < listed; n++)
            for (int64_t i = 0; i < width; i++) into[i] += sign * list[n][at + i];
    }
}

static float *take(struct work *work, int64_t floats) {
    float *start = work->call->arena + work->used;
    work->used += (floats + 15) / 16 * 16;
    return start;
}

static struct work prepare(const struct call *call, int backward) {
    struct work work = {.call = call};
    struct work *w = &work;
    w->rows = (call->length + call->block_q - 1) / call->block_q;
    w->columns = (call->length + BLOCK - 1) / BLOCK;
    w->dims = (call->dim + PANEL - 1) / PANEL * PANEL;
    for (int64_t head = 0; head < call->group; head++)
        for (int64_t row = 0; row < w->rows; row++) {
            const int8_t *classes = call->block_map + head * call->map_head + row * call->map_row;
            int64_t count = 0;
            for (int64_t column = 0; column < w->columns; column++) count += classes[column] == 1;
            if (count > w->most) w->most = count;
        }
    w->tokens = BLOCK * w->dims;
    w->square = w->dims * w->dims;
    w->queries = call->block_q * w->dims;
    int64_t all = w->columns * w->tokens, states = call->linear == MARGINAL ? w->columns : 1;
    w->keys_t = take(w, all);
    w->list = (const float **)take(w, 2 * (w->rows + w->columns));
    w->query = take(w, w->queries);
    w->sparse = take(w, w->queries);
    w->scores = take(w, w->most * call->block_q * BLOCK);
    if (backward) {
        w->keys = take(w, all);
        w->values_t = take(w, all);
        w->grad_keys = take(w, all);
        w->grad_values = take(w, all);
        w->grad_scores = take(w, w->most * call->block_q * BLOCK);
        w->grad = take(w, w->queries);
    }
    if (!backward || call->linear != NONE) w->values = take(w, all);
    if (call->linear == NONE) return work;
    w->features = take(w, backward ? all : w->tokens);
    w->projected = call->weight ? take(w, backward ? all : w->tokens) : 0;
    w->weight = take(w, w->square);
    w->weight_t = take(w, w->square);
    w->states = take(w, states * w->square);
    w->state_total = take(w, w->square);
    w->sums = take(w, w->columns * w->dims);
    w->sum_total = take(w, w->dims);
    w->query_features = take(w, w->queries);
    w->state = take(w, w->square);
    w->sum = take(w, w->dims);
    w->linear = take(w, w->queries);
    w->scratch = take(w, w->tokens > w->square ? w->tokens : w->square);
    if (!backward) return work;
    w->grad_states = take(w, (call->linear == MARGINAL ? w->rows : 1) * w->square);
    w->grad_sums = take(w, w->rows * w->dims);
    w->grad_linear = take(w, w->queries);
    w->grad_weight = take(w, w->square);
    return work;
}

int64_t sla_arena(const struct call *call, int backward) { return prepare(call, backward).used; }

// Packs keys and values, and computes the states h = phi(K)^T V' (in the backward transposed) and z = sum phi(K) of
// blocks.
static void pack_keys(struct work *w, int backward) {
    const struct call *call = w->call;
    int linear = call->linear != NONE;
    if (linear && call->weight) {
        pack_transposed(call->weight, call->dim, call->dim, call->dim, w->dims, w->dims, w->weight_t);
        pack(call->weight, call->dim, call->dim, call->dim, w->dims, w->dims, w->weight);
    }
    for (int64_t block = 0; block < w->columns; block++) {
        int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first), at = block * w->tokens;
        const float *key = call->key + first * call->key_token, *value = call->value + first * call->value_token;
        pack_transposed(key, call->key_token, valid, call->dim, BLOCK, w->dims, w->keys_t + at);
        if (w->values) pack(value, call->value_token, valid, call->dim, BLOCK, w->dims, w->values + at);
        if (backward) {
            pack(key, call->key_token, valid, call->dim, BLOCK, w->dims, w->keys + at);
            pack_transposed(value, call->value_token, valid, call->dim, BLOCK, w->dims, w->values_t + at);
        }
        if (!linear) continue;
        int64_t kept = backward ? at : 0;
        float *features = w->features + kept, *projected = w->values + at;
        pack(key, call->key_token, valid, call->dim, BLOCK, w->dims, features);
        feature(features, BLOCK, call->dim, w->dims, call->key_mean, call->feature_map);
        for (int64_t p = 0; p < w->dims / PANEL; p++)  // phi of a zero row is not zero
            memset(features + (p * BLOCK + valid) * PANEL, 0, (BLOCK - valid) * PANEL * sizeof(float));
        if (call->weight) {
            projected = w->projected + kept;
            multiply(BLOCK, w->dims, w->dims, w->values + at, w->weight_t, 1, projected, 0);
        }
        if (call->key_weight) {
            memcpy(w->scratch, features, w->tokens * sizeof(float));
            scale_rows(w->scratch, call->key_weight + first, BLOCK, w->dims);
            features = w->scratch;
        }
        column_sums(features, 0, BLOCK, w->dims, w->sums + block * w->dims, 0);
        float *state = w->states + (call->linear == ALL ? 0 : block * w->square);
        const float *left = backward ? projected : features, *right = backward ? features : projected;
        multiply_transposed(w->dims, w->dims, BLOCK, left, right, 1, state, call->linear == ALL && block);
    }
    if (!linear) return;
    total_of(w->sums, w->dims, w->columns, w->dims, w->sum_total);
    if (call->linear == ALL)
        memcpy(w->state_total, w->states, w->square * sizeof(float));
    else
        total_of(w->states, w->square, w->columns, w->square, w->state_total);
}

// phi(Q) of a query block, its state and sum over the marginal blocks, and the inverse denominators.
static void linear_rows(struct work *w, const int8_t *classes, const float **state, const float **sum, float *inverse) {
    const struct call *call = w->call;
    *state = w->state_total;
    *sum = w->sum_total;
    if (call->linear == MARGINAL) {
        selected_sum(w->states, w->state_total, w->square, classes, 1, w->columns, w->list, w->state);
        selected_sum(w->sums, w->sum_total, w->dims, classes, 1, w->columns, w->list, w->sum);
        *state = w->state;
        *sum = w->sum;
    }
    memcpy(w->query_features, w->query, w->queries * sizeof(float));
    feature(w->query_features, call->block_q, call->dim, w->dims, 0, call->feature_map);
    for (int64_t row = 0; row < call->block_q; row++) {
        vec total = splat(0);
        for (int64_t p = 0; p < w->dims / PANEL; p++)
            for (int v = 0; v < 2; v++)
                total += load(w->query_features + (p * call->block_q + row) * PANEL + v * LANES) *
                         load(*sum + p * PANEL + v * LANES);
        float denominator = add_lanes(total) + call->epsilon;
        inverse[row] = denominator > call->min_denominator ? 1 / denominator : 0;
    }
}

// S = s Q K^T + bias of a query block over its critical blocks; returns how many these are.
static int64_t score_rows(struct work *w, const int8_t *classes) {
    const struct call *call = w->call;
    int64_t count = 0, size = call->block_q * BLOCK;
    for (int64_t block = 0; block < w->columns; block++) {
        if (classes[block] != 1) continue;
        float *scores = w->scores + count++ * size;
        multiply(call->block_q, BLOCK, w->dims, w->query, w->keys_t + block * w->tokens, call->scale, scores, 0);
        if (!call->key_bias) continue;
        for (int64_t p = 0; p < BLOCK / PANEL; p++)
            for (int64_t row = 0; row < call->block_q; row++)
                for (int i = 0; i < PANEL; i++)
                    scores[(p * call->block_q + row) * PANEL + i] += call->key_bias[block * BLOCK + p * PANEL + i];
    }
    return count;
}

void sla_forward(const struct call *call) {
    struct work work = prepare(call, 0), *w = &work;
    int64_t block_q = call->block_q, size = block_q * BLOCK;
    pack_keys(w, 0);
    for (int64_t head = 0; head < call->group; head++)
        for (int64_t block = 0; block < w->rows; block++) {
            int64_t first = block * block_q, valid = least(block_q, call->length - first);
            const int8_t *classes = call->block_map + head * call->map_head + block * call->map_row;
            const float *query = call->query + head * call->query_head + first * call->query_token;
            float share = call->alpha ? call->alpha[head * call->alpha_head + block * call->alpha_row] : 1;
            float factors[MAX_QUERIES];
            pack(query, call->query_token, valid, call->dim, block_q, w->dims, w->query);
            if (call->linear != NONE) {
                const float *state, *sum;
                linear_rows(w, classes, &state, &sum, factors);
                if (call->alpha)
                    for (int64_t row = 0; row < block_q; row++) factors[row] *= 1 - share;
                scale_rows(w->query_features, factors, block_q, w->dims);
                if (call->offset)
                    for (int64_t p = 0; p < w->dims / PANEL; p++)
                        for (int64_t row = 0; row < block_q; row++)
                            for (int i = 0; i < PANEL; i++)
                                w->linear[(p * block_q + row) * PANEL + i] =
                                    p * PANEL + i < call->dim ? call->offset[p * PANEL + i] : 0;
                multiply(block_q, w->dims, w->dims, w->query_features, state, 1, w->linear, call->offset != 0);
            }

            int64_t count = score_rows(w, classes), panels = count * (BLOCK / PANEL);
            vec largest[MAX_QUERIES], totals[MAX_QUERIES];
            float shifts[MAX_QUERIES];
            for (int64_t row = 0; row < block_q; row++) {
                largest[row] = splat(-INFINITY);
                totals[row] = splat(0);
            }
            for (int64_t p = 0; p < panels; p++)
                for (int64_t row = 0; row < block_q; row++) {
                    const float *at = w->scores + (p * block_q + row) * PANEL;
                    largest[row] = larger(largest[row], larger(load(at), load(at + LANES)));
                }
            for (int64_t row = 0; row < block_q; row++) {
                float maximum = largest_lane(largest[row]);
                shifts[row] = maximum == -INFINITY ? 0 : maximum;  // no key takes part: weights exp(-inf) = 0
            }
            for (int64_t p = 0; p < panels; p++)
                for (int64_t row = 0; row < block_q; row++)
                    for (int v = 0; v < 2; v++) {
                        float *at = w->scores + (p * block_q + row) * PANEL + v * LANES;
                        vec weights = exponential(load(at) - shifts[row]);
                        store(at, weights);
                        totals[row] += weights;
                    }
            for (int64_t row = 0; row < block_q; row++) {
                float total = add_lanes(totals[row]);
                factors[row] = total == 0 ? 0 : share / total;
                if (row < valid)
                    call->logsumexp[head * call->length + first + row] =
                        total == 0 ? -INFINITY : shifts[row] + logf(total);
            }
            if (!count) memset(w->sparse, 0, w->queries * sizeof(float));
            for (int64_t block_k = 0, done = 0; block_k < w->columns; block_k++)
                if (classes[block_k] == 1) {
                    multiply(block_q, w->dims, BLOCK, w->scores + done * size, w->values + block_k * w->tokens, 1,
                             w->sparse, done > 0);
                    done++;
                }
            scale_rows(w->sparse, factors, block_q, w->dims);
            unpack(w->sparse, w->linear, block_q, valid, call->dim,
                   call->output + head * call->output_head + first * call->output_token, call->output_token);
        }
}

// dQ of the linear branch into w->linear, and dH and dZ of a query block; returns sum(dO_l * O_l).
static float linear_rows_backward(struct work *w, int64_t block, const int8_t *classes, float share) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q;
    const float *state, *sum;
    float inverse[MAX_QUERIES], delta[MAX_QUERIES], shift[MAX_QUERIES], all = 0;
    linear_rows(w, classes, &state, &sum, inverse);
    for (int64_t i = 0; i < w->queries; i++) w->grad_linear[i] = share * w->grad[i];
    multiply(block_q, w->dims, w->dims, w->grad_linear, state, 1, w->linear, 0);
    row_products(w->query_features, w->linear, block_q, w->dims, delta);
    for (int64_t row = 0; row < block_q; row++) {
        delta[row] *= inverse[row];
        all += delta[row];
        shift[row] = delta[row] * inverse[row] * call->epsilon;  // rowsum(phi * dphi)
    }
    for (int64_t p = 0; p < w->dims / PANEL; p++)
        for (int64_t row = 0; row < block_q; row++)
            for (int v = 0; v < 2; v++) {
                float *at = w->linear + (p * block_q + row) * PANEL + v * LANES;
                store(at, (load(at) - load(sum + p * PANEL + v * LANES) * delta[row]) * inverse[row]);
            }
    feature_backward(w->linear, w->query_features, shift, block_q, w->dims, call->feature_map);
    scale_rows(w->query_features, inverse, block_q, w->dims);
    column_sums(w->query_features, delta, block_q, w->dims, w->grad_sums + block * w->dims, 0);
    float *grad_state = w->grad_states + (call->linear == ALL ? 0 : block * w->square);
    multiply_transposed(w->dims, w->dims, block_q, w->query_features, w->grad_linear, 1, grad_state,
                        call->linear == ALL && block);
    return all;
}

// Adds the sparse branch's dK and dV of a query block, and puts dQ / s into w->sparse; returns sum(dO_s * O_s).
static float sparse_rows_backward(struct work *w, const int8_t *classes, const float *logsumexp, int64_t valid,
                                  float share) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q, size = block_q * BLOCK, count = score_rows(w, classes), done = 0;
    float shifts[MAX_QUERIES], deltas[MAX_QUERIES], all = 0;
    vec totals[MAX_QUERIES];
    for (int64_t row = 0; row < block_q;
         row++)  // exp(s - inf) = 0: no weights past the end, or where no key takes part
        shifts[row] = row < valid && logsumexp[row] != -INFINITY ? logsumexp[row] : INFINITY;
    if (call->alpha)
        for (int64_t i = 0; i < w->queries; i++) w->grad[i] *= share;
    for (int64_t block = 0; block < w->columns; block++)
        if (classes[block] == 1)
            multiply(block_q, BLOCK, w->dims, w->grad, w->values_t + block * w->tokens, 1,
                     w->grad_scores + done++ * size, 0);
    for (int64_t row = 0; row < block_q; row++) totals[row] = splat(0);
    for (int64_t p = 0; p < count * (BLOCK / PANEL); p++)
        for (int64_t row = 0; row < block_q; row++)
            for (int v = 0; v < 2; v++) {
                int64_t at = (p * block_q + row) * PANEL + v * LANES;
                vec weights = exponential(load(w->scores + at) - shifts[row]);
                store(w->scores + at, weights);
                totals[row] += weights * load(w->grad_scores + at);
            }
    for (int64_t row = 0; row < block_q; row++) {
        deltas[row] = add_lanes(totals[row]);  // from the weights: from the output it would carry its rounding
        all += deltas[row];
    }
    for (int64_t p = 0; p < count * (BLOCK / PANEL); p++)
        for (int64_t row = 0; row < block_q; row++)
            for (int v = 0; v < 2; v++) {
                int64_t at = (p * block_q + row) * PANEL + v * LANES;
                store(w->grad_scores + at, load(w->scores + at) * (load(w->grad_scores + at) - deltas[row]));
            }
    done = 0;
    for (int64_t block = 0; block < w->columns; block++) {
        if (classes[block] != 1) continue;
        int64_t at = block * w->tokens;
        const float *weights = w->scores + done * size, *grad_scores = w->grad_scores + done * size;
        multiply(block_q, w->dims, BLOCK, grad_scores, w->keys + at, call->scale, w->sparse, done > 0);
        multiply_transposed(BLOCK, w->dims, block_q, grad_scores, w->query, call->scale, w->grad_keys + at, 1);
        multiply_transposed(BLOCK, w->dims, block_q, weights, w->grad, 1, w->grad_values + at, 1);
        done++;
    }
    if (!count) memset(w->sparse, 0, w->queries * sizeof(float));
    return all;
}

// Adds what the rows of one query head give to the keys and values of the linear branch.
static void linear_keys_backward(struct work *w, const int8_t *map) {
    const struct call *call = w->call;
    float total[MAX_DIM], shift[BLOCK];
    const float *grad_state = w->grad_states;
    total_of(w->grad_sums, w->dims, w->rows, w->dims, total);
    if (call->linear == MARGINAL) total_of(w->grad_states, w->square, w->rows, w->square, w->state_total);
    for (int64_t block = 0; block < w->columns; block++) {
        int64_t at = block * w->tokens;
        const float *grad_sum = total, *features = w->features + at;
        if (call->linear == MARGINAL) {
            selected_sum(w->grad_states, w->state_total, w->square, map + block, call->map_row, w->rows, w->list,
                         w->state);
            selected_sum(w->grad_sums, total, w->dims, map + block, call->map_row, w->rows, w->list, w->sum);
            grad_state = w->state;
            grad_sum = w->sum;
        }
        const float *weighted = features;
        float *tokens = w->linear;  // dV', then dphi(K): a block of keys is not larger than one of queries
        if (call->key_weight) {
            memcpy(w->scratch, features, w->tokens * sizeof(float));
            scale_rows(w->scratch, call->key_weight + block * BLOCK, BLOCK, w->dims);
            weighted = w->scratch;
        }
        if (call->weight) {
            multiply(BLOCK, w->dims, w->dims, weighted, grad_state, 1, tokens, 0);
            multiply(BLOCK, w->dims, w->dims, tokens, w->weight, 1, w->grad_values + at, 1);
            multiply_transposed(w->dims, w->dims, BLOCK, tokens, w->values + at, 1, w->grad_weight, 1);
        } else {
            multiply(BLOCK, w->dims, w->dims, weighted, grad_state, 1, w->grad_values + at, 1);
        }
        for (int64_t p = 0; p < w->dims / PANEL; p++)  // dH^T
            for (int64_t q = 0; q < w->dims / PANEL; q++)
                for (int i = 0; i < PANEL; i++)
                    for (int k = 0; k < PANEL; k++)
                        w->scratch[(q * w->dims + p * PANEL + i) * PANEL + k] =
                            grad_state[(p * w->dims + q * PANEL + k) * PANEL + i];
        const float *projected = call->weight ? w->projected + at : w->values + at;
        multiply(BLOCK, w->dims, w->dims, projected, w->scratch, 1, tokens, 0);
        for (int64_t p = 0; p < w->dims / PANEL; p++)
            for (int64_t row = 0; row < BLOCK; row++)
                for (int i = 0; i < PANEL; i++) tokens[(p * BLOCK + row) * PANEL + i] -= grad_sum[p * PANEL + i];
        if (call->key_weight) scale_rows(tokens, call->key_weight + block * BLOCK, BLOCK, w->dims);
        row_products(tokens, features, BLOCK, w->dims, shift);
        feature_backward(tokens, features, shift, BLOCK, w->dims, call->feature_map);
        for (int64_t i = 0; i < w->tokens; i++) w->grad_keys[at + i] += tokens[i];
    }
}

void sla_backward(const struct call *call) {
    struct work work = prepare(call, 1), *w = &work;
    int64_t block_q = call->block_q;
    pack_keys(w, 1);
    memset(w->grad_keys, 0, w->columns * w->tokens * sizeof(float));
    memset(w->grad_values, 0, w->columns * w->tokens * sizeof(float));
    if (w->grad_weight) memset(w->grad_weight, 0, w->square * sizeof(float));
    for (int64_t head = 0; head < call->group; head++) {
        const int8_t *map = call->block_map + head * call->map_head;
        // The key side of the last head took its total's place.
        if (head && call->linear == MARGINAL) total_of(w->states, w->square, w->columns, w->square, w->state_total);
        for (int64_t block = 0; block < w->rows; block++) {
            int64_t first = block * block_q, valid = least(block_q, call->length - first);
            const int8_t *classes = map + block * call->map_row;
            const float *query = call->query + head * call->query_head + first * call->query_token;
            const float *grad = call->grad_output + head * call->grad_output_head + first * call->grad_output_token;
            float share = call->alpha ? call->alpha[head * call->alpha_head + block * call->alpha_row] : 1;
            float rest = call->alpha ? 1 - share : 1, of_linear = 0;
            pack(query, call->query_token, valid, call->dim, block_q, w->dims, w->query);
            pack(grad, call->grad_output_token, valid, call->dim, block_q, w->dims, w->grad);
            if (call->grad_offset)
                for (int64_t p = 0; p < w->dims / PANEL; p++)
                    for (int i = 0; i < PANEL && p * PANEL + i < call->dim; i++) {
                        float sum = 0;
                        for (int64_t row = 0; row < valid; row++) sum += w->grad[(p * block_q + row) * PANEL + i];
                        call->grad_offset[p * PANEL + i] += sum;
                    }
            if (call->linear != NONE) {
                of_linear = linear_rows_backward(w, block, classes, rest);
            }
            float of_sparse =
                sparse_rows_backward(w, classes, call->logsumexp + head * call->length + first, valid, share);
            if (call->grad_alpha)  // sums of dO * O of each branch; a saturated sigmoid has no gradient
                call->grad_alpha[head * w->rows + block] =
                    (share > 0 ? of_sparse / share : 0) - (rest > 0 ? of_linear / rest : 0);
            unpack(w->sparse, call->linear != NONE ? w->linear : 0, block_q, valid, call->dim,
                   call->grad_query + head * call->grad_query_head + first * call->grad_query_token,
                   call->grad_query_token);
        }
        if (call->linear != NONE) linear_keys_backward(w, map);
    }
    for (int64_t block = 0; block < w->columns; block++) {
        int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first), at = block * w->tokens;
        unpack(w->grad_keys + at, 0, BLOCK, valid, call->dim, call->grad_key + first * call->grad_key_token,
               call->grad_key_token);
        unpack(w->grad_values + at, 0, BLOCK, valid, call->dim, call->grad_value + first * call->grad_value_token,
               call->grad_value_token);
    }
    if (call->grad_weight)
        for (int64_t row = 0; row < call->dim; row++)
            for (int64_t d = 0; d < call->dim; d++)
                call->grad_weight[row * call->dim + d] +=
                    w->grad_weight[(d / PANEL * w->dims + row) * PANEL + d % PANEL];
}
