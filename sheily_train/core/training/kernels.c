/* What a training step computes between its matrix products, each in one pass over memory.

Numbers in memory are float, or bfloat16 where BF16 is defined; all arithmetic is in float. Work is shared among threads
by rows whose results do not depend on each other, and sums over threads are taken in their order: the same number of
threads gives the same bits. Sizes: n tokens, d numbers a token. Arrays are dense and row-major. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BF16
typedef uint16_t number;

static inline float get(number stored) {
    union { uint32_t bits; float value; } word = {.bits = (uint32_t)stored << 16};
    return word.value;
}

static inline number put(float value) { /* to the nearest, ties to even; a NaN stays one */
    union { float value; uint32_t bits; } word = {.value = value};
    uint32_t rounded = (word.bits + 0x7fff + ((word.bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (number)rounded;
}
#else
typedef float number;
static inline float get(number stored) { return stored; }
static inline number put(float value) { return value; }
#endif

/* exp for x <= 88 within 2 units in the last place (x = k ln 2 + r, and the Taylor polynomial of r up to r^7). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float k = rintf(x * 1.44269504f);
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)k + 127) << 23};
    return p * power.value;
}

/* y = w x / rms(x), and 1 / rms(x) of each token. */
int rms_norm(const number *x, const number *w, number *y, float *inverse, long n, long d, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        const number *xi = x + i * d;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < d; j++) sum += get(xi[j]) * get(xi[j]);
        float scale = inverse[i] = 1.0f / sqrtf(sum / d + eps);
#pragma omp simd
        for (long j = 0; j < d; j++) y[i * d + j] = put(get(xi[j]) * scale * get(w[j]));
    }
    return 0;
}

/* The gradient at x, from that at y. */
int rms_norm_backward(const number *dy, const number *x, const number *w, const float *inverse, number *dx, long n,
                       long d, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        const number *xi = x + i * d, *gi = dy + i * d;
        float along = 0, scale = inverse[i];
#pragma omp simd reduction(+ : along)
        for (long j = 0; j < d; j++) along += get(gi[j]) * get(w[j]) * get(xi[j]);
        along *= scale * scale * scale / d;
#pragma omp simd
        for (long j = 0; j < d; j++) dx[i * d + j] = put(get(gi[j]) * get(w[j]) * scale - get(xi[j]) * along);
    }
    return 0;
}

/* y = silu(gate) up; n numbers in all. */
int swiglu(const number *gate, const number *up, number *y, long n, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        float g = get(gate[i]);
        y[i] = put(g / (1.0f + exponential(-g)) * get(up[i]));
    }
    return 0;
}

/* The gradients at gate and up, from that at y. */
int swiglu_backward(const number *dy, const number *gate, const number *up, number *dgate, number *dup, long n,
                     int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) {
        float g = get(gate[i]), slope = get(dy[i]);
        float sigmoid = 1.0f / (1.0f + exponential(-g));
        dup[i] = put(slope * g * sigmoid);
        dgate[i] = put(slope * get(up[i]) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    }
    return 0;
}

/* Cross entropy of each token over d logits; if slopes, the logits become softmax minus one at the target. */
int cross_entropy(number *logits, const int64_t *targets, float *losses, long n, long d, int slopes, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        number *row = logits + i * d;
        float most = get(row[0]), sum = 0;
#pragma omp simd reduction(max : most)
        for (long j = 0; j < d; j++) most = get(row[j]) > most ? get(row[j]) : most;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < d; j++) sum += exponential(get(row[j]) - most);
        float whole = most + logf(sum);
        losses[i] = whole - get(row[targets[i]]);
        if (!slopes) continue;
        float target = exponential(-losses[i]) - 1.0f;
#pragma omp simd
        for (long j = 0; j < d; j++) row[j] = put(exponential(get(row[j]) - whole));
        row[targets[i]] = put(target);
    }
    return 0;
}

/* Small products. A lane is as many floats as the compiler keeps together; tokens are taken a block at a time. */
enum { LANE = 16, BLOCK = 16, CHUNK = 256 };
typedef float lane __attribute__((vector_size(LANE * sizeof(float)), aligned(sizeof(float))));

