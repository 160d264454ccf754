/*
 * Long sequences cut into segments that are computed in parallel: the structs that the host and the kernels
 * share. docs/segments.md explains the algorithm.
 *
 * A segment is a run of chunks of one sequence. A segment maps the state before it to the state after it
 * affinely: S_after = M S_before + B. M is the segment's map [K, K]; B is the state that the segment makes of
 * zeros.
 *
 * Each segment of a cut sequence has a place in the workspace, its segment slot, for one state and one map.
 * The slot of segment i holds the state before segment i and the map of segment i. Nobody reads the state or
 * the map of slot 0; a relay uses flags of slot 0 (schedule/relay.cuh).
 */
#ifndef FKDA_HOPPER_SEGMENTS_H
#define FKDA_HOPPER_SEGMENTS_H

/* A whole sequence or one segment of a sequence; a CTA computes it for every head. */
typedef struct fkda_segment {
    long long begin; /* first token, counted over the whole tensor */
    int length;      /* tokens */
    int sequence;
    int slot;     /* of a segment; negative for a sequence that is not cut */
    int position; /* FKDA_SEGMENT_FIRST, FKDA_SEGMENT_LAST, both for a whole sequence, or 0 in between */
} fkda_segment;

enum {
    FKDA_SEGMENT_FIRST = 1, /* starts from the caller's initial state */
    FKDA_SEGMENT_LAST = 2,  /* ends in the caller's final state */
};

typedef struct fkda_cut_sequence {
    int sequence;
    int segments;    /* at least two */
    int first_slot;  /* of the first segment */
    int first_group; /* of the sequence's maps, if there are more than FKDA_MAPS_CHAINED of them */
} fkda_cut_sequence;

enum {
    FKDA_MAPS_CHAINED =
        24, /* up to this many maps of a sequence are joined one after the other; more in groups */
    FKDA_GROUP_MAPS = 8, /* maps of a group */
};

/* Lengths of the lists that the kernel fkda_hopper_list writes. */
typedef struct fkda_list_counts {
    int inner_segments, later_segments;
    int cut_sequences;
} fkda_list_counts;

/* Flags in the workspace with which CTAs of one launch wait for each other. Each flag is for 16 rows, 16 r to
 * 16 r + 15, of the slot of segment i:
 *   FKDA_FLAG_MAP + r     the rows of the map of segment i are written
 *   FKDA_FLAG_STATE + r   the slot's state has what the join starts from: the rows of B of segment i - 1, or
 *                         of the state after the first segment if i is 1
 *                         (in slot 0 of a relay: the rows of the initial state are read)
 *   FKDA_FLAG_JOINED + r  the slot's state has what the join makes: the rows of the state before segment i */
enum { FKDA_FLAG_MAP = 0, FKDA_FLAG_STATE = 8, FKDA_FLAG_JOINED = 16, FKDA_SLOT_FLAGS = 24 };

enum { FKDA_RELAY_SHARED = 2 }; /* inner segments of a head that CTA pairs may share, at most */

/* The relay schedule (schedule/relay.cuh): how sequences of `chunks` chunks are cut, and what each CTA pair
 * is for. A sequence that turns out on the device to have another length is cut into equal segments, at most
 * inner + 2 of them. */
typedef struct fkda_relay {
    int chunks; /* of 32 tokens, of each sequence */
    int segments;
    /* CTA pairs are numbered in this order: for each head one pair for the first segment and `inner` pairs
     * for one inner segment each; then for each shared[i], if its `heads` is not 0, `pairs` pairs that have
     * the same inner segment of up to `heads` heads each; then the spare pairs, which compute outputs of
     * first segments. */
    int inner;
    struct {
        int heads, pairs;
    } shared[FKDA_RELAY_SHARED];
    int needed_pairs;                       /* all pairs but the spare ones */
    int spare_pairs;                        /* 0: the pair of a first segment computes its outputs */
    int first_chunk[FKDA_MAPS_CHAINED + 3]; /* of each segment, and the end of the last */
} fkda_relay;

/* Pointers into the workspace. `counts` is null where sequences are not cut. */
typedef struct fkda_cut {
    fkda_list_counts *counts;
    fkda_segment *inner; /* list: all segments but the first and the last of each cut sequence */
    fkda_segment *later; /* list: all segments but the first, then the sequences that are not cut */
    fkda_cut_sequence *cut_sequences;
    float *states;     /* [slot][head][128][128], in the layout StateImage of join/layouts.cuh */
    float *maps;       /* [slot][head][128][128], in the layout MapImage of join/layouts.cuh */
    float *composed;   /* [group][head][128][128], a MapImage: the product of a group's maps */
    int *flags;        /* [slot][head][FKDA_SLOT_FLAGS]; only the relay and the mixed schedule have them */
    int shortest;      /* a sequence of n tokens is cut into n / shortest segments, unless: */
    /* Later segments begin at 2, 3, 4, ... times `shortest` tokens, and maps have no groups. */
    int in_steps;
    int slots, groups; /* of the workspace: segment slots, and map groups */
    int equal_lengths; /* all sequences have one length, or there is one: no lists are needed */
    int segments;      /* of each sequence if equal_lengths and the host knows the length; else 0 */
    fkda_relay relay;  /* zeros for other schedules */
} fkda_cut;

/* The mixed schedule (schedule/mixed.cuh): sequences of different lengths in one launch. */
typedef struct fkda_mixed {
    int pairs; /* CTA pairs of the launch; 0: another schedule runs */
    /* Of the sequences with `shortest` tokens or more, only the first `most_long` are treated as long. */
    int most_long;
    int cutting_chunks; /* chunks that cutting a sequence costs besides its map phase and output phase */
} fkda_mixed;

#endif
