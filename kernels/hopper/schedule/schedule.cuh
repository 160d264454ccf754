/*
 * The three schedules, as template arguments of a block (block/block.cuh): what a schedule changes about a
 * CTA shape, and the type that gives out its work items.
 *
 * A schedule says which work items a CTA gets, and in which order:
 *   EvenShares  all work items end to end, an equal share of that line to each worker     (even_shares.cuh)
 *   Relay       one segment to each CTA pair; pairs wait for each other at flags          (relay.cuh)
 *   Mixed       long sequences as a relay, all other sequences in even shares             (mixed.cuh)
 *
 * A worker is a solo CTA or a CTA pair.
 */
#ifndef FKDA_HOPPER_SCHEDULE_CUH
#define FKDA_HOPPER_SCHEDULE_CUH

#include <type_traits>

#include "../block/cta.cuh"

namespace fkda
{

template <class Block> struct AllWorkers;
template <class Block, class Workers> struct EvenSharesSource;
struct RelayAssignment;
template <class Block, class Assignment> struct RelaySource;
struct LongAssignment;
template <class Block> struct RestWorkers;
template <class Block> struct LongOrRest;

/* A CTA without phases has the constants of its shape. */
template <class Cta> struct WithoutPhases : Cta {
    static constexpr bool RELAYS = false;  /* CTA pairs wait for each other at flags of their segments */
    static constexpr bool JOINS = false;   /* the CTA carries rows through maps before it computes outputs */
    static constexpr int BYTES_APART = 16; /* left free in shared memory, in front of the barriers */
};

/* In a relay a CTA pair first runs the map phase as MapCta, then the join phase and the output phase as
 * PairCta. Solo CTAs take no part in a relay. */
template <class Cta> struct RelayPhase : WithoutPhases<Cta> {
};
/* The memory of an mbarrier must not become memory for data of the next phase: single words of a tile in such
 * memory come out wrong. So the barriers of the map phase lie behind everything that the output phase has in
 * shared memory. 13728 bytes left free in front of them bring them there, which run_two_phases() asserts. */
template <> struct RelayPhase<MapCta> : WithoutPhases<MapCta> {
    static constexpr bool RELAYS = true;
    static constexpr int BYTES_APART = 13728;
};
/* With the registers of a PairCta that does nothing else, this phase would spill. */
template <> struct RelayPhase<PairCta> : WithoutPhases<PairCta> {
    static constexpr bool RELAYS = true, JOINS = true;
    static constexpr Registers REGISTERS = {200, 104, 96};
};

struct EvenShares {
    template <class Cta> using Phase = WithoutPhases<Cta>;
    template <class Block> using Source = EvenSharesSource<Block, AllWorkers<Block>>;
    static constexpr bool MIXED = false; /* whether each CTA finds on the device what its pair is for */
};

struct Relay {
    template <class Cta> using Phase = RelayPhase<Cta>;
    template <class Block> using Source = RelaySource<Block, RelayAssignment>;
    static constexpr bool MIXED = false;
};

struct Mixed {
    template <class Cta> using Phase = RelayPhase<Cta>;
    template <class Block>
    using Source = std::conditional_t<
        Block::CTAS == 1, EvenSharesSource<Block, RestWorkers<Block>>,
        std::conditional_t<Block::MAPS, RelaySource<Block, LongAssignment>, LongOrRest<Block>>>;
    static constexpr bool MIXED = true;
};

} // namespace fkda

#endif