static inline __attribute__((always_inline)) void tile(int rows, int lanes, const float *a, long a_row, long a_column,
                                                        const float *b, long b_row, float *c, long c_row, long k,
                                                        int add) {
    lane sum[8][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < lanes; j++) sum[i][j] = add ? *(lane *)(c + i * c_row + j * LANE) : (lane){0};
    for (long p = 0; p < k; p++)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < lanes; j++) sum[i][j] += a[i * a_row + p * a_column] * *(lane *)(b + p * b_row + j * LANE);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < lanes; j++) *(lane *)(c + i * c_row + j * LANE) = sum[i][j];
}

/* c [m, n] = a [m, k] b [k, n], or added to it; n is whole lanes. */
static void product(const float *a, long a_row, long a_column, const float *b, long b_row, float *c, long c_row, long m,
                    long n, long k, int add) {
    for (long j = 0; j < n; j += 2 * LANE) {
        int pair = n - j > LANE, step = pair ? 4 : 8;
        const float *bj = b + j;
        long i = 0;
        for (; i + step <= m; i += step)
            if (pair) tile(4, 2, a + i * a_row, a_row, a_column, bj, b_row, c + i * c_row + j, c_row, k, add);
            else tile(8, 1, a + i * a_row, a_row, a_column, bj, b_row, c + i * c_row + j, c_row, k, add);
        for (; i < m; i++)
            if (pair) tile(1, 2, a + i * a_row, a_row, a_column, bj, b_row, c + i * c_row + j, c_row, k, add);
            else tile(1, 1, a + i * a_row, a_row, a_column, bj, b_row, c + i * c_row + j, c_row, k, add);
    }
}

static inline long whole_lanes(long count) { return (count + LANE - 1) / LANE * LANE; }

/* Part of a block of tokens: count rows of x, width numbers each, as floats with CHUNK to the row; and back. */
static void read_block(const number *x, long x_row, float *block, long count, long width) {
    for (long i = 0; i < count; i++)
        for (long j = 0; j < width; j++) block[i * CHUNK + j] = get(x[i * x_row + j]);
}

static void write_block(const float *block, number *x, long x_row, long count, long width) {
    for (long i = 0; i < count; i++)
        for (long j = 0; j < width; j++) x[i * x_row + j] = put(block[i * CHUNK + j]);
}

static inline long least(long a, long b) { return a < b ? a : b; }

/* LoRA: inner = x A^T and y += scale inner B^T. x [n, in], A [rank, in], B [out, rank], y [n, out], inner [n, lanes of
rank]; in and out are whole lanes. Returns 1 without memory. */
int lora(const number *x, const float *a, const float *b, number *y, float *inner, long n, long in, long out, long rank,
         float scale, int threads) {
    long lanes = whole_lanes(rank);
    float *a_T = calloc(in * lanes + rank * out, sizeof(float)), *b_T = a_T + in * lanes;
    if (!a_T) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for nowait
        for (long j = 0; j < in; j++)
            for (long r = 0; r < rank; r++) a_T[j * lanes + r] = a[r * in + j];
#pragma omp for
        for (long j = 0; j < out; j++)
            for (long r = 0; r < rank; r++) b_T[r * out + j] = scale * b[j * rank + r];
#pragma omp for schedule(static)
        for (long first = 0; first < n; first += BLOCK) {
            float block[BLOCK * CHUNK], *middle = inner + first * lanes;
            long count = least(n - first, BLOCK);
            for (long j = 0; j < in; j += CHUNK) {
                long width = least(in - j, CHUNK);
                read_block(x + first * in + j, in, block, count, width);
                product(block, CHUNK, 1, a_T + j * lanes, lanes, middle, lanes, count, lanes, width, j > 0);
            }
            for (long j = 0; j < out; j += CHUNK) {
                long width = least(out - j, CHUNK);
                read_block(y + first * out + j, out, block, count, width);
                product(middle, lanes, 1, b_T + j, out, block, CHUNK, count, width, rank, 1);
                write_block(block, y + first * out + j, out, count, width);
            }
        }
    }
    free(a_T);
    return 0;
}

