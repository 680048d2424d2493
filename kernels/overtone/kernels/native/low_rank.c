/* y[t] += U_t^T (D_t x[t]): the change of layers by the low-rank pairs of adapters, each row by that of its own, read where it lies. */
#include "vector.h"

#define TOGETHER 4 /* rows of one adapter that share what is read of its pair */
#define DEPTH 4    /* of the rank that is summed at once */
#define MAX_DEPTH 256 /* of the rank that is held at once */

/* D: (rank, q), U: (rank, p), contiguous. */
typedef struct {
  const float *down, *up;
  int64_t rank, unused;
} Pair;

typedef struct {
  int64_t p;
  const Pair *pairs; /* of adapter a: pairs[a * stride] */
  float *y;          /* rows ldy apart */
  int64_t ldy;
} Layer;

/* h[i][j] = D[j] . x[i], in one order for any number of rows. */
INLINE void shrink(const int rows, const int ranks, int64_t q, const float *down, const float *const *x, float (*h)[MAX_DEPTH]) {
  vec sums[TOGETHER][DEPTH];
  int64_t k = 0;
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < ranks; j++) sums[i][j] = (vec){0};
  for (; k + LANES <= q; k += LANES)
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
      const vec numbers = load(x[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < ranks; j++) sums[i][j] += numbers * load(down + j * q + k);
    }
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < ranks; j++) {
      float total = sum(sums[i][j]); /* what is left is spelled out, lest it becomes other instructions in one form than in another */
      for (int64_t end = k; end < q; end++) total = __builtin_fmaf(x[i][end], down[j * q + end], total);
      h[i][j] = total;
    }
}

/* y[i] += h[i] U. */
INLINE void expand(const int rows, int64_t ranks, int64_t p, const float *up, float (*h)[MAX_DEPTH], float *const *y) {
  int64_t k = 0;
  for (; k + 2 * LANES <= p; k += 2 * LANES) {
    vec sums[TOGETHER][2];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = (vec){0};
    for (int64_t j = 0; j < ranks; j++) {
      const vec low = load(up + j * p + k), high = load(up + j * p + k + LANES);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        sums[i][0] += h[i][j] * low;
        sums[i][1] += h[i][j] * high;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
      store(y[i] + k, load(y[i] + k) + sums[i][0]);
      store(y[i] + k + LANES, load(y[i] + k + LANES) + sums[i][1]);
    }
  }
  for (; k < p; k++)
    for (int i = 0; i < rows; i++) {
      float total = 0;
      for (int64_t j = 0; j < ranks; j++) total = __builtin_fmaf(h[i][j], up[j * p + k], total);
      y[i][k] += total;
    }
}

INLINE void add_rows(const int rows, const Pair *pair, int64_t p, int64_t q, const float *const *x, float *const *y) {
  float h[TOGETHER][MAX_DEPTH];
  for (int64_t first = 0; first < pair->rank; first += MAX_DEPTH) {
    const int64_t ranks = pair->rank - first < MAX_DEPTH ? pair->rank - first : MAX_DEPTH;
    const float *down = pair->down + first * q;
    int64_t j = 0;
    for (; j + DEPTH <= ranks; j += DEPTH) shrink(rows, DEPTH, q, down + j * q, x, (float (*)[MAX_DEPTH])(h[0] + j));
    for (; j < ranks; j++) shrink(rows, 1, q, down + j * q, x, (float (*)[MAX_DEPTH])(h[0] + j));
    expand(rows, ranks, p, pair->up + first * p, h, y);
  }
}

/* x: rows ldx apart; rows: (m), which of x's and y's each row is, NULL: 0, 1, ...; owners: (m), the adapter of each, -1: none. */
void add_low_rank(int64_t m, int64_t q, const float *x, int64_t ldx, const int64_t *rows, const int64_t *owners, int64_t stride,
                  int64_t count, const Layer *layers) {
  const int64_t blocks = (m + TOGETHER - 1) / TOGETHER, tasks = blocks * count;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
  for (int64_t task = 0; task < tasks; task++) {
    const Layer *layer = layers + task % count;
    const int64_t stop = (task / count + 1) * TOGETHER < m ? (task / count + 1) * TOGETHER : m;
    for (int64_t row = task / count * TOGETHER; row < stop;) {
      const int64_t owner = owners[row];
      int64_t same = 0;
      const float *from[TOGETHER];
      float *to[TOGETHER];
      for (; row < stop && owners[row] == owner; row++, same++) {
        const int64_t at = rows ? rows[row] : row;
        from[same] = x + at * ldx;
        to[same] = layer->y + at * layer->ldy;
      }
      if (owner < 0) continue;
      const Pair *pair = layer->pairs + owner * stride;
      if (same == TOGETHER) add_rows(TOGETHER, pair, layer->p, q, from, to);
      else
        for (int64_t i = 0; i < same; i++) add_rows(1, pair, layer->p, q, from + i, to + i);
    }
  }
}
