// Sparse-linear attention of one key-value head, forward and backward, in float32 or, with BFLOAT16, in bfloat16.
//
// native.py compiles this at first use with the system's C compiler, and calls the phases at the end. The formulas are
// those of kernels/reference.py and of algorithms 1 and 2 of SLA (arXiv 2509.24006); alpha and key_mean are SLA2's
// (arXiv 2602.12675). The projection W is folded into the values: V' = V W^T, see NOTE [Projected values] in
// cpu_linear.py. Sums, statistics and everything elementwise are float32; the operands of products, and the states of
// the linear branch, are words (NOTE [Operands] in cpu_matrix.h).

#include "cpu_matrix.h"

#define BLOCK 64          // tokens of a key block
#define MAX_QUERIES 128   // tokens of a query block, at most
#define CACHED (1 << 16)  // words that stay in the second-level cache while all their sums are taken
#define PAGE 1024         // values of a state that are summed at a time, at most
#define STREAMS 8         // runs that are read at once
#define PART 8            // key blocks whose gradients of W are summed by one task

enum { SOFTMAX, ELU, RELU };
enum { NONE, MARGINAL, ALL };

// Strides are in elements; the innermost is 1. Query heads that share the key-value head are `group`.
struct call {
    const element *query, *key, *value;
    element *output;
    float *logsumexp;                    // (group, length)
    const int8_t *block_map;             // (group, T_m, T_n)
    const element *weight;               // (dim, dim), contiguous, or null
    const float *offset;                 // (dim) or null
    const float *key_bias, *key_weight;  // (T_n * BLOCK): added to scores, -inf past the end; factor of phi(K); or null
    const float *alpha;                  // (group, T_m) or null
    const float *key_mean;               // (dim) or null
    float *arena;                        // what all threads share, of the size that sla_sizes says
    const element *grad_output;          // null in the forward
    element *grad_query, *grad_key, *grad_value;
    float *grad_weight, *grad_offset;
    float *grad_alpha;  // (group, T_m)
    int64_t query_head, query_token, key_token, value_token, output_head, output_token, map_head, map_row, alpha_head,
        alpha_row;
    int64_t grad_output_head, grad_output_token, grad_query_head, grad_query_token, grad_key_token, grad_value_token;
    int64_t length, dim, group, block_q;
    int64_t most, panels;                    // critical blocks of a row, at most, and panels of a state: by sla_sizes
    int64_t strip, strip_first, strip_last;  // rows that the backward keeps between its phases: how many, and which
    int64_t head;                            // query head in its group whose linear branch is summed
    int32_t feature_map, linear;
    float scale, epsilon, min_denominator;
};

// Sizes of a call, the buffers that all threads share, and those of one thread.
struct work {
    const struct call *call;
    int64_t rows, columns, dims;              // T_m, T_n, padded dim
    int64_t tokens, square, queries, scored;  // values of a key block, a state, a query block, a row's scores at most
    word *keys_t, *keys, *values_t, *values, *projected, *weight, *weight_t, *states, *list_states;
    float *features, *sums, *list_sums;
    word *grad_states, *kept;
    float *grad_sums, *grad_keys, *grad_values, *weight_sums, *offset_sums;
    word *operand, *other, *query, *grad;
    float *scores, *grad_scores, *query_features, *linear, *sparse, *scratch;
    struct list *lists;
    int32_t *entries;
};

// What is summed: the entries or, with `others`, all but them.
struct list {
    int32_t *entries;
    int32_t count, others;
};

// What the backward keeps of a row until its strip's keys are done: the operands of dK and dV, in right form.
struct row {
    word *weights, *grad_scores, *query, *grad;
};

