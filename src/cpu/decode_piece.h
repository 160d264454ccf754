/* A piece of work of decode and of apply on the CPU: value channels of one head of one sequence. decode.c
 * makes pieces of a call, and decode_head.h computes them. All indices in a piece are inside of the call's
 * tensors, also where another thread changes cu_seqlens, parents or other indices while the call runs. */
#ifndef FKDA_CPU_DECODE_PIECE_H
#define FKDA_CPU_DECODE_PIECE_H

#include "../problem.h"

enum {
    FKDA_DECODE_ROWS = 16, /* of V: pieces begin and end at multiples */
    FKDA_NO_PLACE = -1,
    /* States that are alive together while a tree is computed. A state waits for a token that continues from
     * it, so before token i there are at most 16 - i, and no more than i + 1: these are 8 at most. The state
     * after token i is one more. */
    FKDA_DECODE_PLACES = FLASH_KDA_MAX_DECODE_TOKENS / 2 + 1,
};

/* What becomes of the state at a token. */
typedef struct fkda_decode_step {
    int from;     /* the place of the state that the token continues from */
    int to;       /* the place for the state after the token, or FKDA_NO_PLACE: nothing needs it */
    int64_t slot; /* of problem.written, that takes the state after the token, or FKDA_NO_SLOT */
} fkda_decode_step;

typedef struct fkda_decode_piece {
    int64_t n, h;
    int v_begin, v_end;
    fkda_sequence sequence; /* 1 to 16 tokens */
    int64_t slot;           /* of the state that the sequence starts from, in place 0; or FKDA_NO_SLOT */
    int places;             /* that the steps use */
    fkda_decode_step steps[FLASH_KDA_MAX_DECODE_TOKENS];
} fkda_decode_piece;

typedef struct fkda_apply_piece {
    int64_t n, h;
    int v_begin, v_end;
    int64_t slot;
    int count; /* of tokens, 1 to 16 */
    int64_t tokens[FLASH_KDA_MAX_DECODE_TOKENS];
} fkda_apply_piece;

#endif
