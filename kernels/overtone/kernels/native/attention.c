/* out = softmax(scale q K^T) V for single tokens over a paged cache: nothing is gathered, padded or masked.

   The keys of a token are taken in blocks of at most BLOCK within a page, in parts of PART keys that begin at the sequence's
   own start, whatever else is in the step: a token's result does not depend on its neighbours. */
#include "vector.h"

#define BLOCK 16
#define PART 512

typedef struct {
  int64_t heads, kv_heads, dim, page_tokens;
  const float *cache; /* (slots, 2, kv_heads, dim) */
  float scale;
} Layer;

INLINE float dot(const float *a, const float *b, int64_t dim) {
  vec even = {0}, odd = {0};
  int64_t j = 0;
  for (; j + 2 * LANES <= dim; j += 2 * LANES) {
    even += load(a + j) * load(b + j);
    odd += load(a + j + LANES) * load(b + j + LANES);
  }
  for (; j < dim; j += LANES) even += load(a + j) * load(b + j);
  return sum(even + odd);
}

/* Running softmax over blocks of keys: out = sum of weights so far times values, under the largest score so far. */
typedef struct {
  float largest, total;
} Running;

INLINE void take(Running *state, float *out, const float *query, const float *keys, int64_t count, const Layer *layer) {
  const int64_t dim = layer->dim, stride = 2 * layer->kv_heads * dim;
  float scores[BLOCK], largest = state->largest;
  for (int64_t k = 0; k < count; k++) {
    scores[k] = dot(query, keys + k * stride, dim) * layer->scale;
    largest = scores[k] > largest ? scores[k] : largest;
  }
  for (int64_t k = count; k < BLOCK; k++) scores[k] = -__builtin_inff();
  for (int64_t k = 0; k < BLOCK; k += LANES) store(scores + k, exp_of(load(scores + k) - largest));
  const float fade = exp_of(all(state->largest - largest))[0];
  float total = state->total * fade;
  for (int64_t k = 0; k < count; k++) total += scores[k];
  *state = (Running){largest, total};
  const float *values = keys + layer->kv_heads * dim;
  for (int64_t j = 0; j < dim; j += LANES) {
    vec sums = load(out + j) * fade;
    for (int64_t k = 0; k < count; k++) sums += scores[k] * load(values + k * stride + j);
    store(out + j, sums);
  }
}

/* Keys [first, last) of one sequence for the query heads of one key head; out: (group, dim), not yet divided. */
static void attend_part(const Layer *layer, const float *query, int64_t kv_head, const int64_t *pages, int64_t first,
                        int64_t last, float *out, Running *states) {
  const int64_t dim = layer->dim, group = layer->heads / layer->kv_heads, size = layer->page_tokens;
  for (int64_t h = 0; h < group; h++) states[h] = (Running){-__builtin_inff(), 0};
  for (int64_t j = 0; j < group * dim; j++) out[j] = 0;
  for (int64_t at = first; at < last;) {
    const int64_t within = at % size, block = within % BLOCK;
    int64_t count = size - within < BLOCK - block ? size - within : BLOCK - block;
    count = last - at < count ? last - at : count;
    const float *keys = layer->cache + ((pages[at / size] * size + within) * 2 * layer->kv_heads + kv_head) * dim;
    for (int64_t h = 0; h < group; h++) take(states + h, out + h * dim, query + h * dim, keys, count, layer);
    at += count;
  }
}

/* Parts of one token and head, one after another, into the first. */
static void merge(const Layer *layer, int64_t parts, float *outs, Running *states, float *result) {
  const int64_t dim = layer->dim, group = layer->heads / layer->kv_heads;
  for (int64_t h = 0; h < group; h++) {
    float largest = -__builtin_inff(), total = 0;
    for (int64_t p = 0; p < parts; p++)
      largest = states[p * group + h].largest > largest ? states[p * group + h].largest : largest;
    for (int64_t j = 0; j < dim; j++) result[h * dim + j] = 0;
    for (int64_t p = 0; p < parts; p++) {
      const float weight = exp_of(all(states[p * group + h].largest - largest))[0];
      total += states[p * group + h].total * weight;
      for (int64_t j = 0; j < dim; j++) result[h * dim + j] += outs[(p * group + h) * dim + j] * weight;
    }
    for (int64_t j = 0; j < dim; j++) result[h * dim + j] /= total;
  }
}

/* One token after another.

   tokens: (m), which of the packed tokens; sequences: (m), row of `table`, its sequence's; first, last: (m), it sees the
   keys [first, last); table: (sequences, width), pages; query: (T, heads, dim), tokens ldq apart; out: (T, heads, dim);
   scratch: m * kv_heads * parts * group * (dim + 2) floats, parts = ceil(longest / PART) + 1. */
void attend_rows(int64_t m, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_tokens, float scale,
                 const int64_t *tokens, const int64_t *sequences, const int64_t *first, const int64_t *last,
                 const int64_t *table, int64_t width, int64_t parts, const float *query, int64_t ldq, const float *cache,
                 float *scratch, float *out) {
  const Layer layer = {heads, kv_heads, dim, page_tokens, cache, scale};
  const int64_t group = heads / kv_heads, units = m * kv_heads;
  Running *states = (Running *)(scratch + units * parts * group * dim);
#pragma omp parallel for schedule(dynamic)
  for (int64_t job = 0; job < units * parts; job++) {
    const int64_t unit = job / parts, row = unit / kv_heads, head = unit % kv_heads;
    const int64_t start = (first[row] / PART + job % parts) * PART;
    attend_part(&layer, query + tokens[row] * ldq + head * group * dim, head, table + sequences[row] * width,
                start < first[row] ? first[row] : start, start + PART < last[row] ? start + PART : last[row],
                scratch + job * group * dim, states + job * group);
  }
#pragma omp parallel for if (units * group * dim >= 4096)
  for (int64_t unit = 0; unit < units; unit++)
    merge(&layer, parts, scratch + unit * parts * group * dim, states + unit * parts * group,
          out + (tokens[unit / kv_heads] * heads + unit % kv_heads * group) * dim);
}

int64_t part_keys(void) { return PART; }
int64_t lanes(void) { return LANES; }