// phi of packed tokens (rows, dims), in place, less `mean`; padding columns stay zero.
static void feature(float *tokens, int64_t rows, int64_t dim, int64_t dims, const float *mean, int32_t map) {
    int64_t panels = dims / PANEL;
    for (int64_t row = 0; row < rows; row++) {
        float line[MAX_DIM];
        for (int64_t p = 0; p < panels; p++)
            for (int i = 0; i < PANEL; i++) line[p * PANEL + i] = tokens[(p * rows + row) * PANEL + i];
        if (mean)
            for (int64_t d = 0; d < dim; d++) line[d] -= mean[d];
        if (map == RELU) {  // NaN stays: it is larger's second argument
            for (int64_t d = 0; d < dims; d += LANES) store(line + d, larger(splat(0), load(line + d)));
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

// Column sums of (rows, dims) times factors[r] (or 1), into dims floats.
static void column_sums(const float *tokens, const float *factors, int64_t rows, int64_t dims, float *sums) {
    for (int64_t p = 0; p < dims / PANEL; p++)
        for (int v = 0; v < 2; v++) {
            vec total = splat(0);
            for (int64_t row = 0; row < rows; row++)
                total += load(tokens + (p * rows + row) * PANEL + v * LANES) * (factors ? factors[row] : 1);
            store(sums + p * PANEL + v * LANES, total);
        }
}

// PANEL values of a run: with `words` in right form, else floats.
static inline void load_values(const void *from, int words, vec value[2]) {
    if (words) {
        load_rows(from, value, value + 1);
    } else {
        value[0] = load(from);
        value[1] = load((const float *)from + LANES);
    }
}

static inline void store_values(void *to, int words, const vec value[2]) {
    if (words) {
        store_rows(to, value[0], value[1]);
    } else {
        store(to, value[0]);
        store((float *)to + LANES, value[1]);
    }
}

// The sum of `count` runs of `width` values, `stride` words apart: those listed, or the first. With `words` they are
// words in right form, else floats.
static inline __attribute__((always_inline)) void sum_runs(const void *from, int64_t stride, const int32_t *listed,
                                                           int64_t count, int64_t width, float *sums, int words) {
    if (!count) memset(sums, 0, width * sizeof(float));
    for (int64_t first = 0; first < count; first += STREAMS) {
        const word *runs[STREAMS];
        int64_t number = least(STREAMS, count - first);
        for (int64_t n = 0; n < number; n++)
            runs[n] = (const word *)from + (listed ? listed[first + n] : first + n) * stride;
        for (int64_t i = 0; i < width; i += PANEL) {
            vec sum[2] = {splat(0), splat(0)}, value[2];
            if (first)
                for (int v = 0; v < 2; v++) sum[v] = load(sums + i + v * LANES);
            for (int64_t n = 0; n < number; n++) {
                load_values(runs[n] + (words ? i / PAIR : i), words, value);
                for (int v = 0; v < 2; v++) sum[v] += value[v];
            }
            for (int v = 0; v < 2; v++) store(sums + i + v * LANES, sum[v]);
        }
    }
}

// The sum of `count` runs of at most PAGE values, in two levels: its error stays that of short sums.
static inline __attribute__((always_inline)) void total_of(const void *from, int64_t stride, int64_t count,
                                                           int64_t width, float *to, int words) {
    const int64_t most = 2 * STREAMS;
    float sums[PAGE];
    memset(to, 0, width * sizeof(float));
    for (int64_t first = 0; first < count; first += most) {
        sum_runs((const word *)from + first * stride, stride, 0, least(most, count - first), width, sums, words);
        for (int64_t i = 0; i < width; i += LANES) store(to + i, load(to + i) + load(sums + i));
    }
}

// The sum of a list's runs of at most PAGE values: by adding them, or by leaving the others out of the total.
static inline __attribute__((always_inline)) void listed_sum(const void *from, int64_t stride, const struct list *list,
                                                             int64_t width, const float *total, void *to, int words) {
    float sums[PAGE];
    sum_runs(from, stride, list->entries, list->count, width, sums, words);
    for (int64_t i = 0; i < width; i += PANEL) {
        vec sum[2] = {load(sums + i), load(sums + i + LANES)};
        if (list->others)
            for (int v = 0; v < 2; v++) sum[v] = load(total + i + v * LANES) - sum[v];
        store_values((word *)to + (words ? i / PAIR : i), words, sum);
    }
}

static void *take(float **arena, int64_t count) {
    float *start = *arena;
    *arena = (float *)((uintptr_t)start + (count + 15) / 16 * 16 * sizeof(float));
    return start;
}

// Room for `count` values as words.
static word *take_words(float **arena, int64_t count) { return take(arena, (count + PAIR - 1) / PAIR); }

// The n-th of matrices of `size` values each.
static inline word *nth(word *matrices, int64_t n, int64_t size) { return matrices + n * size / PAIR; }

// The sparse branch's share of a row's output.
static float share_of(const struct work *w, int64_t row) {
    const struct call *call = w->call;
    if (!call->alpha) return 1;
    return call->alpha[row / w->rows * call->alpha_head + row % w->rows * call->alpha_row];
}

// Lays out the shared arena and a thread's own; both end behind their last buffer.
static struct work lay_out(const struct call *call, float **shared, float **own) {
    struct work work = {.call = call};
    struct work *w = &work;
    int backward = call->grad_output != 0, linear = call->linear != NONE;
    w->rows = (call->length + call->block_q - 1) / call->block_q;
    w->columns = (call->length + BLOCK - 1) / BLOCK;
    w->dims = (call->dim + PANEL - 1) / PANEL * PANEL;
    w->tokens = BLOCK * w->dims;
    w->square = w->dims * w->dims;
    w->queries = call->block_q * w->dims;
    w->scored = call->most * call->block_q * BLOCK;
    int64_t all = w->columns * w->tokens, largest = w->tokens > w->square ? w->tokens : w->square;
    w->keys_t = take_words(shared, all);
    w->query = take_words(own, w->queries);
    w->sparse = take(own, w->queries);
    w->scores = take(own, w->scored);
    w->operand = take_words(own, w->queries > w->scored ? w->queries : w->scored);
    w->scratch = take(own, largest > w->queries ? largest : w->queries);
    if (!backward || linear) w->values = take_words(shared, all);
    if (backward) {
        w->keys = take_words(shared, all);
        w->values_t = take_words(shared, all);
        w->grad_keys = take(shared, all);
        w->grad_values = take(shared, all);
        w->kept = take_words(shared, call->strip * 2 * (w->scored + w->queries));
        w->grad_scores = take(own, w->scored);
        w->grad = take_words(own, w->queries);
    }
    if (!linear) return work;
    w->features = take(backward ? shared : own, backward ? all : w->tokens);
    w->projected = take_words(backward ? shared : own, backward ? all : w->tokens);
    w->weight = take_words(shared, w->square);
    w->weight_t = take_words(shared, w->square);
    w->states = take_words(shared, w->columns * w->square);
    w->sums = take(shared, w->columns * w->dims);
    int64_t all_lists = w->rows > w->columns ? w->rows : w->columns;
    int64_t lists = call->linear == ALL ? 1 : backward ? all_lists : w->rows;
    w->list_states = take_words(shared, lists * w->square);
    w->list_sums = take(shared, lists * w->dims);
    w->query_features = take(own, w->queries);
    w->linear = take(own, w->queries);
    w->other = take_words(own, largest);
    w->lists = take(shared, all_lists * sizeof(struct list) / sizeof(float));
    w->entries = take(shared, w->rows * w->columns);
    if (!backward) return work;
    w->grad_states = take_words(shared, w->rows * w->square);
    w->grad_sums = take(shared, w->rows * w->dims);
    w->weight_sums = take(shared, (w->columns + PART - 1) / PART * w->square);
    w->offset_sums = take(shared, call->group * w->rows * w->dims);
    return work;
}

static struct work prepare(const struct call *call, float *own) {
    float *shared = call->arena;
    return lay_out(call, &shared, &own);
}

// Floats of the arena that all threads share, and of one thread's own.
void NAMED(sla_sizes)(struct call *call, int64_t *shared, int64_t *own) {
    int64_t rows = (call->length + call->block_q - 1) / call->block_q, columns = (call->length + BLOCK - 1) / BLOCK;
    call->most = 0;
    for (int64_t i = 0; i < call->group * rows; i++) {
        const int8_t *classes = call->block_map + i / rows * call->map_head + i % rows * call->map_row;
        int64_t count = 0;
        for (int64_t column = 0; column < columns; column++) count += classes[column] == 1;
        if (count > call->most) call->most = count;
    }
    float *end[2] = {0, 0};
    struct work work = lay_out(call, &end[0], &end[1]);
    call->panels = work.square / PANEL;
    *shared = (uintptr_t)end[0] / sizeof(float);
    *own = (uintptr_t)end[1] / sizeof(float);
}

// V' = V W^T of a key block, or V without W, in right form; the backward keeps its left form.
static const word *project(struct work *w, int64_t block) {
    const struct call *call = w->call;
    int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first);
    const element *value = call->value + first * call->value_token;
    word *values = nth(w->values, block, w->tokens);
    word *projected = nth(w->projected, call->grad_output ? block : 0, w->tokens);
    const word *left = values;
    if (PAIR == 2 || !call->weight) {
        word *to = call->weight ? w->operand : projected;
        left = pack_left(value, call->value_token, valid, call->dim, BLOCK, w->dims, to);
    }
    if (!call->weight) return values;
    float *product = floats_of(projected, w->scratch);
    multiply(BLOCK, w->dims, w->dims, left, w->weight_t, 1, product, 0);
    if (call->grad_output) left_form(product, BLOCK, w->dims, projected);
    return right_form(product, BLOCK, w->dims, w->other);
}

// phi(K) of a key block times the factors of its tokens: in w->scratch, or as it is where there are none.
static const float *weighted_features(struct work *w, const float *features, int64_t block) {
    const float *weights = w->call->key_weight;
    if (!weights) return features;
    memcpy(w->scratch, features, w->tokens * sizeof(float));
    scale_rows(w->scratch, weights + block * BLOCK, BLOCK, w->dims);
    return w->scratch;
}

// The state h = phi(K)^T V' (in the backward transposed) and z = sum phi(K) of a key block.
static void make_state(struct work *w, int64_t block) {
    const struct call *call = w->call;
    int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first);
    const word *projected = project(w, block);
    float *features = w->features + (call->grad_output ? block * w->tokens : 0);
    pack_floats(call->key + first * call->key_token, call->key_token, valid, call->dim, BLOCK, w->dims, features);
    feature(features, BLOCK, call->dim, w->dims, call->key_mean, call->feature_map);
    for (int64_t p = 0; p < w->dims / PANEL; p++)  // phi of a zero row is not zero
        memset(features + (p * BLOCK + valid) * PANEL, 0, (BLOCK - valid) * PANEL * sizeof(float));
    const float *weighted = weighted_features(w, features, block);
    column_sums(weighted, 0, BLOCK, w->dims, w->sums + block * w->dims);
    const word *operand = right_form(weighted, BLOCK, w->dims, w->operand);
    word *state = nth(w->states, block, w->square);
    float *product = floats_of(state, w->scratch);
    const word *left = call->grad_output ? projected : operand, *right = call->grad_output ? operand : projected;
    multiply_transposed(w->dims, w->dims, BLOCK, left, right, 1, product, 0);
    right_form(product, w->dims, w->dims, state);
}

// Packs W, once.
void NAMED(sla_pack_weight)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->linear == NONE || !call->weight) return;
    pack_transposed(call->weight, call->dim, call->dim, call->dim, w->dims, w->dims, w->weight_t);
    pack_right(call->weight, call->dim, call->dim, call->dim, w->dims, w->dims, w->weight);
}