/* The gradients of lora at A and B, and at x, added to dx unless it is NULL. */
int lora_backward(const number *dy, const number *x, const float *a, const float *b, const float *inner, number *dx,
                  float *da, float *db, long n, long in, long out, long rank, float scale, int threads) {
    long lanes = whole_lanes(rank), size = rank * (in + out);
    float *scaled_b = calloc(out * lanes + threads * size, sizeof(float)), *sums = scaled_b + out * lanes;
    if (!scaled_b) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long j = 0; j < out; j++)
            for (long r = 0; r < rank; r++) scaled_b[j * lanes + r] = scale * b[j * rank + r];
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            float *at_a = sums + thread * size, *at_b_T = at_a + rank * in;
            for (long first = thread * BLOCK; first < n; first += threads * BLOCK) {
                float block[BLOCK * CHUNK], middle[BLOCK * lanes];
                long count = least(n - first, BLOCK);
                for (long j = 0; j < out; j += CHUNK) {
                    long width = least(out - j, CHUNK);
                    read_block(dy + first * out + j, out, block, count, width);
                    product(block, CHUNK, 1, scaled_b + j * lanes, lanes, middle, lanes, count, lanes, width, j > 0);
                    product(inner + first * lanes, 1, lanes, block, CHUNK, at_b_T + j, out, rank, width, count, 1);
                }
                for (long j = 0; j < in; j += CHUNK) {
                    long width = least(in - j, CHUNK);
                    read_block(x + first * in + j, in, block, count, width);
                    product(middle, 1, lanes, block, CHUNK, at_a + j, in, rank, width, count, 1);
                    if (!dx) continue;
                    read_block(dx + first * in + j, in, block, count, width);
                    product(middle, lanes, 1, a + j, in, block, CHUNK, count, width, rank, 1);
                    write_block(block, dx + first * in + j, in, count, width);
                }
            }
        }
#pragma omp for nowait
        for (long i = 0; i < rank * in; i++) {
            float sum = 0;
            for (int thread = 0; thread < threads; thread++) sum += sums[thread * size + i];
            da[i] = sum;
        }
#pragma omp for
        for (long j = 0; j < out; j++)
            for (long r = 0; r < rank; r++) {
                float sum = 0;
                for (int thread = 0; thread < threads; thread++) sum += sums[thread * size + rank * in + r * out + j];
                db[j * rank + r] = scale * sum;
            }
    }
    free(scaled_b);
    return 0;
}

/* Attention. Rows of panels are whole lanes. */

/* One head's numbers of a token, turned by its place (rotary embedding, the halves paired). */
static inline void turn(const number *x, const number *cosine, const number *sine, float *y, long d) {
    long half = d / 2;
    for (long j = 0; j < half; j++) {
        float a = get(x[j]), b = get(x[j + half]);
        y[j] = a * get(cosine[j]) - b * get(sine[j]);
        y[j + half] = b * get(cosine[j + half]) + a * get(sine[j + half]);
    }
}

/* The gradient before turning, from that after it; added to y. */
static inline void turn_back(const float *g, const number *cosine, const number *sine, float *y, long d) {
    long half = d / 2;
    for (long j = 0; j < half; j++) {
        y[j] += g[j] * get(cosine[j]) + g[j + half] * get(sine[j + half]);
        y[j + half] += g[j + half] * get(cosine[j + half]) - g[j] * get(sine[j]);
    }
}

typedef struct {
    const number *query, *key, *value, *cosine, *sine;
    const int64_t *nodes, *firsts, *lengths;
    long longest, heads, key_heads, d, window;
    float scale;
} Attention;

