/*
 * flash_kda: Kimi Delta Attention (KDA) on CPUs and NVIDIA GPUs: forward pass, backward pass and decode.
 *
 * KDA is a linear attention with a forget gate per channel and the delta rule. Each head of each sequence
 * keeps a state S of K x V numbers. For every token t, in order:
 *
 *     g_t      = lower_bound * sigmoid(exp(A_log) * (g + dt_bias))      log decay, one per channel
 *     q_t, k_t = q / sqrt(sum(q^2) + 1e-6),  k / sqrt(sum(k^2) + 1e-6)  over the K channels
 *     b_t      = sigmoid(beta)
 *     S        = diag(exp(g_t)) S                                       forget
 *     u_t      = b_t (v_t - S^T k_t)                                    what the state did not predict
 *     S        = S + k_t u_t^T                                          write
 *     o_t      = scale S^T q_t                                          read
 *
 * (Kimi Linear, arXiv:2510.26692; the gate bounded from below is the "safe gate" of flash-linear-attention.)
 * Everything this library computes is held to that recurrence in fp64, which is exported as
 * flash_kda_reference().
 *
 * Conventions
 *   B batch rows, T tokens a row, H heads of q and k, HV heads of v, K = V = 128 channels, N sequences.
 *   Shapes are written outermost first; strides count elements, not bytes.
 *   Every call returns a flash_kda_status. On anything but FLASH_KDA_OK flash_kda_last_error() has a sentence
 *   for the calling thread, and nothing was launched and nothing was written, unless the sentence says that
 *   results are undefined: then the driver failed after some launches of the call, or the caller interrupted
 *   it.
 *   All functions may be called from any thread at any time. pthread_cancel() never ends a thread inside
 *   one: flash_kda_fwd(), flash_kda_bwd(), flash_kda_map(), flash_kda_join(), flash_kda_decode(),
 *   flash_kda_apply() and the references are cancellation points when their work is done, and the others
 *   are none. A signal handler must not leave a call by longjmp().
 *   Signal handlers run on the caller's threads alone. The floating-point settings of the calling thread
 *   (rounding, unmasked exceptions, flushing of tiny numbers) change no result, and are as before afterwards,
 *   the exception flags included.
 */
#ifndef FLASH_KDA_H
#define FLASH_KDA_H

#include <stddef.h>
#include <stdint.h>

#define FLASH_KDA_VERSION_MAJOR 0
#define FLASH_KDA_VERSION_MINOR 1
#define FLASH_KDA_VERSION_PATCH 0

#if defined(FLASH_KDA_BUILD)
#define FLASH_KDA_API __attribute__((visibility("default")))
#else
#define FLASH_KDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flash_kda_status {
    FLASH_KDA_OK = 0,
    FLASH_KDA_INVALID_VALUE = 1, /* an argument is null, out of range, misaligned, of a wrong shape */
    FLASH_KDA_INVALID_DTYPE = 2, /* an argument has a data type that the call does not take */
    FLASH_KDA_UNAVAILABLE = 3,   /* no such device, no driver, or no kernel for the device */
    FLASH_KDA_DEVICE_ERROR = 4,  /* the CUDA driver reported an error, or the CPU has no memory left */
    FLASH_KDA_INTERRUPTED = 5,   /* the caller asked a call on the CPU to stop: see "interrupt" */
} flash_kda_status;

/* Element types. The forward pass takes the first four and FLASH_KDA_BOOL; the rest let an error name what it
 * got. */
typedef enum flash_kda_dtype {
    FLASH_KDA_BF16 = 1,
    FLASH_KDA_F32 = 2,
    FLASH_KDA_I32 = 3,
    FLASH_KDA_I64 = 4,
    FLASH_KDA_F16 = 5,
    FLASH_KDA_F64 = 6,
    FLASH_KDA_OTHER = 7,
    FLASH_KDA_BOOL = 8, /* a byte: 0 is false */
} flash_kda_dtype;

typedef enum flash_kda_device_type {
    FLASH_KDA_CPU = 0,
    FLASH_KDA_CUDA = 1,
} flash_kda_device_type;

/* How flash_kda_fwd() may cut sequences into segments that are computed in parallel. Only the kernel "hopper"
 * cuts, so other kernels take every value and do the same for each. With FLASH_KDA_CUT_ALWAYS segments are so
 * long that each CTA pair of the GPU has about one segment of one head, and have at least 128 tokens on
 * average; a sequence without room for two stays whole. */
typedef enum flash_kda_cut {
    FLASH_KDA_CUT_AUTO = 0,   /* where it pays, in the way that pays most */
    FLASH_KDA_CUT_NEVER = 1,  /* every sequence stays whole */
    FLASH_KDA_CUT_ALWAYS = 2, /* whether it pays or not, if a sequence is long enough */
    FLASH_KDA_CUT_MIXED = 3,  /* only sequences of different lengths, by the schedule made for these */
} flash_kda_cut;

/* How the gate tensor g of a token becomes the natural logarithm of the decay of a channel of K. */
typedef enum flash_kda_gate {
    FLASH_KDA_GATE_BOUNDED = 0,   /* lower_bound sigmoid(exp(A_log) (g + dt_bias)), in [lower_bound, 0) */
    FLASH_KDA_GATE_SOFTPLUS = 1,  /* -exp(A_log) softplus(g + dt_bias), in (-inf, 0) */
    FLASH_KDA_GATE_ACTIVATED = 2, /* g itself, at most 0 */
} flash_kda_gate;

/* How the tensor beta becomes the write strength of a token. */
typedef enum flash_kda_beta {
    FLASH_KDA_BETA_SIGMOID = 0,       /* sigmoid(beta), in (0, 1) */
    FLASH_KDA_BETA_TWICE_SIGMOID = 1, /* 2 sigmoid(beta), in (0, 2): eigenvalues may be negative */
    FLASH_KDA_BETA_ACTIVATED = 2,     /* beta itself */
} flash_kda_beta;

/* The tensors in which flash_kda_fwd() counts values that are not finite, in the order of the records of
 * flash_kda_fwd_params.nonfinite. */
typedef enum flash_kda_checked_tensor {
    FLASH_KDA_CHECKED_Q = 0,
    FLASH_KDA_CHECKED_K = 1,
    FLASH_KDA_CHECKED_V = 2,
    FLASH_KDA_CHECKED_G = 3,
    FLASH_KDA_CHECKED_BETA = 4,
    FLASH_KDA_CHECKED_A_LOG = 5,
    FLASH_KDA_CHECKED_DT_BIAS = 6,
    FLASH_KDA_CHECKED_INITIAL_STATE = 7,
    FLASH_KDA_CHECKED_OUT = 8,
    FLASH_KDA_CHECKED_FINAL_STATE = 9,
    FLASH_KDA_CHECKED_TENSORS = 10, /* how many there are */
} flash_kda_checked_tensor;

/* What was counted in one tensor: a row of flash_kda_fwd_params.nonfinite. */
typedef struct flash_kda_nonfinite {
    int64_t count; /* values that are NaN or an infinity; 0 in a tensor that is absent or empty */
    int64_t first; /* the index of the first of them, as if the tensor were contiguous; -1: none */
} flash_kda_nonfinite;

typedef struct flash_kda_device {
    int32_t type;  /* flash_kda_device_type */
    int32_t index; /* CUDA ordinal; 0 for the CPU */
} flash_kda_device;

/* A tensor in the memory of the call's device. An optional tensor that is absent has data == NULL,
 * and then its other fields are ignored. */