// Packs key blocks and their values, and makes their states.
void NAMED(sla_pack_keys)(const struct call *call, float *own, int64_t first_block, int64_t last_block) {
    struct work work = prepare(call, own), *w = &work;
    for (int64_t block = first_block; block < last_block; block++) {
        int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first);
        const element *key = call->key + first * call->key_token, *value = call->value + first * call->value_token;
        fetch(value, call->value_token, valid, call->dim);  // and the next block's keys
        fetch(key + BLOCK * call->key_token, call->key_token, least(BLOCK, call->length - first - BLOCK), call->dim);
        pack_transposed(key, call->key_token, valid, call->dim, BLOCK, w->dims, nth(w->keys_t, block, w->tokens));
        if (w->values)
            pack_right(value, call->value_token, valid, call->dim, BLOCK, w->dims, nth(w->values, block, w->tokens));
        if (call->grad_output) {
            pack_right(key, call->key_token, valid, call->dim, BLOCK, w->dims, nth(w->keys, block, w->tokens));
            pack_transposed(value, call->value_token, valid, call->dim, BLOCK, w->dims,
                            nth(w->values_t, block, w->tokens));
            memset(w->grad_keys + block * w->tokens, 0, w->tokens * sizeof(float));
            memset(w->grad_values + block * w->tokens, 0, w->tokens * sizeof(float));
        }
        if (call->linear != NONE) make_state(w, block);
    }
}

