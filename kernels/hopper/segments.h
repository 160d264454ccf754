/*
 * Long sequences cut into segments that are walked through in parallel: what the host and the kernels share. How it works is in
 * docs/segments.md.
 *
 * A sequence of at least two times `shortest` tokens is cut into as many segments as that fits in. Segment 0 starts from the
 * sequence's initial state; the state S that another one starts from is what the join makes of
 *
 *   states  the state after a segment that starts from zeros (the first: from the initial state), and
 *   maps    what becomes of rows of the identity in a segment without values: S^T -> S^T map + state
 *
 * Each segment of a cut sequence has a slot in both; the state at the end of a segment is in the slot of the next one.
 */
#ifndef FKDA_HOPPER_SEGMENTS_H
#define FKDA_HOPPER_SEGMENTS_H

/* What a block walks through at once: all of a sequence or a segment of it, for every head. */
typedef struct fkda_segment {
    long long begin;  /* first token, counted over the whole tensor */
    int length;       /* in tokens */
    int sequence;
    int slot;         /* of a segment; negative for a sequence that is not cut */
    int kind;         /* FKDA_SEGMENT_... */
} fkda_segment;

enum {
    FKDA_SEGMENT_FIRST = 1, /* of its sequence */
    FKDA_SEGMENT_LAST = 2,
    FKDA_SEGMENT_MAP = 4, /* its map is wanted, not its state */
};

typedef struct fkda_cut_sequence {
    int sequence;
    int segments;    /* at least two */
    int first_slot;
    int first_group; /* of its maps, if there are more than FKDA_MAPS_CHAINED of them */
} fkda_cut_sequence;

enum {
    FKDA_MAPS_CHAINED = 24, /* more maps of a sequence than these are joined in groups, */
    FKDA_GROUP_MAPS = 12,   /* so many to a group */
};

/* The counts that the kernels find on the device. */
typedef struct fkda_cut_counts {
    int drawn[2];      /* numbers of pieces that blocks have drawn in the first and in the last pass */
    int segments[2];   /* in the lists of both passes */
    int cut_sequences;
    int unused[11];
} fkda_cut_counts;

/* In the workspace. A null `counts` says that sequences are not cut. */
typedef struct fkda_cut {
    fkda_cut_counts *counts;
    fkda_segment *lists[2]; /* of the pass that finds states and maps, and of the one that finds outputs: longest first */
    fkda_cut_sequence *cut_sequences;
    float *states, *maps; /* [slot][head][128][128] */
    float *composed;      /* [group][head][128][128]: the maps of a group, one after the other */
    int shortest;         /* tokens; a multiple of 16 */
    int slots;            /* that there are */
} fkda_cut;

#endif
