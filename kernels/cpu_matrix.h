// Vectors of floats, matrices in panels, and their products in float32 or, with BFLOAT16, of bfloat16 operands.
//
// NOTE [Panels]
// A matrix (rows, columns) is stored as [columns / PANEL][rows][PANEL]. The panel of a right operand is one run of
// memory that stays in the first-level cache while the left operand goes by. Head dimensions are padded to whole panels
// with zeros, the last block of tokens to a whole block.
//
// NOTE [Operands]
// Products multiply words, each a float or, with BFLOAT16, the PAIR of values that vdpbf16ps multiplies at once: two
// that follow each other in the inner dimension, the first in the low half. So a matrix has two forms there:
//     left     pairs along columns, [columns / PANEL][rows][PANEL / PAIR]: left operand
//     right    pairs along rows, [columns / PANEL][rows / PAIR][PANEL]: right operand, or left operand transposed
// In float32 both are the matrix itself, and what converts to them returns what it was given.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE 8  // rows of a register tile
#else
#define LANES 8
#define TILE 4
#endif
#define PANEL (2 * LANES)
#define LINE 16      // words of a line of the cache
#define MAX_DIM 256  // largest head dimension

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#ifdef BFLOAT16
#define PAIR 2
#define NAMED(name) name##_bfloat16
typedef uint16_t element __attribute__((may_alias));  // of the tensors
typedef uint32_t word __attribute__((may_alias));
#else
#define PAIR 1
#define NAMED(name) name
typedef float element;
typedef float word;
#endif

static inline vec load(const void *from) { return *(const vec *)from; }
static inline void store(void *to, vec value) { *(vec *)to = value; }

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

// What follows is all that depends on BFLOAT16: products of words, and values to words and back.
#ifdef BFLOAT16

static inline vec multiply_add(word left, vec right, vec sum) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
}

// PANEL values of a left operand's row, rounded to nearest even.
static inline void store_row(word *to, vec first, vec second) {
    store(to, (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// LANES values of two rows of a right operand, and back.
static inline void store_rows(word *to, vec even, vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(to, (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even)));
}

static inline void load_rows(const word *from, vec *even, vec *odd) {
    ivec words = (ivec)load(from);
    *even = (vec)(words << 16);
    *odd = (vec)(words & (int32_t)0xFFFF0000);
}

static inline __mmask16 first_lanes(int64_t count) { return count < LANES ? (1u << count) - 1 : 0xFFFF; }

static void to_floats(const element *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = first_lanes(count - i);
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + i));
        _mm512_mask_storeu_epi32(to + i, lanes, _mm512_slli_epi32(wide, 16));
    }
}

static void from_floats(const float *from, int64_t count, element *to) {
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 lanes = first_lanes(count - i);
        _mm256_mask_storeu_epi16(to + i, lanes, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from + i)));
    }
}

static const word *left_form(const float *from, int64_t rows, int64_t columns, word *to) {
    for (int64_t i = 0; i < rows * columns; i += PANEL)
        store_row(to + i / PAIR, load(from + i), load(from + i + LANES));
    return to;
}

static const word *right_form(const float *from, int64_t rows, int64_t columns, word *to) {
    for (int64_t i = 0; i < rows * columns; i += PAIR * PANEL)
        for (int v = 0; v < PANEL; v += LANES)
            store_rows(to + i / PAIR + v, load(from + i + v), load(from + i + PANEL + v));
    return to;
}

#else

static inline vec multiply_add(word left, vec right, vec sum) { return sum + splat(left) * right; }

static inline void store_row(word *to, vec first, vec second) {
    store(to, first);
    store(to + LANES, second);
}

static inline void store_rows(word *to, vec first, vec second) { store_row(to, first, second); }

static inline void load_rows(const word *from, vec *first, vec *second) {
    *first = load(from);
    *second = load(from + LANES);
}