// Lists the marginal ones of `count` blocks or, for `others`, those that are not.
static struct list *make_list(const struct work *w, int64_t n, int64_t count, const int8_t *classes, int64_t class_step,
                              int others) {
    struct list *list = w->lists + n;
    *list = (struct list){.entries = w->entries + n * count, .others = others};
    for (int64_t i = 0; i < count; i++)
        if ((classes[i * class_step] == 0) != others) list->entries[list->count++] = i;
    return list;
}

// Whether at least a quarter is left of every z: then the same share of the states is, of which phi is a factor.
static int leaves_enough(const float *left, const float *total, int64_t dims) {
    for (int64_t d = 0; d < dims; d++)
        if (!(4 * left[d] >= total[d])) return 0;
    return 1;
}

// z of the rows `first` to `last` of query head call->head, and which states they sum: the marginal blocks' or, where
// these are the more and enough is left, the total less the others'.
void NAMED(sla_list_rows)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    float total[MAX_DIM];
    if (call->linear != MARGINAL) return;
    total_of(w->sums, w->dims, w->columns, w->dims, total, 0);
    for (int64_t row = first; row < last; row++) {
        const int8_t *classes = call->block_map + call->head * call->map_head + row * call->map_row;
        float *sum = w->list_sums + row * w->dims;
        struct list *list = make_list(w, row, w->columns, classes, 1, 0);
        sum_runs(w->sums, w->dims, list->entries, list->count, w->dims, sum, 0);
        if (2 * list->count > w->columns && leaves_enough(sum, total, w->dims))
            make_list(w, row, w->columns, classes, 1, 1);
    }
}

// The same of the columns, for the gradients of states and of z: they have signs, and what cancels is small beside the
// largest of them.
void NAMED(sla_list_columns)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->linear != MARGINAL) return;
    for (int64_t column = first; column < last; column++) {
        const int8_t *classes = call->block_map + call->head * call->map_head + column;
        float *sum = w->list_sums + column * w->dims;
        struct list *list = make_list(w, column, w->rows, classes, call->map_row, 0);
        sum_runs(w->grad_sums, w->dims, list->entries, list->count, w->dims, sum, 0);
        if (2 * list->count > w->rows) make_list(w, column, w->rows, classes, call->map_row, 1);
    }
}