typedef struct flash_kda_tensor {
    void *data;
    int32_t dtype; /* flash_kda_dtype */
    int32_t ndim;  /* how many of shape and stride are used */
    int64_t shape[4];
    int64_t stride[4]; /* in elements */
} flash_kda_tensor;

/*
 * The arguments of the forward pass. Zero the struct, set struct_size to sizeof(flash_kda_fwd_params), then
 * fill in the rest: fields added by later versions come last and mean "default" when zero. A smaller
 * struct_size, of a program built with an older header, is taken: the fields beyond it count as zero. A
 * larger one is refused, as this library would not see what the new fields ask for.
 *
 *   q, k           bf16 [B, T, H, K]           query, key
 *   v              bf16 [B, T, HV, V]          value. HV is a multiple of H: value head j uses the query and
 *                                              key head j / (HV / H), rounded down
 *   g              bf16 or f32 [B, T, HV, K]   the gate tensor: see "gate"
 *   beta           bf16 or f32 [B, T, HV]      the write strength: see "beta_kind"
 *   out            bf16 [B, T, HV, V]          written
 *   A_log          f32 [HV]                    of the gate; any shape with HV elements. Optional with the
 *                                              bounded gate (then exp(A_log) is 1), required with softplus
 *   dt_bias        f32 [HV, K]                 of the gate; any shape with HV * K elements. Optional: zeros
 *   initial_state  bf16 or f32 [N, HV, V, K], optional: zeros when absent. [slots, HV, V, K] with
 *                  state_indices
 *   final_state    the same, optional, written; the same dtype as initial_state when both are there.
 *                  It may be the same memory as initial_state.
 *   cu_seqlens     i64 or i32 [N + 1], optional: sequence n is tokens cu_seqlens[n] to
 *                  cu_seqlens[n + 1] - 1 of the one batch row (B must be 1); first 0, last T, never
 *                  decreasing. Absent: each batch row is a sequence, N = B. The values are checked
 *                  on the CPU. On a GPU the call does not wait to look at them: the kernel clamps them
 *                  into [0, T], so wrong ones give wrong numbers but never touch other memory. The same
 *                  holds on the CPU for values that another thread changes while the call runs.
 *   nonfinite      i64 [FLASH_KDA_CHECKED_TENSORS, 2], optional, written: for debugging a model; see below
 *
 * While a call is in flight (on a GPU until the work on its stream is over, also if the call returned long
 * before), its inputs must not change, cu_seqlens included, and no other call may use its workspace: each
 * call in flight needs a workspace of its own. Calls that follow each other on one stream may share one. If
 * inputs change or a workspace is shared all the same, results are unspecified. No memory outside of the
 * tensors and the workspace is touched. A kernel may then wait for what never comes; it gives up after 2^35
 * clocks of its SM, which are 17 to 20 s on an H100 or H200. The driver then reports
 * CUDA_ERROR_LAUNCH_FAILED to every later call of the process on this device, flash_kda_synchronize() and
 * flash_kda_copy() put it into a sentence, and the process has lost its CUDA context. Under MPS all clients
 * of the GPU lose theirs.
 *
 * A token changes no bit of the tokens before it, of other heads or of other sequences, whatever it holds.
 * There is one exception: kernel "hopper", and a finite v that is thousands of times as large as what a row
 * of the state held before it, or a key and a write strength b with b |k|^2 far above 2, which takes keys
 * that are not normalised by the call, or activated betas. The tokens before it in its chunk, which are at
 * most 31, then have other bits and lose accuracy; tokens of earlier chunks do not. If these tokens all have
 * write strengths below 2^-6, and it has a larger one, their last bits may differ. An output or a state that
 * depends on a NaN, or on an infinity in q, k or v, is not finite; infinities in g and beta are numbers to
 * their sigmoids. Errors are as documented for q and k with a norm of 1e-5 or more; the 1e-6 in the norm
 * makes shorter ones count as less than a hundredth of a key.
 *
 * If nonfinite is there, the call also counts the values that are NaN or an infinity: in each input before
 * the forward pass begins, and in out and final_state afterwards. So the row of initial_state has the counts
 * from before the call, also if final_state is the same tensor. Row i of nonfinite becomes the
 * flash_kda_nonfinite of the flash_kda_checked_tensor i. Every element of a tensor counts, whatever
 * cu_seqlens says, and an infinity in g or beta counts although it is a number to the sigmoid. The counts and
 * places are exact, and out and final_state have the same bits as without nonfinite. On a GPU the counting is
 * a memset and two kernels more on the call's stream, each of which reads its tensors once; the call does not
 * wait for them. Without nonfinite nothing of this costs anything. With state_indices the rows of
 * initial_state and final_state count the states that sequences start from and end in, each once for every
 * such sequence, and "first" is an index into all slots. Other slots are not looked at, nor is an initial
 * state for which has_initial_state is false. Checkpoints are not counted.
 *
 * Strides. q, k, v, g and out may have any strides between rows of the batch, tokens and heads; their last
 * dimension is contiguous. On a GPU these strides are multiples of 16 bytes and not negative, and those
 * between tokens and between heads are at most 2^31 - 1 elements. beta may have any strides. A state is
 * contiguous, with any stride between states, a multiple of 16 bytes on a GPU. All other tensors are
 * contiguous. The stride of a dimension of size 1 means nothing. q, k, v, g, out, dt_bias and states are
 * 16-byte aligned, other tensors are aligned to an element. Elements of an output must not share memory: out,
 * nonfinite, checkpoint_states and the workspace must not overlap any other tensor, and final_state no other
 * than initial_state. Interleaved slices of one tensor do not overlap. T may be 0, and so may any sequence's
 * length: its final state is its initial state.
 *
 * State pools. With state_indices, sequence n starts from initial_state[state_indices[n]] and ends in
 * final_state[state_indices[n]]. An index below first_slot means that the sequence starts from zeros and
 * writes no final state. An index beyond a tensor's slots means the same for this tensor on a GPU, and is
 * refused on the CPU. If two sequences have one slot and one of them writes it, the results of both are
 * unspecified. has_initial_state, with or without state_indices, makes a sequence start from zeros where it
 * is false.
 *
 * Checkpoints are states from inside sequences: checkpoint_states gets the state after as many tokens of
 * sequence n as checkpoint_offsets[n, c] says, in row checkpoint_indices[n, c]; without checkpoint_indices in
 * row n C + c. An offset of 0 or less asks for none. Offsets are multiples of 16 and at most the sequence's
 * length; they need no order and may repeat. With checkpoint_every = e instead, sequence n has checkpoints
 * after e, 2 e, ... tokens, up to its length, in rows from checkpoint_starts[n] on; without checkpoint_starts
 * the rows of all sequences follow each other. Offsets and rows that are not allowed are refused on the CPU.
 * On a GPU they are left out. If two checkpoints have one row, its contents are unspecified. Rows without a
 * checkpoint stay as they are. With batch_invariant a checkpoint is, bit for bit, the final state of a call
 * whose sequence ends there.
 */
