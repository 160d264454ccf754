/*
 * Sends the chunks that this CTA prepares to the other CTA of its pair, by bulk copies from shared memory to
 * shared memory.
 *
 * A chunk goes in two copies: its tokens once they are prepared, and its stage once it is solved. The other
 * CTA has fewer received slots than chunks are under way, so the sender waits until the recurrences of both
 * CTAs have released the chunk that the received slot held before.
 */
#ifndef FKDA_HOPPER_SEND_CUH
#define FKDA_HOPPER_SEND_CUH

#include "shared.cuh"

namespace fkda
{

template <class Block> struct Sender {
    Shared<Block> &shared;
    Slot<Block::RECEIVED_SLOTS + (Block::CTAS == 1)> to; /* the received slot of the next chunk */
    Slot<Block::OWN_SLOTS> last; /* the own slot of the chunk that was sent to that received slot before */
    bool used;                   /* a chunk was sent there before */

    __device__ explicit Sender(Shared<Block> &s) : shared(s), to(0), last(0), used(false)
    {
    }

    /* An own slot's `empty` counts the recurrences of both CTAs. */
    __device__ uint64_t *released() const
    {
        return &shared.chunk_ring.empty[last.index];
    }

    __device__ bool has_room() const
    {
        return !used || mbarrier_test(released(), last.parity);
    }

    __device__ void wait_for_room() const
    {
        mbarrier_wait(released(), last.parity);
    }

    __device__ void send_tokens(int from) const
    {
        Tokens<Block> &there = shared.tokens[Block::OWN_SLOTS + to.index];
        if (elect_lane())
            copy_to_other_cta(there.half, shared.tokens[from].half, sizeof there.half,
                              &shared.chunk_ring.ready[Block::OWN_SLOTS + to.index]);
        __syncwarp();
    }

    /* Ends the chunk. */
    __device__ void send_stage(int from)
    {
        const int slot = Block::OWN_SLOTS + to.index;
        if (elect_lane())
            copy_to_other_cta(&shared.stage[slot], &shared.stage[from], sizeof(Stage<Block>),
                              &shared.chunk_ring.ready[slot]);
        __syncwarp();
        if (used) last.advance(1);
        to.advance(1);
        used |= to.index == 0;
    }
};

} // namespace fkda

#endif