// Panels `first` to `last` of the sums of `count` states over each of `lists` lists or, for "all", of one sum, with z.
// All states' part that stays in the cache serves all lists.
static void sum_states(const struct work *w, const word *states, const float *sums, int64_t count, int64_t lists,
                       int64_t first, int64_t last) {
    int64_t part = least(PAGE, CACHED * PAIR / count / PANEL * PANEL), stride = w->square / PAIR;
    float total[PAGE];
    if (part < PANEL) part = PANEL;
    for (int64_t at = first * PANEL; at < last * PANEL; at += part) {
        int64_t width = least(part, last * PANEL - at);
        total_of(states + at / PAIR, stride, count, width, total, 1);
        if (w->call->linear == ALL)
            for (int64_t i = 0; i < width; i += PANEL)
                store_rows(w->list_states + (at + i) / PAIR, load(total + i), load(total + i + LANES));
        else
            for (int64_t n = 0; n < lists; n++)
                listed_sum(states + at / PAIR, stride, w->lists + n, width, total,
                           nth(w->list_states, n, w->square) + at / PAIR, 1);
    }
    if (!first && w->call->linear == ALL) total_of(sums, w->dims, count, w->dims, w->list_sums, 0);
}

// States that the rows of query head call->head sum.
void NAMED(sla_sum_states)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->linear == NONE) return;
    sum_states(w, w->states, w->sums, w->columns, w->rows, first, last);
}

// The sums of a row, or of a column in the backward, of those that sum_states left.
static const word *state_of(const struct work *w, int64_t list, const float **sum) {
    if (w->call->linear == ALL) list = 0;
    *sum = w->list_sums + list * w->dims;
    return nth(w->list_states, list, w->square);
}

// phi(Q) of a query block, and the inverse denominators, given its z.
static void linear_rows(struct work *w, const element *query, int64_t valid, const float *sum, float *inverse) {
    const struct call *call = w->call;
    pack_floats(query, call->query_token, valid, call->dim, call->block_q, w->dims, w->query_features);
    feature(w->query_features, call->block_q, call->dim, w->dims, 0, call->feature_map);
    for (int64_t row = 0; row < call->block_q; row++) {
        vec total = splat(0);
        for (int64_t p = 0; p < w->dims / PANEL; p++)
            for (int v = 0; v < 2; v++)
                total += load(w->query_features + (p * call->block_q + row) * PANEL + v * LANES) *
                         load(sum + p * PANEL + v * LANES);
        float denominator = add_lanes(total) + call->epsilon;
        inverse[row] = denominator > call->min_denominator ? 1 / denominator : 0;
    }
}

// The first critical block of a row from `block` on, or the number of all.
static int64_t critical_from(const struct work *w, const int8_t *classes, int64_t block) {
    while (block < w->columns && classes[block] != 1) block++;
    return block;
}

// S = s Q K^T + bias of a query block over its critical blocks; returns how many these are.
static int64_t score_rows(const struct work *w, const int8_t *classes, const word *query, float *all_scores) {
    const struct call *call = w->call;
    int64_t count = 0, size = call->block_q * BLOCK;
    for (int64_t block = critical_from(w, classes, 0), next; block < w->columns; block = next) {
        float *scores = all_scores + count++ * size;
        next = critical_from(w, classes, block + 1);
        multiply_and_fetch(call->block_q, BLOCK, w->dims, query, nth(w->keys_t, block, w->tokens), call->scale, scores,
                           0, nth(w->keys_t, next, w->tokens));
        if (!call->key_bias) continue;
        for (int64_t p = 0; p < BLOCK / PANEL; p++)
            for (int64_t row = 0; row < call->block_q; row++)
                for (int i = 0; i < PANEL; i++)
                    scores[(p * call->block_q + row) * PANEL + i] += call->key_bias[block * BLOCK + p * PANEL + i];
    }
    return count;
}

// The linear branch's output of a query block, times `share`, into w->linear.
static void linear_forward(struct work *w, int64_t block, const element *query, int64_t valid, float share) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q;
    const float *sum;
    const word *state = state_of(w, block, &sum);
    float factors[MAX_QUERIES];
    linear_rows(w, query, valid, sum, factors);
    for (int64_t row = 0; row < block_q; row++) factors[row] *= share;
    scale_rows(w->query_features, factors, block_q, w->dims);
    if (call->offset)
        for (int64_t p = 0; p < w->dims / PANEL; p++)
            for (int64_t row = 0; row < block_q; row++)
                for (int i = 0; i < PANEL; i++)
                    w->linear[(p * block_q + row) * PANEL + i] =
                        p * PANEL + i < call->dim ? call->offset[p * PANEL + i] : 0;
    const word *features = left_form(w->query_features, block_q, w->dims, w->operand);
    multiply(block_q, w->dims, w->dims, features, state, 1, w->linear, call->offset != 0);
}