typedef struct flash_kda_fwd_params {
    size_t struct_size;
    flash_kda_device device;
    /* CUstream / cudaStream_t of that device. NULL is the default stream of its primary context, also where
     * another context is current. */
    void *stream;
    flash_kda_tensor q, k, v, g, beta;
    flash_kda_tensor out;
    flash_kda_tensor A_log, dt_bias;
    flash_kda_tensor initial_state, final_state;
    flash_kda_tensor cu_seqlens;
    float scale;       /* multiplies the output, usually K^-0.5; finite */
    float lower_bound; /* of the log decay of one token, in nats, in [-5, 0]; of the bounded gate */
    void *workspace;   /* scratch on the device, 64-byte aligned; may be NULL if 0 bytes are needed */
    size_t workspace_size;
    const char *kernel;      /* NULL: the best one for the device; else a name of flash_kda_list_kernels() */
    int32_t cpu_threads;     /* 0: as many as the process may run on; results do not depend on it */
    int32_t batch_invariant; /* 1: a sequence's out and final_state have the same bits whatever else is in the
                                batch and wherever the sequence is in it; 0: not promised */
    /* Tokens of the longest sequence, in [0, T], where the caller knows it; 0: not known. With cu_seqlens on
     * a GPU the value decides whether a long sequence is worth cutting, which can be several times as fast. A
     * wrong value costs time, not correctness. Without cu_seqlens the value changes nothing. */
    int64_t max_seqlen;
    int32_t cut;      /* flash_kda_cut: for tests and benchmarks; results differ within the error budget */
    int32_t reserved; /* 0 */
    /* NULL, or a number that is 0 until a call on the CPU is to stop: another thread or a signal handler may
     * then store another value there (volatile sig_atomic_t and atomic_int have the type's size). The call
     * looks at it for every 16 tokens of a head, which take well under a millisecond, and returns
     * FLASH_KDA_INTERRUPTED. What it has written by then is undefined. If the number is not 0 when the call
     * begins, nothing is written. On a GPU, where the call only enqueues, it changes nothing. */
    const volatile int32_t *interrupt;
    flash_kda_tensor nonfinite; /* i64 [FLASH_KDA_CHECKED_TENSORS, 2], or absent: nothing is counted */

    /* State pools; see above. */
    flash_kda_tensor state_indices;     /* i32 or i64 [N], optional */
    flash_kda_tensor has_initial_state; /* bool [N], optional */
    int64_t first_slot;                 /* at least 0 */

    /* Checkpoints; see above. */
    flash_kda_tensor checkpoint_states;  /* f32 or bf16 [rows, HV, V, K], optional, written */
    flash_kda_tensor checkpoint_offsets; /* i32 or i64 [N] or [N, C], optional */
    flash_kda_tensor checkpoint_indices; /* i32 or i64, the shape of checkpoint_offsets, optional */
    flash_kda_tensor checkpoint_starts;  /* i32 or i64 [N], optional */
    int64_t checkpoint_every;            /* tokens, a multiple of 16; 0: checkpoint_offsets says where */

    int32_t gate;             /* flash_kda_gate; lower_bound belongs to the bounded one alone */
    int32_t beta_kind;        /* flash_kda_beta */
    int32_t qk_is_normalised; /* 1: q and k are used as they are; 0: divided by sqrt(sum of squares + 1e-6) */
    int32_t state_k_first;    /* 1: all states are [.., K, V]; 0: [.., V, K] */

    /* For training: NULL, or memory on the device, 64-byte aligned, of at least flash_kda_fwd_saved_size()
     * bytes. The call writes states from inside of the sequences there, in a form of its own, and
     * flash_kda_bwd() need not compute them again. It may also be NULL if 0 bytes are needed. On the CPU no
     * output has other bits for it; on a GPU outputs may have other last bits. */
    void *saved;
    size_t saved_size;
} flash_kda_fwd_params;

/* Bytes of workspace that flash_kda_fwd() needs for these arguments. Depends on the device, shapes, kernel,
 * cpu_threads, batch_invariant, max_seqlen, cut, gate, beta_kind, qk_is_normalised, state_k_first, the dtypes
 * of g and beta, and on which optional tensors there are: no pointer needs to be set (an optional tensor
 * counts if its ndim is not 0). */
FLASH_KDA_API flash_kda_status flash_kda_fwd_workspace_size(const flash_kda_fwd_params *params,
                                                            size_t *bytes);

/* Bytes of flash_kda_fwd_params.saved that flash_kda_fwd() needs for these arguments. Looks at what
 * flash_kda_fwd_workspace_size() looks at. On the CPU it is one fp32 state of each value head for every 320
 * tokens of a batch row (for every 640 m / (m + 1), rounded up to a multiple of 16, if m value heads share a
 * head of q and k), so never more than a fifth of q, k, v and g in bf16. The kernel "hopper" saves at most
 * nine states of each value head of a sequence, at least 512 tokens apart: never more than a quarter of q, k,
 * v and g. With cu_seqlens, with batch_invariant or with checkpoint_states "hopper" saves nothing and needs 0
 * bytes. "portable" never saves anything, since its backward pass would gain nothing. */
FLASH_KDA_API flash_kda_status flash_kda_fwd_saved_size(const flash_kda_fwd_params *params, size_t *bytes);

/* Explains what flash_kda_fwd() would do with these arguments: which kernel runs and why, how it lays the
 * work out over the device, and its workspace. Looks at what flash_kda_fwd_workspace_size() looks at. Writes
 * plain English in a few lines, each ended by a newline, cut to capacity bytes with the 0 at the end (1200
 * are enough). Meant to be read: the wording may change. */
FLASH_KDA_API flash_kda_status flash_kda_explain(const flash_kda_fwd_params *params, char *text,
                                                 size_t capacity);

/* The forward pass. On a GPU it enqueues on the stream and returns: no allocation, no synchronisation.
 * Kernels are loaded by the first call on a device that needs them: options such as gate, checkpoints and
 * nonfinite, and sequences that are cut, have kernels of their own. After a call with the same shapes and
 * options a call is safe under CUDA graph capture. */
FLASH_KDA_API flash_kda_status flash_kda_fwd(const flash_kda_fwd_params *params);

/* The definition: the recurrence above, token by token in fp64, for tensors in CPU memory. Writes
 * out64 [B, T, HV, V] and, unless NULL, state64 [N, HV, V, K] with every sequence's final state, and
 * checkpoints64 [rows, HV, V, K], of which rows without a checkpoint stay as they are. V comes before K
 * whatever state_k_first says. params->out, params->final_state, params->nonfinite and
 * params->checkpoint_states are not written; the first three may be absent, and checkpoint_states needs its
 * shape alone. Slow, and meant for tests. */
FLASH_KDA_API flash_kda_status flash_kda_reference(const flash_kda_fwd_params *params, double *out64,
                                                   double *state64, double *checkpoints64);

