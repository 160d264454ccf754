/* The cache of plans. Each thread has its own, so that a lookup takes no lock and a call never waits for
 * another thread. */
#include "plan.h"

#include <string.h>

#include "kernel.h"

/* A model calls a few shapes over and over: every layer of a step has the same one. With more shapes than
 * entries in turn the cache still works, and a call makes its plan anew. */
enum { ENTRIES = 8 };

static _Thread_local struct {
    fkda_plan plan;
    bool used;
} cache[ENTRIES];
static _Thread_local unsigned next; /* the entry that is replaced next */

flash_kda_status fkda_find_plan(const fkda_shape *shape, const fkda_plan **plan)
{
    for (int i = 0; i < ENTRIES; i++)
        if (cache[i].used && memcmp(&cache[i].plan.shape, shape, sizeof *shape) == 0) {
            *plan = &cache[i].plan;
            return FLASH_KDA_OK;
        }
    const unsigned entry = next++ % ENTRIES;
    fkda_plan *made = &cache[entry].plan;
    cache[entry].used = false;
    memset(made, 0, sizeof *made);
    made->shape = *shape;
    const flash_kda_status status = shape->kernel->plan(made);
    cache[entry].used = status == FLASH_KDA_OK;
    *plan = made;
    return status;
}