/* Of row b: keys turned and transposed, values as they are or transposed, keys as they are where wanted. */
static void panels(const Attention *of, long b, long head, float *key_T, float *value, float *value_T, float *key) {
    long d = of->d, length = of->lengths[b], columns = whole_lanes(of->longest);
    float turned[d];
    for (long t = 0; t < length; t++) {
        long node = of->nodes[b * of->longest + t], at = (node * of->key_heads + head) * d;
        turn(of->key + at, of->cosine + node * d, of->sine + node * d, turned, d);
        for (long j = 0; j < d; j++) key_T[j * columns + t] = turned[j];
        if (key) memcpy(key + t * d, turned, d * sizeof(float));
        if (value)
            for (long j = 0; j < d; j++) value[t * d + j] = get(of->value[at + j]);
        if (value_T)
            for (long j = 0; j < d; j++) value_T[j * columns + t] = get(of->value[at + j]);
    }
}

/* Shares that queries first..first+count of row b give to the keys before them; also their numbers, turned and scaled. */
static void shares(const Attention *of, long b, long head, long first, long count, const float *key_T, float *query,
                   float *share) {
    long d = of->d, columns = whole_lanes(of->longest);
    int keys = whole_lanes(first + count);
    for (long i = 0; i < count; i++) {
        long node = of->nodes[b * of->longest + first + i];
        turn(of->query + (node * of->heads + head) * d, of->cosine + node * d, of->sine + node * d, query + i * d, d);
        for (long j = 0; j < d; j++) query[i * d + j] *= of->scale;
    }
    product(query, d, 1, key_T, columns, share, columns, count, keys, d, 0);
    for (long i = 0; i < count; i++) {
        float *row = share + i * columns, most = -INFINITY, sum = 0;
        int stop = first + i + 1, start = of->window && stop > of->window ? stop - of->window : 0;
#pragma omp simd reduction(max : most)
        for (int t = 0; t < keys; t++) {
            row[t] = t >= start && t < stop ? row[t] : -INFINITY;
            most = row[t] > most ? row[t] : most;
        }
#pragma omp simd reduction(+ : sum)
        for (int t = 0; t < keys; t++) {
            float part = exponential(row[t] - most);
            sum += row[t] = t >= start && t < stop ? part : 0;
        }
        float factor = 1.0f / sum;
#pragma omp simd
        for (int t = 0; t < keys; t++) row[t] *= factor;
    }
}

/* Causal attention over rows of nodes. Row b has lengths[b] nodes and computes those from firsts[b] on, the ones that no
row before it has. query and y [n, heads, d], key and value [n, key_heads, d]; window 0 is none. Returns 1 without memory. */
int attention(const number *query, const number *key, const number *value, const number *cosine, const number *sine,
              const int64_t *nodes, const int64_t *firsts, const int64_t *lengths, number *y, long rows, long longest,
              long heads, long key_heads, long d, long window, float scale, int threads) {
    Attention of = {query, key, value, cosine, sine, nodes, firsts, lengths, longest, heads, key_heads, d, window, scale};
    long columns = whole_lanes(longest), group = heads / key_heads;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = calloc(columns * d * 2 + BLOCK * (d * 2 + columns), sizeof(float));
        float *key_T = room, *values = key_T + columns * d, *queries = values + columns * d;
        float *share = queries + BLOCK * d, *out = share + BLOCK * columns;
        if (!room)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(static, 1)
        for (long item = 0; item < rows * key_heads; item++) {
            if (!room) continue;
            long b = item / key_heads, key_head = item % key_heads;
            panels(&of, b, key_head, key_T, values, NULL, NULL);
            for (long head = key_head * group; head < (key_head + 1) * group; head++)
                for (long first = firsts[b]; first < lengths[b]; first += BLOCK) {
                    long count = least(lengths[b] - first, BLOCK);
                    shares(&of, b, head, first, count, key_T, queries, share);
                    product(share, columns, 1, values, d, out, d, count, d, first + count, 0);
                    for (long i = 0; i < count; i++) {
                        number *at = y + (nodes[b * longest + first + i] * heads + head) * d;
                        for (long j = 0; j < d; j++) at[j] = put(out[i * d + j]);
                    }
                }
        }
        free(room);
    }
    return failed;
}

