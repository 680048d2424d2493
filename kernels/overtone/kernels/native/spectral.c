/* y[t] += F^-1 K_t (F x[t]): the change of layers by the sparse spectra of adapters, each row by that of its own. Between the
   transforms the rows stay in lanes, and nothing leaves the processor's cache but y. */
#include "lanes.h"
#include "sparse.h"
#include <omp.h>
#include <stdlib.h>

/* One layer: y[t] by the core cores[owner of t * stride]. */
typedef struct {
  const Plan *plan; /* of the transform of p numbers */
  const Core *cores;
  float *y; /* rows ldy apart */
  int64_t ldy;
} Layer;

/* What all layers of a call share. */
typedef struct {
  int64_t m, stride, count; /* rows; cores from one adapter to the next; layers */
  const int64_t *rows;      /* which of x's and y's each row is, NULL: 0, 1, ... */
  const int64_t *owners;    /* the adapter of each row, -1: none */
  const vec *z;             /* F x: (ceil(m / LANES), q) vectors */
  int64_t q;                /* coefficients of x's spectrum */
  const Layer *layers;
} Batch;

INLINE const Core *core_of(const Batch *batch, const Layer *layer, int64_t row) {
  return row < batch->m && batch->owners[row] >= 0 ? layer->cores + batch->owners[row] * batch->stride : &none;
}

/* Several lanes by one core; the others stay. */
static void apply_some(const Core *core, const Core *next, ivec lanes, const vec *z, vec *u) {
#define ENTRY(e) u[core->rows[e]] = choose(lanes, u[core->rows[e]] + core->values[e] * z[core->cols[e]], u[core->rows[e]])
  FOR_ENTRIES(core, next, ENTRY);
#undef ENTRY
}

static void apply_all(const Core *core, const Core *next, const vec *z, vec *u) {
#define ENTRY(e) u[core->rows[e]] += core->values[e] * z[core->cols[e]]
  FOR_ENTRIES(core, next, ENTRY);
#undef ENTRY
}

/* u = K_t z[t] of LANES rows from `first` on; next: a core that this thread may read afterwards. Returns which rows have a core. */
static int apply(const Batch *batch, const Layer *layer, int64_t first, const Core *next, vec *u) {
  const vec *z = batch->z + first / LANES * batch->q;
  const Core *cores[LANES];
  int live = 0;
  for (int i = 0; i < LANES; i++) {
    cores[i] = core_of(batch, layer, first + i);
    if (cores[i]->entries) live |= 1 << i;
  }
  if (!live) return 0;
  __builtin_memset(u, 0, (size_t)layer->plan->coefficients * sizeof(vec));
  for (int left = live; left;) {
    const int lane = __builtin_ctz(left);
    ivec same;
    int users = 0;
    for (int i = 0; i < LANES; i++) {
      same[i] = -(cores[i] == cores[lane]);
      if (same[i]) users |= 1 << i;
    }
    left &= ~users;
    const Core *core = cores[lane], *after = left ? cores[__builtin_ctz(left)] : next;
    if (users == (1 << LANES) - 1) apply_all(core, after, z, u);
    else if (users == 1 << lane) apply_row(LANES, core, after, (const float *)z + lane, (float *)u + lane);
    else apply_some(core, after, same, z, u);
  }
  return live;
}

/* Task number `task`: LANES rows of one layer. */
static void add_rows(const Batch *batch, int64_t task, int64_t threads, cvec *work) {
  const Layer *layer = batch->layers + task % batch->count;
  const int64_t first = task / batch->count * LANES, then = task + threads;
  vec *u = numbers_in(work, layer->plan->n);
  const Core *next = core_of(batch, batch->layers + then % batch->count, then / batch->count * LANES);
  const int live = apply(batch, layer, first, next, u);
  if (!live) return;
  float *to[LANES];
  for (int64_t i = 0; i < LANES; i++)
    to[i] = live >> i & 1 ? layer->y + (batch->rows ? batch->rows[first + i] : first + i) * layer->ldy : NULL;
  scatter_result(layer->plan, 1, backward(layer->plan, u, work), to);
}

/* plan: of x's rows, ldx apart; z: (ceil(m / LANES), coefficients) vectors, F x if `known`, else it becomes that. Returns 0 if memory
   is short. */
int add_spectral(int64_t m, const Plan *plan, const float *x, int64_t ldx, const int64_t *rows, float *z, int64_t known,
                 const int64_t *owners, int64_t stride, int64_t count, const Layer *layers) {
  const Batch batch = {m, stride, count, rows, owners, (const vec *)z, plan->coefficients, layers};
  const int64_t blocks = (m + LANES - 1) / LANES, tasks = blocks * count;
  int64_t largest = plan->n;
  for (int64_t i = 0; i < count; i++) largest = layers[i].plan->n > largest ? layers[i].plan->n : largest;
  int done = 1;
#pragma omp parallel if (tasks > 1) reduction(&& : done)
  {
    cvec *work = allocate(largest);
    done = work != NULL;
    if (!known) {
#pragma omp for schedule(dynamic)
      for (int64_t block = 0; block < blocks; block++) {
        const float *from[LANES];
        for (int64_t i = 0, row = block * LANES; i < LANES; i++, row++)
          from[i] = row < m ? x + (rows ? rows[row] : row) * ldx : NULL;
        if (work) forward(plan, from, (vec *)z + block * plan->coefficients, work);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++)
      if (work) add_rows(&batch, task, omp_get_num_threads(), work);
    free(work);
  }
  return done;
}