/*
 * The arguments of flash_kda_bwd(), which computes gradients of a loss with respect to the inputs of
 * flash_kda_fwd(), from the loss's gradients with respect to out and final_state. With the names at the top
 * of this file, S~_t for the state that token t has made forget and not yet written to, and D_t for the
 * gradient with respect to the state after token t, for every token t from the last one to the first:
 *
 *     D_t  = D_t + scale q_t do_t^T             D of the last token begins with dfinal_state, or zeros
 *     dq_t = scale S_t do_t
 *     du_t = D_t^T k_t
 *     dv_t = b_t du_t                           db_t = du_t . (v_t - S~_t^T k_t)
 *     dk_t = D_t u_t - b_t S~_t du_t
 *     D~_t = D_t - b_t k_t du_t^T
 *     dg_t = sum over V of S~_t D~_t            element by element
 *     D_(t-1) = diag(exp(g_t)) D~_t             D before the first token is dinitial_state
 *
 * These are gradients with respect to what the recurrence takes. The call goes on through norms, gates and
 * sigmoids, so all that it writes are gradients with respect to the tensors of the call. (The formulas follow
 * from the recurrence by the chain rule; docs/training.md has them in chunks.) flash_kda_bwd_reference()
 * computes them as they stand here, in fp64.
 *
 * Zero the struct, set struct_size to sizeof(flash_kda_bwd_params), then fill in the rest. q, k, v, g, beta,
 * A_log, dt_bias, initial_state, cu_seqlens and all options are those of the forward pass, and mean what they
 * mean in flash_kda_fwd_params. State pools and checkpoints have no gradients.
 *
 *   dout            bf16 [B, T, HV, V], optional: zeros when absent
 *   dfinal_state    f32 or bf16 [N, HV, V, K], optional: zeros
 *   dq, dk          bf16 [B, T, H, K], optional, written. Value heads that share a head of q and k add up
 *   dv              bf16 [B, T, HV, V], optional, written
 *   dg              [B, T, HV, K] of the dtype of g, optional, written
 *   dbeta           [B, T, HV] of the dtype of beta, optional, written
 *   dA_log          f32 [HV]; any shape with HV elements. Optional, written; with A_log alone
 *   ddt_bias        f32 [HV, K]; any shape with HV * K elements. Optional, written; with dt_bias alone
 *   dinitial_state  f32 [N, HV, V, K], optional, written; also if initial_state is absent
 *
 * An absent gradient is not wanted, and at least one must be there. A gradient is written, not added to what
 * the tensor held. Of a sequence without tokens dinitial_state is dfinal_state. On GPUs the kernels
 * "hopper" and "portable" compute gradients, and the default is that of the forward pass.
 *
 * Strides and memory are as in flash_kda_fwd_params: dout, dq, dk, dv and dg have free strides except for
 * their last dimension, dbeta in all dimensions, states between states; dA_log and ddt_bias are contiguous.
 * Gradients that are written and the workspace must not overlap each other or any other tensor.
 *
 * Arithmetic on the CPU is fp32, and gradients are rounded once, when they are written. The decay of a slow
 * channel has a gradient of small relative error, because its terms are added and none is subtracted from
 * their sum. Results depend neither on the number of threads nor on the other sequences of the batch, except
 * that sums over tokens (dA_log, ddt_bias) are over all of them. A token with a NaN or an infinity may make
 * all gradients of its sequence NaN, and those of other sequences keep their bits. On a GPU products run in
 * fp16 and tf32 with fp32 sums. Equal calls have results that are equal to the bit.
 */
typedef struct flash_kda_bwd_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor q, k, v, g, beta;
    flash_kda_tensor A_log, dt_bias;
    flash_kda_tensor initial_state;
    flash_kda_tensor cu_seqlens;
    flash_kda_tensor dout, dfinal_state;
    flash_kda_tensor dq, dk, dv, dg, dbeta;
    flash_kda_tensor dA_log, ddt_bias;
    flash_kda_tensor dinitial_state;
    float scale;       /* finite */
    float lower_bound; /* in [-5, 0]; of the bounded gate */
    void *workspace;   /* scratch on the device, 64-byte aligned; may be NULL if 0 bytes are needed */
    size_t workspace_size;
    /* What flash_kda_fwd_params.saved got from a forward pass of the same kernel, on the CPU of any of its
     * kernels, with the same inputs and options, of flash_kda_fwd_saved_size() bytes or more, 64-byte
     * aligned; or NULL: the call computes the states again, which costs it up to a sixth of its time. On the
     * CPU gradients have the same bits with and without it if one kernel computes both passes. On a GPU they
     * may differ in their last bits, and a call whose workspace_limit is less than half of the bytes of q, k,
     * v and g may have to compute the states again. What another forward pass has saved gives wrong
     * gradients, and no memory outside of the tensors is touched. */
    const void *saved;
    size_t saved_size;
    const char *kernel;       /* NULL: the best one for the device; else a name of flash_kda_list_kernels() */
    int32_t cpu_threads;      /* 0: as many as the process may run on; results do not depend on it */
    int32_t gate;             /* flash_kda_gate */
    int32_t beta_kind;        /* flash_kda_beta */
    int32_t qk_is_normalised; /* 1: q and k are used as they are */
    int32_t state_k_first;    /* 1: states and their gradients are [.., K, V] */
    int32_t batch_invariant;  /* 1: gradients of a sequence do not depend on what else is in the batch, except
                                 those that are sums over tokens, dA_log and ddt_bias */
    int64_t max_seqlen;       /* as in flash_kda_fwd_params; on the CPU it changes nothing */
    const volatile int32_t *interrupt; /* as in flash_kda_fwd_params */
    /* On a GPU: the most bytes of workspace that the call should need. If everything at once would need more,
     * it computes some tokens or some of the heads after the others, which takes longer; the fewest are one
     * head of q and k, even if that needs more than the limit. 0: half of the bytes of q, k, v and g, or 96
     * MiB if these have less than 128 MiB. SIZE_MAX: everything at once. Gradients may differ in their last
     * bits between limits, unless batch_invariant is set. */
    size_t workspace_limit;
} flash_kda_bwd_params;

/* Bytes of workspace that flash_kda_bwd() needs for these arguments. Depends on what
 * flash_kda_fwd_workspace_size() looks at, on which gradients there are, on workspace_limit, and on whether
 * `saved` is there: no pointer needs to be set (an optional tensor counts if its ndim is not 0, and `saved`
 * if saved_size is not 0). */
FLASH_KDA_API flash_kda_status flash_kda_bwd_workspace_size(const flash_kda_bwd_params *params,
                                                            size_t *bytes);

/* The backward pass. */
FLASH_KDA_API flash_kda_status flash_kda_bwd(const flash_kda_bwd_params *params);

/* Where flash_kda_bwd_reference() writes gradients: contiguous, in the shapes of flash_kda_bwd_params, states
 * as [.., V, K] whatever state_k_first says. A pointer may be NULL: that gradient is not wanted. Set
 * struct_size to sizeof(flash_kda_gradients64). */
typedef struct flash_kda_gradients64 {
    size_t struct_size;
    double *dq, *dk, *dv, *dg, *dbeta;
    double *dA_log, *ddt_bias; /* also if A_log or dt_bias is absent; zeros for the activated gate */
    double *dinitial_state;
} flash_kda_gradients64;

/* The definition: the formulas above, token by token in fp64, for tensors in CPU memory. The gradients in
 * params are not looked at, except for dout and dfinal_state. Slow, and meant for tests. */
FLASH_KDA_API flash_kda_status flash_kda_bwd_reference(const flash_kda_bwd_params *params,
                                                       const flash_kda_gradients64 *gradients);

