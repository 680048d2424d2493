/* out = softmax(scale q K^T) V for single tokens over a paged cache: nothing is gathered, padded or masked.

   The keys of a token are taken in blocks of at most BLOCK within a page, in parts of PART keys that begin at the sequence's
   own start, whatever else is in the step: a token's result does not depend on its neighbours. */
#include "vector.h"
#include <omp.h>

#define BLOCK 16
#define PART 512

typedef struct {
  int64_t heads, kv_heads, dim, page_tokens;
  const float *cache; /* (slots, 2, kv_heads, dim) */
  float scale;
} Layer;

/* Running softmax over blocks of keys: out = sum of weights so far times values, under the largest score so far. */
typedef struct {
  float largest, total;
} Running;

/* q . k of LANES keys, `stride` apart; those from `count` on are the last one again. */
INLINE vec dots(const float *query, const float *keys, int64_t stride, int64_t count, int64_t dim) {
  const float *at[LANES];
  vec products[LANES];
#pragma GCC unroll 16
  for (int k = 0; k < LANES; k++) {
    at[k] = keys + (k < count ? k : count - 1) * stride;
    products[k] = (vec){0};
  }
  for (int64_t j = 0; j < dim; j += LANES) {
    const vec q = load(query + j);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) products[k] += q * load(at[k] + j);
  }
  transpose(products);
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) products[i] += products[i + width];
  return products[0];
}

INLINE float largest_of(vec x, float so_far) {
  float parts[LANES];
  store(parts, x);
  for (int i = 0; i < LANES; i++) so_far = parts[i] > so_far ? parts[i] : so_far;
  return so_far;
}

/* out = fade out + sum of weights times values, for `vectors` vectors of each: as many sums at once as hide each other's
   latency. */
INLINE void add_values(const int vectors, float fade, const float *weights, const float *values, int64_t stride, int64_t count,
                       float *out) {
  vec sums[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) sums[v] = fade * load(out + v * LANES);
  for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sums[v] += weights[k] * load(values + k * stride + v * LANES);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) store(out + v * LANES, sums[v]);
}

INLINE void take(Running *state, float *out, const float *query, const float *keys, int64_t count, const Layer *layer) {
  const int64_t dim = layer->dim, stride = 2 * layer->kv_heads * dim;
  vec scores[BLOCK / LANES];
  float weights[BLOCK], largest = state->largest;
#pragma GCC unroll 4
  for (int v = 0; v < BLOCK / LANES; v++) {
    const int64_t left = count - v * LANES;
    scores[v] = all(-__builtin_inff());
    if (left > 0) {
      const vec found = dots(query, keys + v * LANES * stride, stride, left, dim) * layer->scale;
      scores[v] = choose((ivec)((ivec)NUMBERS < (int32_t)left), found, scores[v]);
    }
    largest = largest_of(scores[v], largest);
  }
  vec total = {0};
#pragma GCC unroll 4
  for (int v = 0; v < BLOCK / LANES; v++) {
    const vec weight = exp_of(scores[v] - largest);
    total += weight;
    store(weights + v * LANES, weight);
  }
  const float fade = exp_of(all(state->largest - largest))[0];
  *state = (Running){largest, state->total * fade + sum(total)};
  const float *values = keys + layer->kv_heads * dim;
  int64_t j = 0;
  for (; j + 8 * LANES <= dim; j += 8 * LANES) add_values(8, fade, weights, values + j, stride, count, out + j);
  for (; j + 4 * LANES <= dim; j += 4 * LANES) add_values(4, fade, weights, values + j, stride, count, out + j);
  for (; j < dim; j += LANES) add_values(1, fade, weights, values + j, stride, count, out + j);
}

/* Keys [first, last) of one sequence for the query heads of key heads [from, to); out: (heads, dim), not yet divided. All heads
   of a block before the next block: what they read lies side by side. */
static void attend_part(const Layer *layer, const float *query, int64_t from, int64_t to, const int64_t *pages, int64_t first,
                        int64_t last, float *out, Running *states) {
  const int64_t dim = layer->dim, group = layer->heads / layer->kv_heads, size = layer->page_tokens;
  for (int64_t h = from * group; h < to * group; h++) states[h] = (Running){-__builtin_inff(), 0};
  for (int64_t j = from * group * dim; j < to * group * dim; j++) out[j] = 0;
  int64_t page = first / size, within = first % size;
  for (int64_t at = first; at < last;) {
    const int64_t block = BLOCK - within % BLOCK, left = size - within;
    int64_t count = left < block ? left : block;
    count = last - at < count ? last - at : count;
    const float *keys = layer->cache + (pages[page] * size + within) * 2 * layer->kv_heads * dim;
    for (int64_t h = from * group; h < to * group; h++)
      take(states + h, out + h * dim, query + h * dim, keys + h / group * dim, count, layer);
    at += count;
    within += count;
    if (within == size) {
      within = 0;
      page++;
    }
  }
}

/* The parts of one token, one after another. outs: (parts, heads, dim). */
static void merge(const Layer *layer, int64_t parts, const float *outs, const Running *states, float *result) {
  const int64_t dim = layer->dim, heads = layer->heads;
  for (int64_t h = 0; h < heads; h++) {
    float largest = -__builtin_inff(), total = 0;
    for (int64_t p = 0; p < parts; p++)
      largest = states[p * heads + h].largest > largest ? states[p * heads + h].largest : largest;
    for (int64_t j = 0; j < dim; j++) result[h * dim + j] = 0;
    for (int64_t p = 0; p < parts; p++) {
      const float weight = exp_of(all(states[p * heads + h].largest - largest))[0];
      total += states[p * heads + h].total * weight;
      for (int64_t j = 0; j < dim; j++) result[h * dim + j] += outs[(p * heads + h) * dim + j] * weight;
    }
    for (int64_t j = 0; j < dim; j++) result[h * dim + j] /= total;
  }
}

/* One token after another.

   tokens: (m), which of the packed tokens; sequences: (m), row of `table`, its sequence's; first, last: (m), it sees the
   keys [first, last); table: (sequences, width), pages; parts: of PART keys each, the most that [first, last) touches; query:
   (T, heads, dim), tokens ldq apart; out: (T, heads, dim); scratch: m * parts * heads * (dim + 2) floats. */
void attend_rows(int64_t m, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_tokens, float scale,
                 const int64_t *tokens, const int64_t *sequences, const int64_t *first, const int64_t *last,
                 const int64_t *table, int64_t width, int64_t parts, const float *query, int64_t ldq, const float *cache,
                 float *scratch, float *out) {
  const Layer layer = {heads, kv_heads, dim, page_tokens, cache, scale};
  const int64_t units = m * parts, slices = units < 2 * omp_get_max_threads() ? kv_heads : 1;
  Running *states = (Running *)(scratch + units * heads * dim);
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < units * slices; job++) {
    const int64_t unit = job / slices, row = unit / parts, slice = job % slices;
    const int64_t start = (first[row] / PART + unit % parts) * PART;
    attend_part(&layer, query + tokens[row] * ldq, slice * kv_heads / slices, (slice + 1) * kv_heads / slices,
                table + sequences[row] * width, start < first[row] ? first[row] : start,
                start + PART < last[row] ? start + PART : last[row], scratch + unit * heads * dim, states + unit * heads);
  }
#pragma omp parallel for if (units * heads * dim >= 65536)
  for (int64_t row = 0; row < m; row++)
    merge(&layer, parts, scratch + row * parts * heads * dim, states + row * parts * heads, out + tokens[row] * heads * dim);
}

int64_t part_keys(void) { return PART; }
int64_t lanes(void) { return LANES; }
