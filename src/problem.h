/*
 * A call after its arguments were checked. Everything below check.c takes these structs. Pointers, shapes,
 * strides, dtypes and numbers in them are known to be right, so no backend checks them again.
 *
 * The values in tensors of integers (cu_seqlens, state_indices, ...) are another matter. On the CPU they were
 * checked, and another thread may have changed them since. On a GPU nobody has read them. So whoever reads
 * such a value brings it into its range, as fkda_sequence_at() does.
 */
#ifndef FKDA_PROBLEM_H
#define FKDA_PROBLEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "flash_kda.h"

enum { FKDA_DIM = 128 }; /* K and V */

typedef struct fkda_kernel fkda_kernel;

/* What a call asks for beyond the plainest one. A kernel has the set of features that it knows (kernel.h). */
typedef enum fkda_feature {
    FKDA_STRIDES = 1 << 0,      /* a tensor is not contiguous */
    FKDA_POOL = 1 << 1,         /* state_indices or has_initial_state is given */
    FKDA_CHECKPOINTS = 1 << 2,  /* checkpoint_states is given */
    FKDA_GROUPED = 1 << 3,      /* HV > H */
    FKDA_SOFTPLUS = 1 << 4,     /* the gate is softplus */
    FKDA_ACTIVATED = 1 << 5,    /* the gate is activated */
    FKDA_NO_PARAMETER = 1 << 6, /* A_log or dt_bias is absent */
    FKDA_FP32_GATES = 1 << 7,   /* g is in fp32 */
    FKDA_BETA_KIND = 1 << 8,    /* the write strength is not the sigmoid of beta */
    FKDA_NORMALISED = 1 << 9,   /* q and k are used as they are */
    FKDA_K_FIRST = 1 << 10,     /* states are [.., K, V] */
    FKDA_FP32_BETA = 1 << 11,   /* beta is in fp32 */
    /* The features above: all of the forward pass but FKDA_SAVED. */
    FKDA_ALL_FEATURES = (1 << 12) - 1,
    FKDA_DECODE = 1 << 12,       /* flash_kda_decode() and flash_kda_apply() */
    FKDA_DECODE_LAYER = 1 << 13, /* flash_kda_decode_layer() */
    FKDA_BACKWARD = 1 << 14,     /* flash_kda_bwd() */
    FKDA_SAVED = 1 << 15,        /* the forward pass writes `saved`, or the backward pass reads it */
    FKDA_MAPS = 1 << 16,         /* flash_kda_map() and flash_kda_join() */
} fkda_feature;

/* Everything that decides what a call runs: shapes, options and the device, but no pointer. A plan is made
 * from a shape alone, and two calls with equal shapes have equal plans. Compared byte by byte, so a shape is
 * zeroed before it is filled in. */
typedef struct fkda_shape {
    const fkda_kernel *kernel;
    flash_kda_device device;
    int64_t batch;      /* B */
    int64_t tokens;     /* T, of one batch row */
    int64_t heads;      /* HV, of v, g, beta, out and the states */
    int64_t qk_heads;   /* H, of q and k; it divides HV */
    int64_t sequences;  /* N */
    int64_t max_seqlen; /* tokens of the longest sequence; 0: not known */
    int32_t threads;    /* of the CPU backend, at least 1; 0 on a GPU */
    int32_t cut;        /* flash_kda_cut */
    int32_t batch_invariant;
    int32_t has_cu_seqlens;
    int32_t kernel_is_asked_for; /* by its name; else it is the device's default */
    int32_t features;            /* of fkda_feature, except FKDA_STRIDES, which changes no plan */
} fkda_shape;

/* Whether all sequences have the length T: the host then knows every length. A single sequence counts too,
 * though its length on the device may be shorter than T. */
static inline bool fkda_equal_lengths(const fkda_shape *s)
{
    return s->sequences == s->batch;
}

/* A tensor [B, T, H, 128], or [B, T, H] for beta, of which the elements of a row of 128 are neighbours.
 * Strides count elements. */
typedef struct fkda_token_view {
    void *data;
    int64_t batch_stride, token_stride, head_stride;
    int64_t heads;
    int32_t dtype; /* flash_kda_dtype */
} fkda_token_view;

/* A tensor [N, HV, V, K] of states, or [slots, HV, V, K] or [rows, HV, V, K]. The states of all heads of a
 * slot are contiguous. `data` is NULL if the tensor is absent. */
typedef struct fkda_state_view {
    void *data;
    int64_t slots;
    int64_t slot_stride, head_stride;
    int64_t heads;
    int32_t dtype; /* flash_kda_dtype */
} fkda_state_view;

/* A tensor of integers. `data` is NULL if the tensor is absent. */
typedef struct fkda_index_view {
    const void *data;
    bool is_i32; /* else int64 */
} fkda_index_view;

/* States from inside sequences that the call writes; flash_kda.h says which and where. */
typedef struct fkda_checkpoints {
    bool wanted;            /* false: there are none, and the rest means nothing */
    fkda_state_view states; /* its slots are called rows */
    fkda_index_view offsets, indices;
    int64_t columns; /* C: offsets of a sequence */
    fkda_index_view starts;
    int64_t every; /* tokens, or 0: `offsets` says where */
} fkda_checkpoints;

