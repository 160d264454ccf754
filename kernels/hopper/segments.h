/*
 * Long sequences cut into segments that are walked through in parallel: what the host and the kernels share. How it works is in
 * docs/segments.md.
 *
 * A sequence of at least two times `shortest` tokens is cut into as many segments as that fits in. A first pass takes the first
 * segment from the sequence's initial state to its outputs and the state S after it, and finds of each other segment but the
 * last
 *
 *   its state  what it makes of a state of zeros, and
 *   its map    what it makes of rows of the identity if its values are zeros: S^T becomes S^T map + state.
 *
 * With these the join finds the state that each segment starts from, and a second pass the outputs of all but the first. Each segment
 * of a cut sequence has a slot for a state and a map; the state after a segment is in the slot of the next one.
 */
#ifndef FKDA_HOPPER_SEGMENTS_H
#define FKDA_HOPPER_SEGMENTS_H

/* What a block walks through at once: all of a sequence or a segment of it, for every head. */
typedef struct fkda_segment {
    long long begin; /* first token, counted over the whole tensor */
    int length;      /* in tokens */
    int sequence;
    int slot; /* of a segment; negative for a sequence that is not cut */
    int kind; /* FKDA_SEGMENT_... */
} fkda_segment;

enum {
    FKDA_SEGMENT_FIRST = 1, /* of its sequence */
    FKDA_SEGMENT_LAST = 2,
};

typedef struct fkda_cut_sequence {
    int sequence;
    int segments; /* at least two */
    int first_slot;
    int first_group; /* of its maps, if there are more than FKDA_MAPS_CHAINED of them */
} fkda_cut_sequence;

enum {
    FKDA_MAPS_CHAINED = 24, /* more maps of a sequence than these are joined in groups, */
    FKDA_GROUP_MAPS = 8,    /* so many to a group */
};

/* The counts that the kernels find on the device. */
typedef struct fkda_cut_counts {
    int inner_segments, later_segments; /* in the lists */
    int cut_sequences;
} fkda_cut_counts;

/* Flags, one to 16 rows: a segment's map is there, the state in its slot as the first pass left it, and as the join did. */
enum { FKDA_FLAG_MAP = 0, FKDA_FLAG_STATE = 8, FKDA_FLAG_JOINED = 16, FKDA_SLOT_FLAGS = 24 };

enum { FKDA_SHARED_SEGMENTS = 2 };

/* Where all segments are done in one launch (at_once.cuh): how sequences of so many chunks of 32 tokens are cut, and what pairs of blocks
 * have. Where the length on the device is another, it is cut into equal parts, at most inner + 2 of them. */
typedef struct fkda_at_once {
    int chunks, segments;
    int inner; /* segments that have a pair for each head. Pairs are, in this order: for each head one for the first segment, and these; */
    struct {   /* for the segments after these, if there are any, pairs that have several heads each; */
        int heads, pairs; /* at most so many to a pair; for all heads */
    } shared[FKDA_SHARED_SEGMENTS];
    int needed, spares;               /* so many so far, and as many besides */
    int begin[FKDA_MAPS_CHAINED + 3]; /* the first chunk of each segment, and the end */
} fkda_at_once;

/* In the workspace. A null `counts` says that sequences are not cut. */
typedef struct fkda_cut {
    fkda_cut_counts *counts;
    fkda_segment *inner; /* all but the first and the last of cut sequences */
    fkda_segment *later; /* all but the first, and sequences that are not cut */
    fkda_cut_sequence *cut_sequences;
    float *states, *maps; /* [slot][head][128][128], in the forms of map.cuh, which are as large; so are */
    float *composed;      /* [group][head][128][128]: the maps of a group, one after the other */
    int *flags;           /* [slot][head][FKDA_SLOT_FLAGS]: where all segments are done in one launch */
    int shortest;         /* tokens */
    int slots;            /* that there are */
    int alike; /* all sequences have the same length, or there is one: there is no plan, nor are there its lists */
    int segments;         /* then: of each, if the host knows; else 0 */
    fkda_at_once at_once; /* zeros in several launches */
} fkda_cut;

/* Sequences of different lengths in one launch (mixture.cuh): how many pairs of blocks it has, and how many sequences of `shortest` tokens
 * or more are long, which have pairs of their own and may be cut: the first ones. */
typedef struct fkda_mixture {
    int pairs; /* 0: there is no such launch */
    int most_long;
    int cutting; /* what cutting a sequence takes besides the two passes, in chunks */
} fkda_mixture;

#endif