/*
 * The arguments of flash_kda_map(), which computes what a piece of a sequence does to the state that enters
 * it. Whatever the gates, a run of tokens changes the state S of a head by an affine map, so several devices,
 * each of which has one piece of a long sequence, need nothing of each other but maps. With states as they
 * lie in memory, [V, K], and the map as a matrix [K, K],
 *
 *     the state after the piece = (the state before the piece) map + state
 *
 * Row j of map is what the piece leaves of a state whose row is the j-th unit vector, if v is zeros. `state`
 * is what the piece leaves of initial_state. With state_k_first all three matrices are transposed in memory,
 * and the product is map (the state before the piece).
 *
 * A device with a piece computes its map, gets the maps of the pieces before its own, joins them by
 * flash_kda_join(), and calls flash_kda_fwd() with the joined state as initial_state. docs/distributed.md has
 * the whole way, gradients included.
 *
 * Zero the struct, set struct_size to sizeof(flash_kda_map_params), then fill in the rest. Tensors and
 * options that flash_kda_fwd_params has too mean the same there. Queries are not needed.
 *
 *   map     f32 [N, HV, K, K], optional, written
 *   state   f32 [N, HV, V, K], optional, written: the final state
 *
 * At least one of them must be there. The map does not depend on v and initial_state. Of a sequence without
 * tokens map is the identity and state is initial_state. Both may have any stride between sequences. They
 * must not overlap each other or any other tensor.
 *
 * On a GPU a call runs a forward pass without outputs for each of the two: `map` is what it makes of
 * identities if v is zeros. Both are as exact as final states of flash_kda_fwd() are. On the CPU sums are
 * fp32.
 */
typedef struct flash_kda_map_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor k, v, g, beta;
    flash_kda_tensor A_log, dt_bias;
    flash_kda_tensor initial_state;
    flash_kda_tensor cu_seqlens;
    flash_kda_tensor map, state;
    void *workspace; /* scratch on the device, 64-byte aligned; may be NULL if 0 bytes are needed */
    size_t workspace_size;
    const char *kernel;       /* NULL: the best one for the device; else a name of flash_kda_list_kernels() */
    float lower_bound;        /* in [-5, 0]; of the bounded gate */
    int32_t cpu_threads;      /* 0: as many as the process may run on; results do not depend on it */
    int32_t gate;             /* flash_kda_gate */
    int32_t beta_kind;        /* flash_kda_beta */
    int32_t qk_is_normalised; /* 1: k is used as it is */
    int32_t state_k_first;    /* 1: map and states are transposed in memory */
    const volatile int32_t *interrupt; /* as in flash_kda_fwd_params */
} flash_kda_map_params;

/* Bytes of workspace that flash_kda_map() needs for these arguments. No pointer needs to be set (an optional
 * tensor counts if its ndim is not 0). */
FLASH_KDA_API flash_kda_status flash_kda_map_workspace_size(const flash_kda_map_params *params,
                                                            size_t *bytes);

/* Computes maps of pieces. */
FLASH_KDA_API flash_kda_status flash_kda_map(const flash_kda_map_params *params);

/* The definition of flash_kda_map(), token by token in fp64, for tensors in CPU memory. Writes, unless they
 * are NULL, map64 [N, HV, K, K] and state64 [N, HV, V, K], in the order in memory that state_k_first = 0 has.
 * params->map and params->state are not written and may be absent. Slow, and meant for tests. */
FLASH_KDA_API flash_kda_status flash_kda_map_reference(const flash_kda_map_params *params, double *map64,
                                                       double *state64);

/*
 * The arguments of flash_kda_join(), which carries a state through the maps of the P pieces of a sequence:
 *
 *     entering[0] = initial_state, or zeros       entering[i + 1] = entering[i] maps[i] + states[i]
 *
 * and final_state is entering[P]. With `backwards` it carries a gradient from the last piece to the first:
 *
 *     entering[P - 1] = initial_state, or zeros   entering[i - 1] = entering[i] maps[i]^T + states[i]
 *
 * and final_state is entering[-1]. entering[i] is then the gradient with respect to the state after piece i.
 * initial_state is the gradient with respect to the state after the last piece. states[i] is the part of the
 * gradient with respect to the state before piece i that comes from the outputs of piece i: dinitial_state of
 * flash_kda_bwd() without dfinal_state.
 *
 *   maps            f32 [P, HV, K, K], P at least 1: `map` of flash_kda_map()
 *   states          f32 [P, HV, V, K]: `state` of flash_kda_map() without initial_state, or gradients
 *   initial_state   f32 or bf16 [1, HV, V, K], optional: zeros
 *   entering        f32 [P, HV, V, K], optional, written
 *   final_state     f32 [1, HV, V, K], optional, written
 *
 * At least one of entering and final_state must be there. HV may count the heads of several sequences that
 * are cut into as many pieces. Zero the struct and set struct_size. Tensors may have any stride between
 * pieces, so that maps and states may be slices of one buffer. What is written must not overlap anything
 * else. Sums are fp32 in an order that does not depend on the number of threads.
 */
typedef struct flash_kda_join_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor maps, states;
    flash_kda_tensor initial_state;
    flash_kda_tensor entering, final_state;
    const char *kernel;
    int32_t backwards;     /* 1: from the last piece to the first, by the transposed maps */
    int32_t state_k_first; /* 1: maps and states are transposed in memory */
    int32_t cpu_threads;   /* 0: as many as the process may run on */
    int32_t reserved;      /* 0 */
} flash_kda_join_params;

FLASH_KDA_API flash_kda_status flash_kda_join(const flash_kda_join_params *params);

/* As flash_kda_check_decode(). */
FLASH_KDA_API flash_kda_status flash_kda_check_join(const flash_kda_join_params *params);

/* Decode: one to sixteen tokens of each sequence. Which states flash_kda_decode() writes to the pool. */
typedef enum flash_kda_write_states {
    FLASH_KDA_WRITE_LAST = 0, /* the state after a sequence's last token, to the slot that it came from */
    FLASH_KDA_WRITE_NONE = 1, /* none, to verify draft tokens: see "records" */
    FLASH_KDA_WRITE_EACH = 2, /* the state after token i of sequence n, to slot state_indices[n, i] */
} flash_kda_write_states;
enum {
    FLASH_KDA_MAX_DECODE_TOKENS = 16, /* of one sequence in one call of flash_kda_decode() */
    FLASH_KDA_RECORD_ROWS = 3,        /* rows of 128 numbers in a token's record of one head: decay, key, u */
};