typedef struct fkda_problem {
    fkda_shape shape;
    void *stream;
    fkda_token_view q, k, v, g, beta, out;
    int32_t gate, beta_kind; /* flash_kda_gate, flash_kda_beta */
    const float *A_log;      /* [HV], or NULL: zeros */
    const float *dt_bias;    /* [HV, K], or NULL: zeros */
    bool qk_is_normalised;   /* q and k are used as they are */
    bool state_k_first;      /* states are [.., K, V] */
    fkda_state_view initial_state, final_state;
    fkda_index_view state_indices;    /* [N]; absent: sequence n has slot n */
    const uint8_t *has_initial_state; /* [N], or NULL: all have one */
    int64_t first_slot;
    fkda_checkpoints checkpoints;
    const void *cu_seqlens; /* [N + 1], or NULL */
    bool cu_seqlens_is_i32; /* else int64 */
    float scale, lower_bound;
    void *workspace;
    size_t workspace_size;             /* bytes */
    void *saved;                       /* what the backward pass reads, or NULL */
    size_t saved_size;                 /* bytes */
    const volatile int32_t *interrupt; /* or NULL */
    flash_kda_nonfinite *nonfinite;    /* [FLASH_KDA_CHECKED_TENSORS], or NULL: nothing is counted */
} fkda_problem;

/* Whether the caller, who gave the address or NULL, wants the call to stop. */
static inline bool fkda_is_interrupt(const volatile int32_t *interrupt)
{
    return interrupt && __atomic_load_n(interrupt, __ATOMIC_RELAXED) != 0;
}

/* The CPU backend asks at every chunk. */
static inline bool fkda_interrupted(const fkda_problem *p)
{
    return fkda_is_interrupt(p->interrupt);
}

/* Where a sequence is: tokens `begin` to `end` - 1 of a batch row. */
typedef struct fkda_sequence {
    int64_t row, begin, end;
} fkda_sequence;

/* cu_seqlens[n], for a cu_seqlens that the host may read. Another thread may write to the tensor meanwhile,
 * so two calls may return different values: the caller reads a border once and uses that value. */
static inline int64_t fkda_border(const fkda_problem *p, int64_t n)
{
    if (p->cu_seqlens_is_i32) return __atomic_load_n((const int32_t *)p->cu_seqlens + n, __ATOMIC_RELAXED);
    return __atomic_load_n((const int64_t *)p->cu_seqlens + n, __ATOMIC_RELAXED);
}

static inline int64_t fkda_clamp(int64_t x, int64_t least, int64_t most)
{
    return x < least ? least : x > most ? most : x;
}

/* Sequence n, for a cu_seqlens that the host may read. The check has seen right values. If they have changed
 * since, the sequence is a wrong one and still lies inside the tensors. */
static inline fkda_sequence fkda_sequence_at(const fkda_problem *p, int64_t n)
{
    if (!p->cu_seqlens) return (fkda_sequence){n, 0, p->shape.tokens};
    const int64_t begin = fkda_clamp(fkda_border(p, n), 0, p->shape.tokens);
    return (fkda_sequence){0, begin, fkda_clamp(fkda_border(p, n + 1), begin, p->shape.tokens)};
}

/* The element offset of a token's row of one head, and of a sequence's state of one head. */
static inline int64_t fkda_row_offset(const fkda_token_view *t, int64_t row, int64_t token, int64_t head)
{
    return row * t->batch_stride + token * t->token_stride + head * t->head_stride;
}

static inline int64_t fkda_state_offset(const fkda_state_view *s, int64_t slot, int64_t head)
{
    return slot * s->slot_stride + head * s->head_stride;
}

/* Element i, for a tensor that the host may read. Another thread may write to the tensor meanwhile. */
static inline int64_t fkda_index_at(const fkda_index_view *t, int64_t i)
{
    if (t->is_i32) return __atomic_load_n((const int32_t *)t->data + i, __ATOMIC_RELAXED);
    return __atomic_load_n((const int64_t *)t->data + i, __ATOMIC_RELAXED);
}

enum { FKDA_NO_SLOT = -1 };

/* The slot where the state of sequence n is, or FKDA_NO_SLOT: the sequence starts from zeros, or its final
 * state is not written. For tensors that the host may read. */
static inline int64_t fkda_slot_of(const fkda_problem *p, const fkda_state_view *states, int64_t n)
{
    int64_t slot = n;
    if (!states->data) return FKDA_NO_SLOT;
    if (states == &p->initial_state && p->has_initial_state && !p->has_initial_state[n]) return FKDA_NO_SLOT;
    if (p->state_indices.data) slot = fkda_index_at(&p->state_indices, n);
    if (p->state_indices.data && slot < p->first_slot) return FKDA_NO_SLOT;
    return slot < 0 || slot >= states->slots ? FKDA_NO_SLOT : slot;
}

/* The value head's head of q and k. */
static inline int64_t fkda_qk_head(const fkda_shape *s, int64_t head)
{
    return head / (s->heads / s->qk_heads);
}

#endif