// Weights exp(S - max) of a query block's critical blocks, in left form, their sums, and the maxima.
static const word *weigh_rows(struct work *w, int64_t count, float *maxima, float *sums) {
    int64_t block_q = w->call->block_q, panels = count * (BLOCK / PANEL);
    word *weights = PAIR == 1 ? (word *)w->scores : w->operand;
    vec largest[MAX_QUERIES], totals[MAX_QUERIES];
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
        maxima[row] = maximum == -INFINITY ? 0 : maximum;  // no key takes part: weights exp(-inf) = 0
    }
    for (int64_t p = 0; p < panels; p++)
        for (int64_t row = 0; row < block_q; row++) {
            int64_t at = (p * block_q + row) * PANEL;
            vec first = exponential(load(w->scores + at) - maxima[row]);
            vec second = exponential(load(w->scores + at + LANES) - maxima[row]);
            store_row(weights + at / PAIR, first, second);
            totals[row] += first + second;
        }
    for (int64_t row = 0; row < block_q; row++) sums[row] = add_lanes(totals[row]);
    return weights;
}

// The sparse branch's output of a query block, times `share`, into w->sparse, and its log-sum-exp.
static void sparse_forward(struct work *w, const element *query, int64_t valid, const int8_t *classes, float share,
                           float *logsumexp) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q, size = block_q * BLOCK, done = 0;
    float maxima[MAX_QUERIES], sums[MAX_QUERIES];
    const word *left = pack_left(query, call->query_token, valid, call->dim, block_q, w->dims, w->query);
    int64_t count = score_rows(w, classes, left, w->scores);
    const word *weights = weigh_rows(w, count, maxima, sums);
    if (!count) memset(w->sparse, 0, w->queries * sizeof(float));
    for (int64_t block = critical_from(w, classes, 0), next; block < w->columns; block = next, done++) {
        next = critical_from(w, classes, block + 1);
        multiply_and_fetch(block_q, w->dims, BLOCK, weights + done * size / PAIR, nth(w->values, block, w->tokens), 1,
                           w->sparse, done > 0, nth(w->values, next, w->tokens));
    }
    for (int64_t row = 0; row < valid; row++)
        logsumexp[row] = sums[row] == 0 ? -INFINITY : maxima[row] + logf(sums[row]);
    for (int64_t row = 0; row < block_q; row++) sums[row] = sums[row] == 0 ? 0 : share / sums[row];
    scale_rows(w->sparse, sums, block_q, w->dims);
}

// Query blocks `first` to `last` of all query heads, one head after the other.
void NAMED(sla_forward_rows)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    for (int64_t row = first; row < last; row++) {
        int64_t head = row / w->rows, block = row % w->rows, token = block * call->block_q;
        int64_t valid = least(call->block_q, call->length - token);
        const int8_t *classes = call->block_map + head * call->map_head + block * call->map_row;
        const element *query = call->query + head * call->query_head + token * call->query_token;
        float share = share_of(w, row);
        if (call->linear != NONE) linear_forward(w, block, query, valid, call->alpha ? 1 - share : 1);
        sparse_forward(w, query, valid, classes, share, call->logsumexp + head * call->length + token);
        unpack(w->sparse, w->linear, call->block_q, valid, call->dim,
               call->output + head * call->output_head + token * call->output_token, call->output_token);
    }
}

// The operands that the backward keeps of a row.
static struct row kept_row(const struct work *w, int64_t row) {
    word *start = w->kept + row % w->call->strip * 2 * (w->scored + w->queries) / PAIR;
    word *query = start + 2 * w->scored / PAIR;
    return (struct row){start, start + w->scored / PAIR, query, query + w->queries / PAIR};
}

// dQ of the linear branch into w->linear, and dH and dZ of a query block, `share` of dO being the branch's; returns
// sum(dO_l * O_l).
static float linear_rows_backward(struct work *w, int64_t block, const element *query, int64_t valid,
                                  const struct row *kept, float share) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q;
    const float *sum;
    const word *state = state_of(w, block, &sum);
    float inverse[MAX_QUERIES], delta[MAX_QUERIES], shift[MAX_QUERIES], all = 0;
    linear_rows(w, query, valid, sum, inverse);
    multiply(block_q, w->dims, w->dims, w->grad, state, share, w->linear, 0);
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
    column_sums(w->query_features, delta, block_q, w->dims, w->grad_sums + block * w->dims);
    word *grad_state = nth(w->grad_states, block, w->square);
    float *product = floats_of(grad_state, w->scratch);
    const word *features = right_form(w->query_features, block_q, w->dims, w->operand);
    multiply_transposed(w->dims, w->dims, block_q, features, kept->grad, share, product, 0);
    right_form(product, w->dims, w->dims, grad_state);
    return all;
}