/*
 * The arguments of flash_kda_decode(), which computes the recurrence at the top of this file for a few
 * tokens of each of many sequences, with states that lie in a pool and are read and written once a call.
 * Zero the struct, set struct_size to sizeof(flash_kda_decode_params), then fill in the rest. Fields that
 * flash_kda_fwd_params has too mean the same there.
 *
 *   q, k           bf16 [N, T, H, K], T from 0 to 16; with cu_seqlens [1, total, H, K]
 *   v, out         bf16 [N, T, HV, V], out is written; with cu_seqlens [1, total, HV, V]
 *   g              bf16 or f32 [N, T, HV, K]
 *   beta           bf16 or f32 [N, T, HV]
 *   A_log, dt_bias as in flash_kda_fwd_params
 *   state          f32 or bf16 [slots, HV, V, K], [slots, HV, K, V] with state_k_first; read and written
 *   state_indices  i32 or i64 [N], optional: sequence n has slot state_indices[n], or n where the tensor is
 *                  absent. With FLASH_KDA_WRITE_EACH it is required and is [N, S], where S is at least the
 *                  longest sequence
 *   num_accepted_tokens  i32 or i64 [N], optional, with FLASH_KDA_WRITE_EACH: sequence n starts from slot
 *                  state_indices[n, num_accepted_tokens[n] - 1], where the number is 1 to S; absent: from
 *                  slot state_indices[n, 0]. With past_records it is required, and is how many of them are
 *                  applied to sequence n
 *   cu_seqlens     i32 or i64 [N + 1], optional: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1] -
 *                  1. A sequence has 0 to 16 tokens
 *   parents        i32 or i64 [N, P], optional: a tree of draft tokens. Token i of sequence n continues
 *                  from token parents[n, i] of the same sequence, which is less than i, or from the
 *                  sequence's starting state where it is negative. P is at least the longest sequence. Not
 *                  with FLASH_KDA_WRITE_LAST. Absent: token i continues from token i - 1
 *   records        f32 [N, R, HV, 3 * 128], contiguous, optional, written: the record of token i of sequence
 *                  n in [n, i]. A head's 384 numbers are the decay exp(g_t) of each channel, the key k_t,
 *                  and u_t. R is at least the longest sequence, and what lies beyond a sequence's tokens
 *                  stays as it is. flash_kda_apply() needs nothing else to bring a state up to date
 *   past_records   f32 [N, R2, HV, 3 * 128], contiguous, optional, with FLASH_KDA_WRITE_NONE alone: records
 *                  that an earlier call wrote. The call first does what flash_kda_apply() would do with
 *                  them, num_accepted_tokens [N] and `accepted`: it writes the state after the accepted
 *                  tokens to the slot. Then it computes its own tokens from there. On a GPU a state crosses
 *                  memory once in each direction for all of that. `records` must be another tensor
 *   accepted       i32 or i64 [N, A], optional, with past_records alone: as in flash_kda_apply_params
 *   rounding       i64 [2], optional, on the device: seed and offset of the random numbers with which a
 *                  bf16 state is rounded. Absent: to nearest. A state that forgets 1e-5 of itself a token
 *                  does not change at all when each step is rounded to the nearest bf16; rounded at random
 *                  it is right on average. Equal seeds, offsets, indices and inputs give equal bits. The
 *                  caller adds 1 to the offset from call to call, in a graph by a kernel. Ignored with an
 *                  f32 state
 *   written_states the dtype of state [slots2, HV, V, K], [slots2, HV, K, V] with state_k_first, optional,
 *                  written: a second pool that takes all states that the call writes. `state` is then read
 *                  alone, and state_indices is [N] and optional with FLASH_KDA_WRITE_EACH too. Not with
 *                  FLASH_KDA_WRITE_NONE, nor with num_accepted_tokens
 *   written_indices  i32 or i64, optional, with written_states alone: the slot of written_states for each
 *                  state that is written; a negative one takes no state. With FLASH_KDA_WRITE_LAST it is
 *                  [N]; absent: slot n for sequence n. With FLASH_KDA_WRITE_EACH it is [N, W], with [n, i]
 *                  for token i of sequence n, where W is at least the longest sequence; absent: the slot is
 *                  the token's number among all tokens, n T + i, or with cu_seqlens cu_seqlens[n] + i
 *
 * An index below first_slot means that the sequence has no state: its out is zeros, its records are zeros,
 * and the pool is neither read nor written. An index beyond the pool means the same on a GPU, and is
 * refused on the CPU. With FLASH_KDA_WRITE_EACH a slot that is below first_slot or beyond the pool takes no
 * state, and the others do. A slot beyond written_states takes no state on a GPU, and is refused on the CPU.
 * If two sequences have one slot and one of them writes it, the results of both are unspecified; from a slot
 * that nothing writes any number of sequences may start. On a GPU cu_seqlens, parents and num_accepted_tokens
 * are clamped into their ranges, and a sequence of more than 16 tokens ends after 16: the rest of its out is
 * zeros. On the CPU these are refused.
 *
 * Arithmetic is fp32. The state does not pass through the workspace, and there is none.
 */
typedef struct flash_kda_decode_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor q, k, v, g, beta;
    flash_kda_tensor out;
    flash_kda_tensor A_log, dt_bias;
    flash_kda_tensor state;
    flash_kda_tensor state_indices;
    flash_kda_tensor num_accepted_tokens;
    flash_kda_tensor cu_seqlens;
    flash_kda_tensor parents;
    flash_kda_tensor records;
    flash_kda_tensor rounding;
    float scale;              /* finite */
    float lower_bound;        /* in [-5, 0]; of the bounded gate */
    int32_t write_states;     /* flash_kda_write_states */
    int32_t gate;             /* flash_kda_gate */
    int32_t beta_kind;        /* flash_kda_beta */
    int32_t qk_is_normalised; /* 1: q and k are used as they are */
    int32_t state_k_first;    /* 1: states are [.., K, V] */
    int32_t cpu_threads;      /* 0: as many as the process may run on; results do not depend on it */
    int64_t first_slot;       /* at least 0 */
    const char *kernel;       /* NULL: the best one for the device; else a name of flash_kda_list_kernels() */
    const volatile int32_t *interrupt; /* as in flash_kda_fwd_params */
    flash_kda_tensor written_states;
    flash_kda_tensor written_indices;
    flash_kda_tensor past_records;
    flash_kda_tensor accepted;
} flash_kda_decode_params;

/* Computes a few tokens of each sequence. On a GPU it enqueues one kernel on the stream and returns: no
 * allocation, no synchronisation. The first call on a device loads the kernels; after it a call is safe
 * under CUDA graph capture. */
FLASH_KDA_API flash_kda_status flash_kda_decode(const flash_kda_decode_params *params);

/* Checks what flash_kda_decode() would check and needs no memory: options, dtypes, shapes and the kernel. No
 * pointer is followed; an optional tensor counts if its data is not NULL. For compilers that trace a call. */
FLASH_KDA_API flash_kda_status flash_kda_check_decode(const flash_kda_decode_params *params);

/* Explains what flash_kda_decode() would do with these arguments: which kernel runs and why, how it lays the
 * work out over the device, and how many bytes it moves. Looks at what flash_kda_check_decode() looks at, and
 * writes text as flash_kda_explain() does. */
FLASH_KDA_API flash_kda_status flash_kda_explain_decode(const flash_kda_decode_params *params, char *text,
                                                        size_t capacity);

/* The definition in fp64, for tensors in CPU memory: writes out64 [N, T, HV, V] (with cu_seqlens [1, total,
   HV, V]) and, unless NULL, states64 [N, T, HV, V, K] (with cu_seqlens [total, HV, V, K]): the state after
   each token, V before K whatever state_k_first says. params->state is read and not written; params->out
   and params->records are not written and may be absent. Of tokens without a state out64 is zeros and
   states64 stays as it is. Slow, and meant for tests. */
FLASH_KDA_API flash_kda_status flash_kda_decode_reference(const flash_kda_decode_params *params,
                                                          double *out64, double *states64);

/*
 * The arguments of flash_kda_apply(), which brings states up to date after draft tokens were verified: the
 * state of sequence n becomes what it is after the first num_accepted_tokens[n] tokens of its records. Each
 * state is read and written once, however many tokens there are. Zero the struct and set struct_size.
 *
 *   records              f32 [N, R, HV, 3 * 128], contiguous: of flash_kda_decode()
 *   num_accepted_tokens  i32 or i64 [N]: how many tokens of a sequence are applied, 0 to the least of R, A
 *                        and 16. Outside of that it is clamped on a GPU and refused on the CPU
 *   accepted             i32 or i64 [N, A], optional: which tokens are applied, in this order, where the
 *                        drafts were a tree: the record of token accepted[n, i] is applied as number i.
 *                        Absent: tokens 0, 1, 2, ... A token outside of [0, R) ends the sequence's list on a
 *                        GPU and is refused on the CPU
 *
 * All other fields mean what they mean in flash_kda_decode_params; state_indices is [N]. A sequence without
 * a state, and one of which no token is applied, changes nothing.
 */
