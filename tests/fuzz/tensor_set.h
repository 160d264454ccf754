/* The tensors of a call, each in memory of its own, and mutations of them. */
#ifndef TESTS_FUZZ_TENSOR_SET_H
#define TESTS_FUZZ_TENSOR_SET_H

#include "tensors.h"

enum { MOST_TENSORS = 24 };

typedef struct tensor_set {
    int count;
    flash_kda_tensor *tensors[MOST_TENSORS]; /* the fields of the call */
    memory memory[MOST_TENSORS];
    size_t misaligned_by[MOST_TENSORS]; /* bytes in front of a tensor in its memory */
    bool unreal;                        /* A tensor has no memory, so that the call must not be tried. */
} tensor_set;

/* Changes a dtype, a shape, a stride, the alignment ... of one tensor, before memory is placed. */
void mutate_tensor(tensor_set *set, input *from);

/* Gives a tensor exactly the memory that it needs. Returns this memory, without bytes that misalign it. */
memory place(tensor_set *set, int which);

/* The mutations below are for a call whose tensors have been placed. */

/* Puts a tensor into memory of something else, if that is large enough. Returns whether it did. */
bool share(tensor_set *set, int which, const memory *to, input *from);

/* Puts a hostile number into a tensor of integers. */
void plant_integer(tensor_set *set, int which, input *from);

/* Puts a number into a tensor of numbers, also one that is not finite. Returns the number. */
float plant(tensor_set *set, int which, input *from);

/* Whether memory of a tensor is a part of m. */
bool lies_in(const flash_kda_tensor *t, const memory *m);

/* Whether each tensor that is there lies in memory of the set, or in the other one, which may be NULL. */
bool all_are_inside(const tensor_set *set, const memory *other, const memory *another);

/* Ends the process if an output shares a byte with another tensor, in a call that was taken. `outputs` has a
 * bit for each of them. */
void check_apart(const tensor_set *set, uint32_t outputs);

void keep_copies(tensor_set *set);
void forget_all(tensor_set *set);

#endif