// P and dS of a query block into what is kept of it, and dQ of the sparse branch into w->sparse, `share` of dO being
// the branch's; returns sum(dO_s * O_s).
static float sparse_rows_backward(struct work *w, const word *query, int64_t valid, const int8_t *classes,
                                  const struct row *kept, const float *logsumexp, float share) {
    const struct call *call = w->call;
    int64_t block_q = call->block_q, size = block_q * BLOCK, done = 0;
    float shifts[MAX_QUERIES], all = 0;
    vec totals[MAX_QUERIES];
    float *scores = floats_of(kept->weights, w->scores), *grad_scores = floats_of(kept->grad_scores, w->grad_scores);
    int64_t count = score_rows(w, classes, query, scores), rows = count * (BLOCK / PANEL) * block_q;
    for (int64_t row = 0; row < block_q; row++) {  // exp(s - inf) = 0: no weights past the end, or where no key counts
        shifts[row] = row < valid && logsumexp[row] != -INFINITY ? logsumexp[row] : INFINITY;
        totals[row] = splat(0);
    }
    for (int64_t block = critical_from(w, classes, 0), next; block < w->columns; block = next, done++) {
        next = critical_from(w, classes, block + 1);
        multiply_and_fetch(block_q, BLOCK, w->dims, w->grad, nth(w->values_t, block, w->tokens), share,
                           grad_scores + done * size, 0, nth(w->values_t, next, w->tokens));
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t at = i * PANEL; at < (i + 1) * PANEL; at += LANES) {
            vec weights = exponential(load(scores + at) - shifts[i % block_q]);
            store(scores + at, weights);
            totals[i % block_q] += weights * load(grad_scores + at);
        }
    for (int64_t row = 0; row < block_q; row++) {
        shifts[row] = add_lanes(totals[row]);  // delta from the weights: from the output it would carry its rounding
        all += shifts[row];
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t at = i * PANEL; at < (i + 1) * PANEL; at += LANES)
            store(grad_scores + at, load(scores + at) * (load(grad_scores + at) - shifts[i % block_q]));
    right_form(scores, count * block_q, BLOCK, kept->weights);
    right_form(grad_scores, count * block_q, BLOCK, kept->grad_scores);
    const word *left = left_form(grad_scores, count * block_q, BLOCK, w->operand);
    if (!count) memset(w->sparse, 0, w->queries * sizeof(float));
    done = 0;
    for (int64_t block = critical_from(w, classes, 0), next; block < w->columns; block = next, done++) {
        next = critical_from(w, classes, block + 1);
        multiply_and_fetch(block_q, w->dims, BLOCK, left + done * size / PAIR, nth(w->keys, block, w->tokens),
                           call->scale, w->sparse, done > 0, nth(w->keys, next, w->tokens));
    }
    return all;
}

// dQ of query blocks `first` to `last` of all query heads, at most a strip, and what their keys' gradients need.
void NAMED(sla_backward_rows)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    int64_t block_q = call->block_q;
    for (int64_t row = first; row < last; row++) {
        int64_t head = row / w->rows, block = row % w->rows, token = block * block_q;
        int64_t valid = least(block_q, call->length - token);
        const int8_t *classes = call->block_map + head * call->map_head + block * call->map_row;
        const element *query = call->query + head * call->query_head + token * call->query_token;
        const element *grad = call->grad_output + head * call->grad_output_head + token * call->grad_output_token;
        float share = share_of(w, row);
        float rest = call->alpha ? 1 - share : 1, of_linear = 0;
        struct row kept = kept_row(w, row);
        pack_right(query, call->query_token, valid, call->dim, block_q, w->dims, kept.query);
        pack_right(grad, call->grad_output_token, valid, call->dim, block_q, w->dims, kept.grad);
        pack_left(query, call->query_token, valid, call->dim, block_q, w->dims, w->query);
        pack_left(grad, call->grad_output_token, valid, call->dim, block_q, w->dims, w->grad);
        if (call->grad_offset) {
            pack_floats(grad, call->grad_output_token, valid, call->dim, block_q, w->dims, w->scratch);
            column_sums(w->scratch, 0, block_q, w->dims, w->offset_sums + row * w->dims);
        }
        if (call->linear != NONE) of_linear = linear_rows_backward(w, block, query, valid, &kept, rest);
        float of_sparse = sparse_rows_backward(w, w->query, valid, classes, &kept,
                                               call->logsumexp + head * call->length + token, share);
        if (call->grad_alpha)  // sums of dO * O of each branch; a saturated sigmoid has no gradient
            call->grad_alpha[row] = (share > 0 ? of_sparse / share : 0) - (rest > 0 ? of_linear / rest : 0);
        unpack(w->sparse, w->linear, block_q, valid, call->dim,
               call->grad_query + head * call->grad_query_head + token * call->grad_query_token,
               call->grad_query_token);
    }
}

// Adds dK and dV of the sparse branch: of key blocks `first` to `last`, of the strip of rows kept.
void NAMED(sla_backward_keys)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    int64_t block_q = call->block_q, size = block_q * BLOCK;
    for (int64_t block = first; block < last; block++)
        for (int64_t row = call->strip_first; row < call->strip_last; row++) {
            const int8_t *classes = call->block_map + row / w->rows * call->map_head + row % w->rows * call->map_row;
            if (classes[block] != 1) continue;
            struct row kept = kept_row(w, row);
            int64_t before = 0, at = block * w->tokens;
            for (int64_t other = 0; other < block; other++) before += classes[other] == 1;
            before = before * size / PAIR;
            multiply_transposed(BLOCK, w->dims, block_q, kept.grad_scores + before, kept.query, call->scale,
                                w->grad_keys + at, 1);
            multiply_transposed(BLOCK, w->dims, block_q, kept.weights + before, kept.grad, share_of(w, row),
                                w->grad_values + at, 1);
        }
}