typedef struct flash_kda_apply_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor records;
    flash_kda_tensor num_accepted_tokens;
    flash_kda_tensor accepted;
    flash_kda_tensor state;
    flash_kda_tensor state_indices;
    flash_kda_tensor rounding;
    int32_t state_k_first;
    int32_t cpu_threads;
    int64_t first_slot;
    const char *kernel;
    const volatile int32_t *interrupt;
} flash_kda_apply_params;

FLASH_KDA_API flash_kda_status flash_kda_apply(const flash_kda_apply_params *params);

/* As flash_kda_check_decode(). */
FLASH_KDA_API flash_kda_status flash_kda_check_apply(const flash_kda_apply_params *params);

/* As flash_kda_explain_decode(). The records are those of all tokens that may be applied. */
FLASH_KDA_API flash_kda_status flash_kda_explain_apply(const flash_kda_apply_params *params, char *text,
                                                       size_t capacity);

/*
 * The arguments of flash_kda_decode_layer(), which computes one step of a KDA layer between its projections,
 * in one launch: a causal depthwise convolution over the last four tokens with SiLU, which gives q, k and v,
 * the recurrence of flash_kda_decode(), and RMS norm over V with a sigmoid gate:
 *
 *     y_t = silu(bias + sum of weight[j] x_(t-3+j), j = 0 .. 3)      each of the 3 H D channels for itself
 *     q, k, v  = the three parts of y_t
 *     o_t      = as at the top of this file
 *     out      = o_t / sqrt(mean over V of o_t^2 + norm_eps) * norm_weight * sigmoid(output_gate)
 *
 * Zero the struct, set struct_size to sizeof(flash_kda_decode_layer_params), then fill in the rest. D = K = V
 * = 128. Fields that flash_kda_decode_params has too mean the same there. There are as many heads of q and k
 * as of v.
 *
 *   x              bf16 [N, T, 3 H D], T from 0 to 16; with cu_seqlens [1, total, 3 H D]. Channel D h + d of
 *                  the parts q, k and v of head h
 *   weight         f32 or bf16 [3, 4, H D], or [3 H D, 4]. The oldest input comes first
 *   bias           f32 or bf16, 3 H D elements of any shape, optional: zeros
 *   conv_state     bf16 [slots, 3 H D, L], L at least 3; read and written. Columns 0 to 2 of a slot are its
 *                  window: the last three inputs of each channel, the oldest first
 *   g              bf16 or f32 [N, T, H, D]
 *   beta           bf16 or f32 [N, T, H]
 *   out            bf16 [N, T, H, D], written
 *   output_gate    bf16 or f32 [N, T, H, D], optional: without it out has no factor sigmoid(output_gate)
 *   norm_weight    f32 or bf16 [D], optional: without it out is o_t, times sigmoid(output_gate) if that is
 *                  there
 *   state          f32 or bf16 [slots, H, V, K], of as many slots as conv_state
 *   records        f32 [N, R, H, 3 * 128], as in flash_kda_decode_params
 *   conv_windows   bf16 [N, C, 3 H D, 3], optional, written: the window after token i of sequence n in
 *                  [n, i]. C is at least the longest sequence. After draft tokens were verified the caller
 *                  copies the window after the last accepted token to the sequence's slot of conv_state, as
 *                  flash_kda_apply() brings its state up to date
 *
 * With one token of each sequence x may be [N, 3 H D], and then g, out and output_gate [N, H, D] or [1, N, H,
 * D], and beta [N, H] or [1, N, H]. With cu_seqlens x may be [total, 3 H D], and the others likewise.
 *
 * The convolution's state goes where the state goes:
 *
 *   FLASH_KDA_WRITE_LAST  the window after the last token replaces the sequence's window
 *   FLASH_KDA_WRITE_NONE  conv_state stays as it is
 *   written_states        conv_state is read alone, whatever write_states says, as state is
 *   FLASH_KDA_WRITE_EACH  With L = 3 a sequence starts from the window of the slot that its state is read
 *                         from, and the window after token i goes to slot state_indices[n, i]. With L > 3 one
 *                         slot, state_indices[n, 0], has the inputs of all draft tokens, as vLLM keeps them:
 *                         the sequence starts from columns a to a + 2, where a = num_accepted_tokens[n] - 1
 *                         or 0, and leaves columns a + 1 and a + 2 in columns 0 and 1 and its T inputs in
 *                         columns 2 to T + 1. L is at least S + 2
 *
 * Of columns that are not named above none is read or written. Of a sequence without a state, conv_state is
 * neither read nor written, and conv_windows are zeros like out.
 *
 * Strides. x, g, out and output_gate may have any strides, except that their last dimension is contiguous,
 * and need no more than the alignment of an element, on a GPU too. weight, beta, conv_state and conv_windows
 * may have any strides in all dimensions, so that conv_state may lie as [slots, L, 3 H D] in memory. state is
 * as in flash_kda_decode_params. Slots of conv_state and of state may lie in one buffer with one stride, page
 * after page. All other tensors are contiguous.
 *
 * Arithmetic. All numbers between the inputs and out are fp32: q, k and v are not rounded to bf16 after the
 * convolution. Windows keep the bits of x. An input that is not finite makes its channel's y not finite for
 * four tokens. Errors are as documented for |y| up to 1e18, whose squares fp32 holds.
 */
typedef struct flash_kda_decode_layer_params {
    size_t struct_size;
    flash_kda_device device;
    void *stream;
    flash_kda_tensor x, weight, bias, conv_state;
    flash_kda_tensor g, beta;
    flash_kda_tensor out;
    flash_kda_tensor A_log, dt_bias;
    flash_kda_tensor output_gate, norm_weight;
    flash_kda_tensor state;
    flash_kda_tensor state_indices;
    flash_kda_tensor num_accepted_tokens;
    flash_kda_tensor cu_seqlens;
    flash_kda_tensor records;
    flash_kda_tensor conv_windows;
    flash_kda_tensor rounding;
    float scale;              /* finite */
    float lower_bound;        /* in [-5, 0]; of the bounded gate */
    float norm_eps;           /* finite, at least 0 */
    int32_t write_states;     /* flash_kda_write_states */
    int32_t gate;             /* flash_kda_gate */
    int32_t beta_kind;        /* flash_kda_beta */
    int32_t qk_is_normalised; /* 1: q and k are used as the convolution gives them */
    int32_t state_k_first;    /* 1: states are [.., K, V] */
    int32_t cpu_threads;      /* 0: as many as the process may run on; results do not depend on it */
    int32_t reserved;         /* 0 */
    int64_t first_slot;       /* at least 0 */
    const char *kernel;       /* NULL: the best one for the device; else a name of flash_kda_list_kernels() */
    const volatile int32_t *interrupt; /* as in flash_kda_fwd_params */
    flash_kda_tensor written_states;   /* as in flash_kda_decode_params, as written_indices */
    flash_kda_tensor written_indices;
} flash_kda_decode_layer_params;

/* Computes a few tokens of a KDA layer for each sequence. On a GPU it enqueues one kernel on the stream and
 * returns, as flash_kda_decode() does. */
FLASH_KDA_API flash_kda_status flash_kda_decode_layer(const flash_kda_decode_layer_params *params);

/* As flash_kda_check_decode(). */
FLASH_KDA_API flash_kda_status flash_kda_check_decode_layer(const flash_kda_decode_layer_params *params);

/* As flash_kda_explain_decode(). */
FLASH_KDA_API flash_kda_status flash_kda_explain_decode_layer(const flash_kda_decode_layer_params *params,
                                                              char *text, size_t capacity);