/* The gradients at query, key and value, from that at y. */
int attention_backward(const number *dy, const number *query, const number *key, const number *value,
                       const number *cosine, const number *sine, const int64_t *nodes, const int64_t *firsts,
                       const int64_t *lengths, number *dquery, number *dkey, number *dvalue, long n, long rows,
                       long longest, long heads, long key_heads, long d, long window, float scale, int threads) {
    Attention of = {query, key, value, cosine, sine, nodes, firsts, lengths, longest, heads, key_heads, d, window, scale};
    long columns = whole_lanes(longest), group = heads / key_heads, size = n * key_heads * d;
    float *sums = calloc((size_t)threads * 2 * size, sizeof(float)); /* of keys and values, by thread */
    int failed = !sums;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *room = sums ? calloc(columns * d * 5 + BLOCK * (d * 3 + columns * 2), sizeof(float)) : NULL;
        float *key_T = room, *value_T = key_T + columns * d, *keys = value_T + columns * d;
        float *at_keys = keys + columns * d, *at_values = at_keys + columns * d, *queries = at_values + columns * d;
        float *slope = queries + BLOCK * d, *at_queries = slope + BLOCK * d, *share = at_queries + BLOCK * d;
        float *at_share = share + BLOCK * columns;
        float *key_sums = sums + (size_t)thread * 2 * size, *value_sums = key_sums + size;
        if (!room)
#pragma omp atomic write
            failed = 1;
        for (long item = thread; room && item < rows * key_heads; item += threads) {
            long b = item / key_heads, key_head = item % key_heads, length = lengths[b];
            panels(&of, b, key_head, key_T, NULL, value_T, keys);
            memset(at_keys, 0, length * d * sizeof(float));
            memset(at_values, 0, length * d * sizeof(float));
            for (long head = key_head * group; head < (key_head + 1) * group; head++)
                for (long first = firsts[b]; first < length; first += BLOCK) {
                    long count = least(length - first, BLOCK), stop = first + count;
                    int wide = whole_lanes(stop);
                    shares(&of, b, head, first, count, key_T, queries, share);
                    for (long i = 0; i < count; i++) {
                        const number *at = dy + (nodes[b * longest + first + i] * heads + head) * d;
                        for (long j = 0; j < d; j++) slope[i * d + j] = get(at[j]);
                    }
                    product(slope, d, 1, value_T, columns, at_share, columns, count, wide, d, 0);
                    product(share, 1, columns, slope, d, at_values, d, stop, d, count, 1);
                    for (long i = 0; i < count; i++) {
                        float *p = share + i * columns, *dp = at_share + i * columns, mean = 0;
#pragma omp simd reduction(+ : mean)
                        for (int t = 0; t < wide; t++) mean += p[t] * dp[t];
#pragma omp simd
                        for (int t = 0; t < wide; t++) dp[t] = p[t] * (dp[t] - mean);
                    }
                    product(at_share, columns, 1, keys, d, at_queries, d, count, d, stop, 0);
                    product(at_share, 1, columns, queries, d, at_keys, d, stop, d, count, 1); /* queries are scaled */
                    for (long i = 0; i < count; i++) {
                        long node = nodes[b * longest + first + i];
                        float before[d];
                        memset(before, 0, sizeof before);
                        turn_back(at_queries + i * d, cosine + node * d, sine + node * d, before, d);
                        number *at = dquery + (node * heads + head) * d;
                        for (long j = 0; j < d; j++) at[j] = put(before[j] * scale);
                    }
                }
            for (long t = 0; t < length; t++) {
                long node = nodes[b * longest + t], at = (node * key_heads + key_head) * d;
                turn_back(at_keys + t * d, cosine + node * d, sine + node * d, key_sums + at, d);
                for (long j = 0; j < d; j++) value_sums[at + j] += at_values[t * d + j];
            }
        }
        free(room);
    }
    if (failed) {
        free(sums);
        return 1;
    }
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < size; i++) {
        float at_key = 0, at_value = 0;
        for (int thread = 0; thread < threads; thread++) {
            at_key += sums[(size_t)thread * 2 * size + i];
            at_value += sums[((size_t)thread * 2 + 1) * size + i];
        }
        dkey[i] = put(at_key);
        dvalue[i] = put(at_value);
    }
    free(sums);
    return 0;
}