static void to_floats(const element *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

static void from_floats(const float *from, int64_t count, element *to) { to_floats(from, count, to); }

static const word *left_form(const float *from, int64_t rows, int64_t columns, word *to) { return from; }
static const word *right_form(const float *from, int64_t rows, int64_t columns, word *to) { return from; }

#endif

// Where floats go that become the operand `words`: in float32 there at once.
static inline float *floats_of(word *words, float *scratch) { return PAIR == 1 ? (float *)words : scratch; }

// TILE rows of one panel of C = factor A B or, with `add`, C + factor A B. After `depth` columns of words the left
// operand steps on by `a_step`, `steps` times in all.
static inline __attribute__((always_inline)) void multiply_tile(const word *a, int64_t a_row, int64_t a_column,
                                                                int64_t a_step, const word *b, int64_t steps,
                                                                int64_t depth, float factor, float *c, int add) {
    vec sums[TILE][2];
    for (int i = 0; i < TILE; i++) sums[i][0] = sums[i][1] = splat(0);
    for (int64_t step = 0; step < steps; step++, a += a_step, b += depth * PANEL)
        for (int64_t k = 0; k < depth; k++) {
            vec first = load(b + k * PANEL), second = load(b + k * PANEL + LANES);
            for (int i = 0; i < TILE; i++) {
                word left = a[i * a_row + k * a_column];
                sums[i][0] = multiply_add(left, first, sums[i][0]);
                sums[i][1] = multiply_add(left, second, sums[i][1]);
            }
        }
    for (int i = 0; i < TILE; i++)
        for (int v = 0; v < 2; v++) {
            float *at = c + i * PANEL + v * LANES;
            store(at, add ? load(at) + factor * sums[i][v] : factor * sums[i][v]);
        }
}

// C (rows, columns) = factor A B for A (rows, inner) and B (inner, columns), or C + factor A B. While a panel of B is
// multiplied, the one that comes next is fetched: after the last that of `next`, the right operand of the next product.
static void multiply_and_fetch(int64_t rows, int64_t columns, int64_t inner, const word *a, const word *b, float factor,
                               float *c, int add, const word *next) {
    const int64_t depth = PANEL / PAIR, size = inner / PAIR * PANEL, part = size * TILE / rows;
    for (int64_t panel = 1; panel <= columns / PANEL; panel++, b += size, c += rows * PANEL) {
        const word *ahead = panel < columns / PANEL ? b + size : next;
        for (int64_t i = 0; i < rows; i += TILE, ahead += part) {
            for (int64_t at = 0; at < part; at += LINE) __builtin_prefetch(ahead + at, 0, 2);
            multiply_tile(a + i * depth, depth, 1, rows * depth, b, inner / PANEL, depth, factor, c + i * PANEL, add);
        }
    }
}

static void multiply(int64_t rows, int64_t columns, int64_t inner, const word *a, const word *b, float factor, float *c,
                     int add) {
    multiply_and_fetch(rows, columns, inner, a, b, factor, c, add, b);
}

// C (rows, columns) = factor A^T B for A (inner, rows) and B (inner, columns), both in right form, or C + factor A^T B.
static void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const word *a, const word *b,
                                float factor, float *c, int add) {
    const int64_t depth = inner / PAIR;
    for (int64_t panel = 0; panel < columns / PANEL; panel++, b += depth * PANEL, c += rows * PANEL)
        for (int64_t i = 0; i < rows; i += TILE)
            multiply_tile(a + i / PANEL * depth * PANEL + i % PANEL, 1, PANEL, 0, b, 1, depth, factor, c + i * PANEL,
                          add);
}

// Brings (valid, dim) of row stride `stride` to the second-level cache.
static void fetch(const element *from, int64_t stride, int64_t valid, int64_t dim) {
    for (int64_t row = 0; row < valid; row++)
        for (int64_t d = 0; d < dim; d += LINE * PAIR) __builtin_prefetch(from + row * stride + d, 0, 2);
}

// (valid, dim) of row stride `stride` into floats (rows, dims), zero elsewhere.
static void pack_floats(const element *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows, int64_t dims,
                        float *to) {
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(float));
    for (int64_t first = 0; first < dim; first += PANEL, to += rows * PANEL)
        for (int64_t row = 0; row < valid; row++)
            to_floats(from + row * stride + first, least(PANEL, dim - first), to + row * PANEL);
}

// The same into left form.
static const word *pack_left(const element *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows,
                             int64_t dims, word *words) {
    element *to = (element *)words;
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(element));
    for (int64_t first = 0; first < dim; first += PANEL, to += rows * PANEL) {
        int64_t width = least(PANEL, dim - first);
        for (int64_t row = 0; row < valid; row++)
            for (int64_t i = 0; i < width; i++) to[row * PANEL + i] = from[row * stride + first + i];
    }
    return words;
}