/* The definition in fp64, for tensors in CPU memory: writes out64 [N, T, H, V] (with cu_seqlens [1, total, H,
 * V]) and, unless NULL, states64 [N, T, H, V, K] (with cu_seqlens [total, H, V, K]): the state after each
 * token, V before K whatever state_k_first says. params->state and params->conv_state are read and not
 * written; params->out, params->records and params->conv_windows are not written and may be absent. Of tokens
 * without a state out64 is zeros and states64 stays as it is. Slow, and meant for tests. */
FLASH_KDA_API flash_kda_status flash_kda_decode_layer_reference(const flash_kda_decode_layer_params *params,
                                                                double *out64, double *states64);

/* What a binding for an interpreter (Python, Ruby, R) knows of it, for flash_kda_fwd_for(). */
typedef struct flash_kda_interpreter {
    void *(*release)(void);  /* gives up the interpreter's lock: PyEval_SaveThread */
    void (*acquire)(void *); /* takes it again, with what release() returned: PyEval_RestoreThread */
    int (*handle_signals)(
        void); /* runs the handlers of signals that came; nonzero if one raised an exception,
                                    which ends the call: PyErr_CheckSignals. Called with the lock. */
} flash_kda_interpreter;

/* flash_kda_fwd(), flash_kda_bwd(), flash_kda_map(), the calls about decode, and their references for long
 * calls on the CPU from the thread in which an interpreter handles signals. That thread calls with the
 * interpreter's lock, gives the lock up, and lets the interpreter handle signals while another thread
 * computes. Once a handler has raised an exception, no other handler runs before the computation has ended;
 * the call then returns
 * FLASH_KDA_INTERRUPTED, or FLASH_KDA_OK if all was computed by then, and the exception is still the
 * interpreter's. params->interrupt is not looked at. Where the system has no more threads or file
 * descriptors, the calling thread computes, and signals wait. */
FLASH_KDA_API flash_kda_status flash_kda_fwd_for(const flash_kda_interpreter *interpreter,
                                                 const flash_kda_fwd_params *params);
FLASH_KDA_API flash_kda_status flash_kda_reference_for(const flash_kda_interpreter *interpreter,
                                                       const flash_kda_fwd_params *params, double *out64,
                                                       double *state64, double *checkpoints64);
FLASH_KDA_API flash_kda_status flash_kda_bwd_for(const flash_kda_interpreter *interpreter,
                                                 const flash_kda_bwd_params *params);
FLASH_KDA_API flash_kda_status flash_kda_bwd_reference_for(const flash_kda_interpreter *interpreter,
                                                           const flash_kda_bwd_params *params,
                                                           const flash_kda_gradients64 *gradients);
FLASH_KDA_API flash_kda_status flash_kda_decode_for(const flash_kda_interpreter *interpreter,
                                                    const flash_kda_decode_params *params);
FLASH_KDA_API flash_kda_status flash_kda_decode_reference_for(const flash_kda_interpreter *interpreter,
                                                              const flash_kda_decode_params *params,
                                                              double *out64, double *states64);
FLASH_KDA_API flash_kda_status flash_kda_decode_layer_for(const flash_kda_interpreter *interpreter,
                                                          const flash_kda_decode_layer_params *params);
FLASH_KDA_API flash_kda_status flash_kda_decode_layer_reference_for(
    const flash_kda_interpreter *interpreter, const flash_kda_decode_layer_params *params, double *out64,
    double *states64);
FLASH_KDA_API flash_kda_status flash_kda_apply_for(const flash_kda_interpreter *interpreter,
                                                   const flash_kda_apply_params *params);
FLASH_KDA_API flash_kda_status flash_kda_map_for(const flash_kda_interpreter *interpreter,
                                                 const flash_kda_map_params *params);

/* Handlers for XLA's foreign function interface (XLA_FFI_Handler in xla/ffi/api/c_api.h), with which JAX
 * makes the calls flash_kda_fwd() and flash_kda_decode() inside of compiled programs, on the stream of the
 * program. call_frame is an XLA_FFI_CallFrame, and the result an XLA_FFI_Error or NULL. The attributes of the
 * call are private to flash_kda.jax of the Python package. */
FLASH_KDA_API void *flash_kda_xla_fwd(void *call_frame);
FLASH_KDA_API void *flash_kda_xla_decode(void *call_frame);

/* "0.1.0" */
FLASH_KDA_API const char *flash_kda_version(void);

/* "FLASH_KDA_OK", ... */
FLASH_KDA_API const char *flash_kda_status_string(flash_kda_status status);

/* The sentence about the calling thread's last failed call: which argument, what it was, what it must
 * be. Valid until the thread's next failing call; "" if none failed. */
FLASH_KDA_API const char *flash_kda_last_error(void);

typedef struct flash_kda_device_info {
    size_t struct_size;
    flash_kda_device device;
    char name[128];   /* "NVIDIA H100 80GB HBM3" */
    char arch[32];    /* "sm_90", "x86-64 avx512" */
    char kernel[32];  /* what runs there by default; "" if nothing can */
    char reason[256]; /* why nothing can run there, else "" */
    int32_t units;    /* multiprocessors, or CPU threads */
    uint64_t memory;  /* bytes */
} flash_kda_device_info;

/* Writes up to capacity entries (whose struct_size is set by the caller) and the number there are. The
 * CPU is always the first. infos may be NULL if capacity is 0. If CUDA cannot be used at all, *count covers
 * the CPU alone and, unless NULL, no_cuda points to a sentence that says why (else to ""), valid until the
 * thread's next call. A driver that could not be opened is tried again by the next call. Looking starts CUDA,
 * so a process forked afterwards cannot use it. */
FLASH_KDA_API flash_kda_status flash_kda_list_devices(flash_kda_device_info *infos, int32_t capacity,
                                                      int32_t *count, const char **no_cuda);

typedef struct flash_kda_kernel_info {
    size_t struct_size;
    const char *name;        /* for flash_kda_fwd_params.kernel */
    int32_t device_type;     /* flash_kda_device_type */
    const char *archs;       /* "sm_80 and newer" */
    const char *description; /* one line */
} flash_kda_kernel_info;

/* The kernels that this build has, as flash_kda_list_devices() gives devices. */
FLASH_KDA_API flash_kda_status flash_kda_list_kernels(flash_kda_kernel_info *infos, int32_t capacity,
                                                      int32_t *count);

/* Device memory and timing for programs that bring no framework of their own (the tests and the
 * flash-kda command use these). Copies and flash_kda_synchronize() wait until done. */
FLASH_KDA_API flash_kda_status flash_kda_malloc(flash_kda_device device, size_t bytes, void **memory);
FLASH_KDA_API flash_kda_status flash_kda_free(flash_kda_device device, void *memory);
FLASH_KDA_API flash_kda_status flash_kda_copy(flash_kda_device to_device, void *to,
                                              flash_kda_device from_device, const void *from, size_t bytes);
FLASH_KDA_API flash_kda_status flash_kda_synchronize(flash_kda_device device, void *stream);

/* Runs flash_kda_fwd() repeats times and writes the milliseconds each took on the device (CUDA events
 * around each call, or the wall clock on the CPU). */
FLASH_KDA_API flash_kda_status flash_kda_time_fwd(const flash_kda_fwd_params *params, int32_t repeats,
                                                  float *milliseconds);

#ifdef __cplusplus
}
#endif
#endif /* FLASH_KDA_H */
