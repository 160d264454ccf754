/* Sizes that the backward kernels for Hopper are compiled for and that the host launches them with. */
#ifndef FKDA_HOPPER_BWD_SHAPE_H
#define FKDA_HOPPER_BWD_SHAPE_H

/* Eight warps of channels, then eight warps of rows. */
#define FKDA_HOPPER_BWD_THREADS 512

/* Dynamic shared memory of a CTA: sizeof(HopperShared) in shared.cuh, which asserts it. */
#define FKDA_HOPPER_BWD_SHARED_BYTES 232448

/* Tokens of a segment, a multiple of 16. A longer segment needs fewer borders and longer records. */
#define FKDA_HOPPER_BWD_SEGMENT 256

/* Bytes of a state image. */
#define FKDA_HOPPER_BWD_IMAGE (2 * 128 * 128)

/* Bytes of a chunk's record: the image of the state before it, and 16 x 128 fp32 of what that state does not
 * predict. */
#define FKDA_HOPPER_BWD_RECORD (FKDA_HOPPER_BWD_IMAGE + 4 * 16 * 128)

#endif
