/*
 * A block: one CTA shape under one schedule. All roles are templates over a block, and the kernels differ
 * only in their blocks:
 *
 *   fkda_hopper_solo    Block<SoloCta, EvenShares>
 *   fkda_hopper_pair    Block<PairCta, EvenShares>
 *   fkda_hopper_maps    Block<MapCta, EvenShares>
 *   fkda_hopper_relay   Block<MapCta, Relay>, then Block<PairCta, Relay>
 *   fkda_hopper_mixed   Block<MapCta, Mixed>, then Block<PairCta, Mixed>; or Block<SoloCta, Mixed>
 *
 * The usual kernels take the bounded gate with both parameters, sigmoids of bf16 logits, and q and k that
 * are to be normalised. Kernels for other arithmetic have the same blocks with another Arithmetic. Each of
 * fkda_hopper_bounded_solo, fkda_hopper_softplus_solo and so on has the gate in bf16 that its name says, and
 * looks at all other options while it runs. fkda_hopper_fp32_gates_solo and so on have every gate in
 * fp32 and look at which one it is. fkda_hopper_general_solo and so on look at the gate and at its type too.
 * A gate's arithmetic is equal to the bit in all kernels that have the gate.
 *
 * The kernels fkda_hopper_states_solo and so on have the same blocks with STATES, as the general ones have:
 * these blocks write checkpoints and take states with K first. Their arithmetic is the usual one to the bit.
 */
#ifndef FKDA_HOPPER_BLOCK_CUH
#define FKDA_HOPPER_BLOCK_CUH

#include "../schedule/schedule.cuh"

namespace fkda
{

constexpr int SUBCHUNK = 16; /* tokens: the rows of one tensor core product */
constexpr int ROW = 128;     /* bytes of a swizzled row: 64 channels of one token, or 64 rows of V */

/* Numbers of named barriers; barriers.cuh says who meets there. */
constexpr int TEAM_BARRIER = 1, RECURRENCE_BARRIER = 8;

/* What a block knows of the options that concern arithmetic. */
enum class Arithmetic {
    USUAL,      /* none of them */
    BOUNDED,    /* every one but other gates and gates in fp32 */
    SOFTPLUS,   /* as BOUNDED, and its gate is softplus */
    ACTIVATED,  /* as BOUNDED, and g is activated already */
    FP32_GATES, /* as BOUNDED, and g is in fp32; the gate is looked at while the kernel runs */
    GENERAL,    /* every option; gates and their type are looked at while the kernel runs */
};

template <class Cta, class SomeSchedule, Arithmetic arithmetic = Arithmetic::USUAL,
          bool states = arithmetic == Arithmetic::GENERAL>
struct Block : SomeSchedule::template Phase<Cta> {
    using Schedule = SomeSchedule;
    static constexpr Arithmetic ARITHMETIC = arithmetic;
    static constexpr bool GENERAL = arithmetic == Arithmetic::GENERAL;
    /* The block looks at write strengths, norms and absent parameters while it runs. */
    static constexpr bool OPTIONS = arithmetic != Arithmetic::USUAL;
    /* Log decays have no bound (prepare_slice.cuh). */
    static constexpr bool UNBOUNDED = OPTIONS && arithmetic != Arithmetic::BOUNDED;
    static constexpr bool STATES = states;
    static constexpr bool KEEPS_BITS = false; /* keys have more bits than fp16 (prepare_slice.cuh) */
    /* The block writes checkpoints. A mixed kernel and the general relay have no registers left for
     * checkpoints, and calls with checkpoints are planned without these. */
    static constexpr bool CHECKPOINTS = states && Cta::OUTPUTS && !SomeSchedule::MIXED &&
                                        !(GENERAL && SomeSchedule::template Phase<Cta>::RELAYS);
    /* Work items may come in pieces, because checkpoints may lie inside chunks (schedule/pieces.cuh). */
    static constexpr bool PIECES = CHECKPOINTS && Cta::CHUNK > 16;
    using Phase = typename Schedule::template Phase<Cta>;
    static constexpr bool MIXED = Schedule::MIXED;
    /* With options the preparation needs more registers than a relay's output phase gives others, and with
     * gates in fp32 more in every CTA that has chunks of 32 tokens. */
    static constexpr Registers find_registers()
    {
        if (arithmetic == Arithmetic::FP32_GATES && Cta::CHUNK > 16) {
            if (Cta::MAPS) return {152, 104, 104};
            return Phase::JOINS ? Registers{184, 120, 88} : Registers{176, 120, 96};
        }
        return OPTIONS && Phase::JOINS ? Registers{192, 112, 96} : Phase::REGISTERS;
    }
    static constexpr Registers REGISTERS = find_registers();
    static constexpr int SLOTS = Cta::OWN_SLOTS + Cta::RECEIVED_SLOTS;
    static constexpr int SUBCHUNKS = Cta::CHUNK / SUBCHUNK;
    static constexpr int RECURRENCE_WARPS = Cta::ROWS / 16;
    static constexpr int PREPARE_WARPS = Cta::TEAM_WARPS * Cta::TEAMS;
    static constexpr int AHEAD_WARPS = PREPARE_WARPS + 2; /* the preparation, the loader and the solver */
    static constexpr int HALF_TOKENS = Cta::CHUNK * ROW;  /* bytes: a chunk's tokens in 64 channels */
    /* Outputs have room of their own in shared memory if some is left; otherwise they go where v was. */
    static constexpr bool ROOM_FOR_OUTPUTS = Cta::OUTPUTS && Cta::ROWS == 64;

    static_assert(RECURRENCE_WARPS + AHEAD_WARPS <= FKDA_HOPPER_THREADS / 32, "all roles have their warps");
    static_assert(RECURRENCE_WARPS / 4 * REGISTERS.recurrence +
                          (3 - RECURRENCE_WARPS / 4) * REGISTERS.preparation + REGISTERS.last_warpgroup <=
                      512,
                  "in a quarter of an SM");
};

} // namespace fkda

#endif