// Gradients of states that the key blocks get of the rows of query head call->head.
void NAMED(sla_sum_gradients)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->linear == NONE) return;
    sum_states(w, w->grad_states, w->grad_sums, w->rows, w->columns, first, last);
}

// Adds dK, dV and dW of the linear branch of a key block, given dH and dZ of its rows.
static void linear_keys_backward(struct work *w, int64_t block, const word *grad_state, const float *grad_sum,
                                 float *weight_sum, int add) {
    const struct call *call = w->call;
    const float *features = w->features + block * w->tokens;
    float *grad_value = w->grad_values + block * w->tokens, *grad_key = w->grad_keys + block * w->tokens;
    float *tokens = w->linear, shift[BLOCK];  // dV', then dphi(K): a block of keys is not larger than one of queries
    const word *left = left_form(weighted_features(w, features, block), BLOCK, w->dims, w->operand);
    if (call->weight) {
        multiply(BLOCK, w->dims, w->dims, left, grad_state, 1, tokens, 0);
        multiply(BLOCK, w->dims, w->dims, left_form(tokens, BLOCK, w->dims, w->operand), w->weight, 1, grad_value, 1);
        multiply_transposed(w->dims, w->dims, BLOCK, right_form(tokens, BLOCK, w->dims, w->operand),
                            nth(w->values, block, w->tokens), 1, weight_sum, add);
    } else {
        multiply(BLOCK, w->dims, w->dims, left, grad_state, 1, grad_value, 1);
    }
    transpose(grad_state, w->dims, w->other);
    multiply(BLOCK, w->dims, w->dims, nth(w->projected, block, w->tokens), w->other, 1, tokens, 0);
    for (int64_t p = 0; p < w->dims / PANEL; p++)
        for (int64_t row = 0; row < BLOCK; row++)
            for (int i = 0; i < PANEL; i++) tokens[(p * BLOCK + row) * PANEL + i] -= grad_sum[p * PANEL + i];
    if (call->key_weight) scale_rows(tokens, call->key_weight + block * BLOCK, BLOCK, w->dims);
    row_products(tokens, features, BLOCK, w->dims, shift);
    feature_backward(tokens, features, shift, BLOCK, w->dims, call->feature_map);
    for (int64_t i = 0; i < w->tokens; i++) grad_key[i] += tokens[i];
}

// Adds dK, dV and dW of the linear branch: of parts `first` to `last` of the key blocks, of query head call->head.
void NAMED(sla_backward_linear)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->linear == NONE) return;
    for (int64_t block = first * PART; block < least(last * PART, w->columns); block++) {
        const float *grad_sum;
        const word *grad_state = state_of(w, block, &grad_sum);
        linear_keys_backward(w, block, grad_state, grad_sum, w->weight_sums + block / PART * w->square,
                             call->head || block % PART);
    }
}

// dK and dV of key blocks `first` to `last` as tensors.
void NAMED(sla_unpack_keys)(const struct call *call, float *own, int64_t first_block, int64_t last_block) {
    struct work work = prepare(call, own), *w = &work;
    for (int64_t block = first_block; block < last_block; block++) {
        int64_t first = block * BLOCK, valid = least(BLOCK, call->length - first), at = block * w->tokens;
        unpack(w->grad_keys + at, 0, BLOCK, valid, call->dim, call->grad_key + first * call->grad_key_token,
               call->grad_key_token);
        unpack(w->grad_values + at, 0, BLOCK, valid, call->dim, call->grad_value + first * call->grad_value_token,
               call->grad_value_token);
    }
}

// dW and db, in float32.
void NAMED(sla_unpack_weight)(const struct call *call, float *own, int64_t first, int64_t last) {
    struct work work = prepare(call, own), *w = &work;
    if (call->grad_weight) {
        for (int64_t at = 0; at < w->square; at += PAGE)
            total_of(w->weight_sums + at, w->square, (w->columns + PART - 1) / PART, least(PAGE, w->square - at),
                     w->scratch + at, 0);
        for (int64_t row = 0; row < call->dim; row++)
            for (int64_t d = 0; d < call->dim; d++)
                call->grad_weight[row * call->dim + d] = w->scratch[(d / PANEL * w->dims + row) * PANEL + d % PANEL];
    }
    if (call->grad_offset) {
        total_of(w->offset_sums, w->dims, call->group * w->rows, w->dims, w->scratch, 0);
        memcpy(call->grad_offset, w->scratch, call->dim * sizeof(float));
    }
}