// The same into right form.
static void pack_right(const element *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows, int64_t dims,
                       word *words) {
    static const element zeros[PANEL];
    element *to = (element *)words;
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(element));
    for (int64_t first = 0; first < dim; first += PANEL, to += rows * PANEL) {
        int64_t width = least(PANEL, dim - first);
        for (int64_t row = 0; row < valid; row += PAIR) {
            const element *one = from + row * stride + first;
            const element *last = row + PAIR <= valid ? one + (PAIR - 1) * stride : zeros;
            for (int64_t i = 0; i < width; i++) {
                to[row * PANEL + i * PAIR] = one[i];
                if (PAIR == 2) to[row * PANEL + i * PAIR + 1] = last[i];
            }
        }
    }
}

// LANES rows of as many words, `stride` elements apart, into the rows of their transpose, PANEL words apart.
static inline void transpose_lanes(const element *from, int64_t stride, word *to) {
#ifdef __AVX512F__
    __m512i rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = _mm512_loadu_si512(from + i * stride);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {  // exchanges blocks of step x step; lane LANES + n is n of `below`
        const __mmask16 second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
        const __m512i upper = _mm512_mask_add_epi32(lane, second, lane, _mm512_set1_epi32(LANES - step));
        const __m512i lower = _mm512_add_epi32(upper, _mm512_set1_epi32(step));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                __m512i above = rows[i], below = rows[i + step];
                rows[i] = _mm512_permutex2var_epi32(above, upper, below);
                rows[i + step] = _mm512_permutex2var_epi32(above, lower, below);
            }
    }
    for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * PANEL, rows[i]);
#else
    for (int row = 0; row < LANES; row++)
        for (int i = 0; i < LANES; i++) memcpy(to + i * PANEL + row, from + row * stride + i * PAIR, sizeof(word));
#endif
}

// (valid, dim) of row stride `stride` into the right form of its transpose (dims, rows), zero elsewhere.
static void pack_transposed(const element *from, int64_t stride, int64_t valid, int64_t dim, int64_t rows, int64_t dims,
                            word *words) {
    element *to = (element *)words;
    if (valid < rows || dim < dims) memset(to, 0, rows * dims * sizeof(element));
    for (int64_t row = 0; row < valid; row += LANES) {
        element *into = to + row / PANEL * dims * PANEL + row % PANEL * PAIR;
        int64_t d = 0;
        if (row + LANES <= valid)
            for (; d + LANES * PAIR <= dim; d += LANES * PAIR)
                transpose_lanes(from + row * stride + d, stride, (word *)(into + d * PANEL));
        for (int64_t i = 0; i < least(LANES, valid - row); i++) {
            const element *rest = from + (row + i) * stride;
            int64_t at = d;
            for (; at + PAIR <= dim; at += PAIR) memcpy(into + at * PANEL + i * PAIR, rest + at, sizeof(word));
            if (at < dim) into[at * PANEL + i * PAIR] = rest[at];
        }
    }
}

// The transpose of a square matrix in right form: PAIR x PAIR values at once, which in both stand side by side.
static void transpose(const word *from, int64_t size, word *to) {
    for (int64_t first = 0; first < size; first += PANEL)
        for (int64_t column = first; column < first + PANEL; column += PAIR)
            for (int64_t row = 0; row < size; row += PAIR) {
                const element *source = (const element *)from + first * size + row * PANEL + (column - first) * PAIR;
                element *into = (element *)to + row / PANEL * size * PANEL + column * PANEL + row % PANEL * PAIR;
                for (int i = 0; i < PAIR; i++)
                    for (int j = 0; j < PAIR; j++) into[i * PAIR + j] = source[j * PAIR + i];
            }
}

// Floats (rows, dims) plus `other` (or null) into (valid, dim) of row stride `stride`.
static void unpack(const float *from, const float *other, int64_t rows, int64_t valid, int64_t dim, element *to,
                   int64_t stride) {
    for (int64_t first = 0; first < dim; first += PANEL)
        for (int64_t row = 0; row < valid; row++) {
            float line[PANEL];
            int64_t at = first * rows + row * PANEL;
            for (int v = 0; v < PANEL; v += LANES) {
                vec value = load(from + at + v);
                if (other) value += load(other + at + v);
                store(line + v, value);
            }
            from_floats(line, least(PANEL, dim - first), to + row * stride + first);
        }
}
