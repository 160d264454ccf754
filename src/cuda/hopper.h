/* What the ways to run the Hopper kernels share: whole sequences (hopper.c), or cut into segments (segments.c). */
#ifndef FKDA_HOPPER_H
#define FKDA_HOPPER_H

#include "../../kernels/hopper/costs.h"
#include "../../kernels/hopper/fwd_args.h"
#include "../../kernels/hopper/fwd_shape.h"
#include "modules.h"

extern fkda_module fkda_hopper_fwd_module; /* kernels/hopper/fwd.cu */

/* Pairs of multiprocessors: heads of sequences or segments that are under way at once. */
int64_t fkda_hopper_pairs(int multiprocessors);

/* Clocks that sequences should take if none is cut, besides beginning and end. */
int64_t fkda_hopper_whole_clocks(const fkda_problem *p, int multiprocessors);

/* Room for the states of pieces of work that are divided: its size, and where it is if it begins at `memory`. */
size_t fkda_hopper_handoff_size(int multiprocessors);
fkda_handoff fkda_hopper_handoff(void *memory, int multiprocessors);

/* What every kernel gets, for whole sequences in chunks of so many tokens. */
flash_kda_status fkda_hopper_arguments(const fkda_driver *driver, const fkda_problem *p,
                                       fkda_hopper_fwd_args *args, int chunk);

/* `early`: as soon as the kernel before lets it; the kernel itself waits for what it needs. */
flash_kda_status fkda_hopper_launch(const fkda_driver *driver, const fkda_problem *p,
                                    fkda_hopper_fwd_args *args, CUfunction kernel, int blocks, int threads,
                                    bool early);

/* A kernel whose blocks wait for each other: all start together, or the driver refuses and nothing is launched: false. */
bool fkda_hopper_launch_together(const fkda_driver *driver, const fkda_problem *p, void *args,
                                 CUfunction kernel, int blocks);

/* Launches the forward kernel for pairs of blocks or, with chunks of FKDA_HOPPER_CHUNK_SOLO, for single ones. It has at most so many pieces
 * to work through: if they are more than blocks or pairs, and there is room for states in between, some are divided. */
flash_kda_status fkda_hopper_launch_fwd(const fkda_driver *driver, const fkda_problem *p,
                                        fkda_hopper_fwd_args *args, int chunk, int64_t pieces,
                                        int multiprocessors, bool early);

#endif
