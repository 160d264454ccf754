/* How the kernels cut a sequence into equal segments, for numbers of chunks up to the most that a call may
 * have. */
#include <initializer_list>
#include <stdio.h>

#include "instructions.h"

#include "../../kernels/hopper/schedule/cut.cuh"

static int failures;

static void check(bool good, const char *what, int segments, int chunks, int i)
{
    if (good || ++failures > 10) return;
    fprintf(stderr, "FAIL %s: segment %d of %d, %d chunks\n", what, i, segments, chunks);
}

static void check_cut(int segments, int chunks)
{
    const int shortest = chunks / segments;
    check(fkda::Cut::equal_begin_of(0, segments, chunks) == 0, "the first segment begins late", segments,
          chunks, 0);
    check(fkda::Cut::equal_begin_of(segments, segments, chunks) == chunks, "the last segment ends elsewhere",
          segments, chunks, segments - 1);
    for (int i = 0; i < segments; i++) {
        const int length = fkda::Cut::equal_begin_of(i + 1, segments, chunks) -
                           fkda::Cut::equal_begin_of(i, segments, chunks);
        check(length == shortest || length == shortest + 1, "a segment's length", segments, chunks, i);
    }
}

int main()
{
    const int most_chunks = INT32_MAX / FKDA_HOPPER_CHUNK_PAIR;
    for (int segments : {2, 3, 24, 46340, 46341, 46342, 48829, 100003, 2097151})
        for (int chunks :
             {segments, segments + 1, 2 * segments - 1, 33 * segments + segments / 2, most_chunks})
            check_cut(segments, chunks);
    if (failures) return fprintf(stderr, "%d failures\n", failures), 1;
    printf("ok: cuts into equal segments\n");
    return 0;
}
